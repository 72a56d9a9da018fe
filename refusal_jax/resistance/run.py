"""Does the resistance tests of checkpoints: each checkpoint's own study, and then each test as a stage of it."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from refusal_jax import distributed, hub
from refusal_jax.chat.conditional import check_weights
from refusal_jax.chat.model import demo_model_path
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.opened import model_folder
from refusal_jax.directions import Direction, read_direction
from refusal_jax.errors import UserError, setting, without_quotes
from refusal_jax.files import local_path
from refusal_jax.judges.choice import parse_judges
from refusal_jax.judges.judge import Judge
from refusal_jax.models.hf_config import load_config
from refusal_jax.plan.planner import ON_CPU
from refusal_jax.resistance.attack import Attack, Impossible
from refusal_jax.resistance.catalogue import ATTACKS, BY_NAME
from refusal_jax.resistance.settings import ResistSettings
from refusal_jax.resistance.stages import PLAIN, stage_of
from refusal_jax.resistance.subject import Subject
from refusal_jax.runs.artifacts import UNATTACKED, resistance_name
from refusal_jax.runs.run import Run
from refusal_jax.study.config import StudyConfig
from refusal_jax.study.study import GROUPS, SELECTING, input_hashes, recorded_settings

LOG = logging.getLogger(__name__)
EMBEDDED, BASE_FOLDER = "embedded", "base"  # what the embedded model is called; the folder of the base's study
NO_MEMORY = "It failed: the devices have too little memory for it. Ask for fewer rows of a batch, or use more devices."


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is tested. name: what the user calls it. title: what tables call it, and its folder in the outputs.
    folder: where it is."""

    name: str
    title: str
    folder: pathlib.Path


@dataclasses.dataclass
class Tested:
    """Holds what the tests found of a checkpoint.

    plain: without an attack, as a record of `stages.measure_plain`; None where the checkpoint could not be tested. outcomes:
    the records of the tests that were done, by name. reasons: why others were not, by name; under "" why the checkpoint was
    not. study: of the checkpoint's own study, `{"seconds", "flops", "direction"}`.
    """

    checkpoint: Checkpoint
    fingerprint: str
    plain: dict[str, Any] | None = None
    outcomes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Resistance:
    """The results of all checkpoints, and the settings. tests: names, in order. origin: where the direction of the plain test
    comes from, in words; "" where it is each checkpoint's own."""

    settings: ResistSettings
    tests: tuple[str, ...]
    checkpoints: tuple[Tested, ...]
    origin: str = ""


def is_embedded(name: str) -> bool:
    """Returns whether a name is that of the embedded model, and of no folder."""
    return not name or (name == EMBEDDED and not local_path(name).exists())


def opened(name: str, base: str = "") -> pathlib.Path:
    """Returns the folder of a checkpoint by what a user calls it, "" or "embedded" for the embedded model. base: what an
    adapter is read on. Raises UserError as `model_folder` does."""
    if is_embedded(name):
        return demo_model_path()
    return model_folder(name, str(demo_model_path()) if base and is_embedded(base) else base)


def named_checkpoints(settings: ResistSettings) -> list[Checkpoint]:
    """Returns the checkpoints of the settings, opened, with a title each that no other has. Raises UserError for one that
    cannot be opened, and for one that is named twice."""
    found: list[Checkpoint] = []
    for name in settings.checkpoints:
        if "://" not in name:
            check_weights(local_path(name or "."))
        folder = opened(name, settings.base)
        load_config(folder)
        if folder.resolve() in [one.folder.resolve() for one in found]:
            raise UserError(f"{name or EMBEDDED} is named twice among the checkpoints. Name each once.")
        title, number = title_of(name), 2
        while title in {one.title for one in found} | {BASE_FOLDER}:
            title = f"{title_of(name)}-{number}"
            number += 1
        found.append(Checkpoint(name, title, folder))
    return found


def title_of(name: str) -> str:
    """Returns what a checkpoint is called in tables, which is also the name of a plain folder: the last part of its name, or the
    part before where that is no name of its own, such as "model"."""
    if is_embedded(name):
        return EMBEDDED
    path = local_path(name)
    parts = [part for part in pathlib.Path(os.path.abspath(path) if path.exists() else path).parts if part.strip("/")]
    last = parts[-2] if len(parts) > 1 and parts[-1] in ("model", "adapter") else [".", *parts][-1]
    title = re.sub(r"[^\w.@-]+", "-", last.removesuffix(".gguf"))
    return title if title.strip(".") else "checkpoint"


def study_config(settings: ResistSettings, name: str, mesh: Sequence[int] | None) -> StudyConfig:
    """Returns the settings of a checkpoint's own study. mesh: devices along its axes, None to have it planned."""
    config = StudyConfig()
    config.model = name
    for same in ("dtype", "batch_size", "chat_template", "system_prompt", "thinking", "refusal_tokens"):
        config[same] = settings[same]
    config.data = settings.data
    config.generation.max_new_tokens = settings.max_new_tokens
    if mesh:
        config.mesh.update(dict(zip(config.mesh, mesh, strict=True)))
    return config


