"""The parts of a study that are timed, each by the functions that the study itself runs.

A part is run once as a user first meets it, with its compilation, and then as often as asked for; what it has to do is counted in
its first run.
"""

import dataclasses
import gc
import logging
import pathlib
import shutil
import time
from collections.abc import Callable, Collection

import jax
import numpy as np

from refusal_jax.chat.batches import padding_of
from refusal_jax.chat.loss_rows import chat_rows
from refusal_jax.chat.model import ChatModel
from refusal_jax.chat.residuals import Extraction, extract
from refusal_jax.conditions import Ablate
from refusal_jax.directions import Direction
from refusal_jax.edits import Edits
from refusal_jax.export.finished import FinishedStudy
from refusal_jax.export.run import Request, export
from refusal_jax.models.config import ModelConfig
from refusal_jax.plan.programs import Sizes
from refusal_jax.progress import Progress
from refusal_jax.speed.ceilings import evict
from refusal_jax.speed.watch import Call, Counted, counted, watching
from refusal_jax.study.directions import difference_in_means
from refusal_jax.study.loss import measure_losses
from refusal_jax.study.rule import Rule
from refusal_jax.study.selection import evaluate_candidates

LOG = logging.getLogger(__name__)

STAGES = ("load", "extraction", "selection", "prefill", "decode", "loss", "export")
OF_FILES = ("load", "export")  # which a model without files does not have
STEP = (
    "decode"  # the program that writes the tokens of a reply after the first; the others of generation read the prompt
)
VERIFIED = 8  # prompts of each side that an export is verified on


@dataclasses.dataclass(frozen=True)
class Task:
    """The work that is timed: a model with prompts.

    load: loads the model. folder: its checkpoint, None where the weights are made up; files: of its weights, on this machine.
    prompts: by split, of a study, and "test" to reply to. sizes: rows of batches. thresholds: of the selection rule, by name.
    repeats: how often each part runs after its first time. scratch: a folder for what is written.
    """

    load: Callable[[], ChatModel]
    folder: pathlib.Path | None
    files: list[pathlib.Path]
    prompts: dict[str, list[str]]
    sizes: Sizes
    new_tokens: int
    thresholds: dict[str, float]
    repeats: int
    scratch: pathlib.Path

    @property
    def splits(self) -> dict[str, list[str]]:
        """Returns the prompts that a direction is extracted and selected with."""
        return {split: rows for split, rows in self.prompts.items() if split != "test"}