@contextlib.contextmanager
def studied(
    settings: ResistSettings,
    judge: Judge,
    at: Checkpoint,
    out: str | pathlib.Path,
    mesh: Sequence[int] | None,
    base: pathlib.Path | None = None,
    given: Direction | None = None,
    origin: str = "",
) -> Iterator[Subject]:
    """Yields a checkpoint with its own study done as far as its direction, in a folder of its own below `out`."""
    config = study_config(settings, "" if is_embedded(at.name) else at.name, mesh)
    config_record = recorded_settings(config)
    with Run.open(f"{out}/{at.title}", config_record, input_hashes(config, at.folder, [])) as run:
        subject = Subject(settings, config, run, at.folder, judge, base, given, origin, GROUPS)
        try:
            for stage in SELECTING:
                run.stage(stage, subject)
            yield subject
        finally:
            subject.forget()


def plain_direction(
    settings: ResistSettings, judge: Judge, out: str | pathlib.Path, mesh: Sequence[int] | None
) -> tuple[Direction | None, str]:
    """Returns the direction that the plain test ablates, and where it comes from, in words: the one of the settings, or the
    base's own; None if each checkpoint's own is meant. Raises UserError for a direction that cannot be read, and for a base
    that has none."""
    if settings.direction:
        return read_direction([local_path(settings.direction)]), f"the direction in {settings.direction}"
    if not settings.base:
        return None, ""
    base = Checkpoint(settings.base, BASE_FOLDER, opened(settings.base))
    with studied(settings, judge, base, out, mesh) as subject:
        found = subject.own_direction()
    if found is None:
        raise UserError(
            f"The study of the base {settings.base} found no direction, so that the plain test has none to ablate. Name one as "
            f"{setting('direction') or 'direction'}, or leave out the base, and each checkpoint's own is ablated."
        )
    return found, f"the direction of the base {settings.base}"


def resist(
    settings: ResistSettings | Mapping[str, Any], out: str | pathlib.Path = "", mesh: Sequence[int] | None = None
) -> Resistance:
    """Tests how well checkpoints keep their refusal under white-box attacks, and returns what was found.

    out: folder, or gs://BUCKET/FOLDER, in which each checkpoint gets a folder with its study and the outcome of each test;
    those that are there are not done again. "" keeps nothing. mesh: devices along data, fsdp and model; None has it planned.
    A test that cannot be done, or fails, is reported with its reason, in which texts that an error quotes are left out.
    Raises UserError for settings that cannot be, for checkpoints that cannot be opened, and, where a single one is tested, for
    one that cannot be run.
    """
    settings = ResistSettings.of(settings)
    settings.check(tuple(BY_NAME))
    with contextlib.ExitStack() as stack:
        stack.enter_context(hub.session({}))
        out = out or stack.enter_context(tempfile.TemporaryDirectory(prefix="resist-"))
        (judge,) = parse_judges([settings.judge], settings.batch_size or ON_CPU.forward, settings.dtype)
        checkpoints = named_checkpoints(settings)
        base = opened(settings.base) if settings.base else None
        direction, origin = plain_direction(settings, judge, out, mesh)
        attacks = [BY_NAME[name] for name in settings.tests] or [attack for attack in ATTACKS if attack.quick]
        found = []
        for at in checkpoints:
            tested = Tested(at, checkpoint_fingerprint(at.folder))
            found.append(tested)
            try:
                with studied(settings, judge, at, out, mesh, base, direction, origin) as subject:
                    do_tests(subject, attacks, tested)
            except UserError as error:
                if len(checkpoints) == 1:
                    raise
                LOG.warning(f"{at.title} cannot be tested. {error}")
                tested.reasons[""] = without_quotes(str(error))
        return Resistance(settings, tuple(attack.name for attack in attacks), tuple(found), origin)


def do_tests(subject: Subject, attacks: Sequence[Attack], tested: Tested) -> None:
    """Does the tests of a checkpoint that are not done yet, and enters all outcomes into `tested`."""
    run = subject.run
    run.stage(PLAIN, subject)
    tested.plain = dict(run.read_json(UNATTACKED))
    for attack in attacks:
        stage = stage_of(attack)
        try:
            run.stage(stage, subject)
        except Impossible as error:
            tested.reasons[attack.name] = without_quotes(str(error))
        except UserError as error:
            LOG.warning(f"The test {attack.name} failed on {tested.checkpoint.title}. {error}")
            tested.reasons[attack.name] = f"It failed: {without_quotes(str(error))}"
        except jax.errors.JaxRuntimeError as error:
            if distributed.several() or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            LOG.warning(f"The test {attack.name} ran out of memory on {tested.checkpoint.title}. {error}")
            tested.reasons[attack.name] = NO_MEMORY
        else:
            if reason := run.manifest["stages"][stage.name].get("skipped"):
                tested.reasons[attack.name] = reason
            else:
                tested.outcomes[attack.name] = dict(run.read_json(resistance_name(attack.name)))