@dataclasses.dataclass(frozen=True)
class Timed:
    """A part's times and work.

    first: seconds of the first run. seconds: of the others. counted: what a run computes. read, written: bytes of files. amounts:
    what else is known of it, by name.
    """

    first: float
    seconds: list[float]
    counted: Counted = dataclasses.field(default_factory=Counted)
    read: int = 0
    written: int = 0
    amounts: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def median(self) -> float:
        """Returns the usual seconds of a run, without compilation."""
        return float(np.median(self.seconds))


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a part: its seconds, and the programs that it ran."""

    seconds: float
    calls: list[Call]

    def part(self, step: bool) -> "Run":
        """Returns what of a generation is decoding, or else what is not, its compilation included."""
        calls = [call for call in self.calls if (call.name == STEP) == step]
        decoding = sum(call.seconds for call in self.calls if call.name == STEP)
        return Run(decoding if step else self.seconds - decoding, calls)


@dataclasses.dataclass
class Found:
    """The results that parts hand on to later ones, and to the comparison with another implementation."""

    model: ChatModel | None = None
    extractions: dict[str, Extraction] = dataclasses.field(default_factory=dict)
    kept: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    rows: list[dict] = dataclasses.field(default_factory=list)
    ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.int32))


@dataclasses.dataclass
class Bench:
    """Runs the parts of a task that are wanted, in order."""

    task: Task
    wanted: Collection[str]
    found: Found = dataclasses.field(default_factory=Found)
    timed: dict[str, Timed] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> ChatModel:
        assert self.found.model is not None, "loading is the first part"
        return self.found.model

    def run(self) -> dict[str, Timed]:
        """Returns the times of the parts that are wanted, by name, in the order of STAGES."""
        needed = {*self.wanted, "load", *(["extraction"] if "selection" in self.wanted else [])}
        parts = [part for names, part in PARTS if needed & set(names)]
        with Progress("bench", len(parts), "stage") as bar:
            for part in parts:
                LOG.info(f"timing {part.__name__}")
                part(self)
                bar.update()
        return {name: self.timed[name] for name in STAGES if name in self.wanted}

    def runs(self, names: tuple[str, ...], work, wait: bool = False, before=lambda: None) -> list[Run]:
        """Returns the first run of `work` and its repeats, of which there are none where only later parts want what it finds.

        wait: whether each program is waited for. before: what is done before each run, whose time does not count.
        """
        found = []
        for number in range(1 + (self.task.repeats if set(names) & set(self.wanted) else 0)):
            before()
            with watching(wait) as calls:
                start = time.perf_counter()
                work()
                found.append(Run(time.perf_counter() - start, calls if number == 0 or wait else []))
        return found

    def note(self, name: str, runs: list[Run], **more) -> None:
        """Notes the runs of a part."""
        first, *others = runs
        work = counted(first.calls, self.model.config)
        self.timed[name] = Timed(first.seconds, [run.seconds for run in others or runs], work, **more)


def loading(bench: Bench) -> None:
    """Loads the model, from files that the system does not hold in memory."""
    task = bench.task

    def forget() -> None:
        bench.found.model = None  # or there were two at a time
        gc.collect()
        evict(task.files)

    def work() -> None:
        bench.found.model = model = task.load()
        jax.block_until_ready(jax.tree.leaves(model.decoder))

    runs = bench.runs(("load",), work, before=forget)
    bench.note("load", [Run(run.seconds, []) for run in runs], read=size(task.files))


def extraction(bench: Bench) -> None:
    """Reads the prompts of a study: their scores, the filter, and mean residuals."""
    task, model = bench.task, bench.model
    ids, positions = model.chat.opener_ids(("I",)), len(model.chat.post_instruction_ids)
    size = padding_of(model, task.splits.values(), task.sizes.forward)

    def work() -> None:
        for split, rows in task.splits.items():
            sign = 1 if split.startswith("harmful") else -1
            bench.found.extractions[split] = extract(model, rows, ids, positions, sign, size, split)

    runs = bench.runs(("extraction",), work)
    cfg = model.config
    prompts = [text for rows in task.splits.values() for text in rows]
    tokens = sum(len(model.chat.prompt_ids(text)) for text in prompts)
    amounts = {
        "prompts": len(prompts),
        "prompt_tokens": tokens,
        "activations": float(tokens * cfg.n_layers * cfg.d_model),
        "activations_kept": float(len(prompts) * positions * cfg.n_layers * cfg.d_model),
    }
    bench.note("extraction", runs, amounts=amounts)
    for split, rows in task.splits.items():
        kept = [row for row, keep in zip(rows, bench.found.extractions[split].kept, strict=True) if keep]
        bench.found.kept[split] = kept


def selection(bench: Bench) -> None:
    """Scores the candidate directions. A side of which the filter keeps nothing is used whole: time is measured, not refusal."""
    task, model, found = bench.task, bench.model, bench.found
    shown, other = (found.extractions[split].mean_lpd for split in ("harmful_train", "harmless_train"))
    diffs_lpd = difference_in_means(shown, other)
    if not np.isfinite(diffs_lpd).all():
        diffs_lpd = np.random.default_rng(0).standard_normal(diffs_lpd.shape)
    harmful, harmless = (found.kept[split] or task.prompts[split] for split in ("harmful_val", "harmless_val"))
    ids, rule = model.chat.opener_ids(("I",)), Rule(model.config.n_layers, **task.thresholds)

    def work() -> None:
        found.rows = evaluate_candidates(
            model, diffs_lpd, harmful, harmless, ids, rule, full_grid=False, batch_size=task.sizes.select
        )

    runs = bench.runs(("selection",), work)
    scored = sum(
        row[key] is not None for row in found.rows for key in ("steering_score", "kl_div_score", "refusal_score")
    )
    bench.note("selection", runs, amounts={"candidates": len(found.rows), "scores": scored})


def generation(bench: Bench) -> None:
    """Reads prompts into the cache, and writes exactly as many tokens as asked for to each reply."""
    task = bench.task
    chat = dataclasses.replace(bench.model.chat, eos_ids=(-1,))
    endless = dataclasses.replace(bench.model, chat=chat)

    def work() -> None:
        batch = endless.encode(task.prompts["test"])
        bench.found.ids = np.asarray(endless.generate_ids(batch, task.new_tokens))

    runs = bench.runs(("prefill", "decode"), work, wait=True)
    rows = len(task.prompts["test"])
    for name, step in (("prefill", False), ("decode", True)):
        new = task.new_tokens - 1 if step else 1
        bench.note(name, [run.part(step) for run in runs], amounts={"rows": rows, "new_tokens": rows * new})


def loss(bench: Bench) -> None:
    """Measures the cross-entropy of answers while a direction is ablated. Another prompt stands in for each: its words make
    no difference to the time."""
    task, model, size = bench.task, bench.model, bench.task.sizes.loss
    prompts = task.prompts["harmless_val"]
    rows = chat_rows(
        model.chat, list(zip(prompts, prompts[1:] + prompts[:1], strict=True)), model.config.context_length
    )
    edits, found = Edits.ablate(some_direction(model.config)), {}

    def work() -> None:
        found.update(measure_losses(model, rows, edits, size, "loss")[0][0])

    runs = bench.runs(("loss",), work)
    bench.note("loss", runs, amounts={"rows": len(rows), "counted_tokens": found["n_tokens"]})


def exporting(bench: Bench) -> None:
    """Exports the checkpoint with a direction ablated, verified as an export is, from files that the system does not hold in
    memory."""
    task, target = bench.task, bench.task.scratch / "export"
    assert task.folder is not None, "a model without files has no export"
    edit = Ablate(Direction.of(some_direction(bench.model.config)))
    request = Request(task.folder, target, edit, FinishedStudy.none(VERIFIED))
    report, written = {}, 0

    def forget() -> None:
        shutil.rmtree(target, ignore_errors=True)
        evict(task.files)

    def work() -> None:
        report.update(export(request))

    runs = [Run(run.seconds, []) for run in bench.runs(("export",), work, before=forget)]
    written = size([path for path in target.rglob("*") if path.is_file()])
    shutil.rmtree(target, ignore_errors=True)
    amounts = {f"seconds_{name}": seconds for name, seconds in report["seconds"].items()}
    bench.note("export", runs, read=size(task.files), written=written, amounts=amounts)


def size(files: Collection[pathlib.Path]) -> int:
    """Returns the bytes of files."""
    return sum(path.stat().st_size for path in files)


def some_direction(cfg: ModelConfig) -> np.ndarray:
    """Returns a direction, float64 `[D]`: which one makes no difference to the time."""
    return np.random.default_rng(0).standard_normal(cfg.d_model)


PARTS: tuple[tuple[tuple[str, ...], Callable[[Bench], None]], ...] = (
    (("load",), loading),
    (("extraction",), extraction),
    (("selection",), selection),
    (("prefill", "decode"), generation),
    (("loss",), loss),
    (("export",), exporting),
)
