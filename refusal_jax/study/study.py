"""The study, stage by stage, in one run's folder.

prompts -> activations -> selection -> projections, completions -> loss, evaluations -> report. Each stage reads and
writes files of the folder and nothing else, so that it can be skipped, resumed or redone alone.
"""

import dataclasses
import functools
import gc
import logging
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from refusal_jax import distributed
from refusal_jax.chat.model import ChatModel, demo_model_path, load_model, weights_dtype
from refusal_jax.chat.prompts import Chat
from refusal_jax.chat.templates import named_template
from refusal_jax.checkpoints.fingerprint import checkpoint_fingerprint
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.data.prompts import BUNDLED, dataset_name, read_prompts, resolve
from refusal_jax.data.sampling import SPLITS, over_refusal_names, overlap_in_words, overlaps, sample_prompts
from refusal_jax.edits import EPS, Edits
from refusal_jax.errors import UserError, field
from refusal_jax.files import file_hash
from refusal_jax.judges.artifacts import evaluations_name, stem_of
from refusal_jax.judges.models import REFUSAL_SCORE, ModelJudge, judge_all, parse_judges, score_verdicts
from refusal_jax.judges.tables import tables, tidy_csv
from refusal_jax.judges.text import evaluate_completions
from refusal_jax.models.config import load_config
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.finite import check_finite
from refusal_jax.models.sharding import replicate
from refusal_jax.plan.planner import ON_CPU, run_mesh, run_sizes
from refusal_jax.plan.programs import USUAL_LENGTH, Sizes, Workload
from refusal_jax.report.page import write_report
from refusal_jax.report.text import setup_lines
from refusal_jax.runs.run import Ledger, Run
from refusal_jax.study.activations import extract, length_batches
from refusal_jax.study.completions import complete, intervention_edits, parse_condition, score_replies
from refusal_jax.study.loss import loss_datasets, measure_kl, measure_loss, read_chat_pairs
from refusal_jax.study.refusal_tokens import Opening, measure_openings, refusal_openings
from refusal_jax.study.selection import Rule, evaluate_candidates, pick
from refusal_jax.taps import Taps

LOG = logging.getLogger(__name__)

PROMPTS, SETUP, FILTER, MEANS = "prompts.json", "setup.json", "filter.json", "mean_diffs.safetensors"
EVALUATIONS, METADATA, DIRECTION = "direction_evaluations.json", "direction_metadata.json", "direction.safetensors"
PROJECTIONS, REPORT = "projections.safetensors", "report.html"
SCORES, DAMAGE, STATISTICS, TIDY = "refusal_scores.json", "damage.json", "statistics.json", "statistics.csv"


def run_study(config: ConfigDict, workdir: str | os.PathLike) -> Run:
    """Runs or continues the study of `config` in `workdir`; `worked` of the run names the stages that did work.

    workdir: a local folder or gs://BUCKET/FOLDER. Of several processes (`distributed.start`) all must call it alike.

    Raises UserError for anything wrong with config, model, data or folder, before long work where it can be known.
    """
    config = config.copy_and_resolve_references()
    judges = check_settings(config)
    folder = checkpoint_folder(config.model) if config.model else demo_model_path()
    load_config(folder)
    inputs = {"model": checkpoint_fingerprint(folder)}
    for split in SPLITS:
        inputs[split] = _hash(resolve(config.data[split], split))
    template = [config.chat_template] if config.chat_template.endswith(".jinja") else []
    for file in (*config.loss.text_files, *config.loss.chat_files, *template):
        inputs[file] = _hash(resolve(file, "loss"))
    for source in config.data.over_refusal:
        inputs[source] = _hash(resolve(source, "harmless_test"))
    for judge in judges:
        if isinstance(judge, ModelJudge):
            inputs[f"judge {judge.name}"] = judge.fingerprint()
    settings = config.to_dict() | {"cache": ""}  # where copies are kept may change from run to run
    with Run.open(workdir, settings, inputs) as run:
        try:
            Study(config, run, folder).run_all()
        except UserError:
            if run.new and run.worked in ([], ["prompts"]):  # nothing was computed yet
                run.discard()
            raise
        return run


def check_settings(config: ConfigDict) -> list:
    """The judges, which are checked with the rest: raises UserError for settings and files that cannot work with any model."""
    if config.chat_template:
        named_template(config.chat_template)
    if not config.generation.conditions:
        raise UserError(f"{field('generation.conditions')} is empty: name at least one, such as harmful_baseline.")
    stems = ["on_distribution"]
    for read, files in ((read_prompts, config.loss.text_files), (read_chat_pairs, config.loss.chat_files)):
        for file in (resolve(file, "loss") for file in files):
            read(file)
            if file.stem in stems:
                raise UserError(f"two loss data sets are called {file.stem!r}: rename {file}.")
            stems.append(file.stem)
    for condition in config.generation.conditions:
        parse_condition(condition)
    check_numbers(config)
    if dataset_name(config.data.harmful_test) == "harmless":
        raise UserError(
            f"The harmful test prompts are in {config.data.harmful_test}, and results carry the file's name: they would be "
            "mixed up with those of the harmless prompts. Rename the file."
        )
    over_refusal_names(config.data)
    return study_judges(config)


def check_numbers(config: ConfigDict) -> None:
    """Raises UserError for a number that is too small."""
    numbers = {
        "batch_size": config.batch_size,
        "select.batch_size": config.select.batch_size,
        **{f"mesh.{name}": size for name, size in dict(config.mesh).items()},
        **{f"data.{name}": config.data[name] for name in ("n_train", "n_val", "n_test")},
        **{f"generation.{name}": config.generation[name] for name in ("max_new_tokens", "batch_size")},
        **{f"loss.{name}": config.loss[name] for name in ("text_tokens", "batch_size")},
    }
    for name, value in numbers.items():
        least = 0 if name.endswith("batch_size") or name.startswith("mesh") else 1
        if value < least:
            raise UserError(f"{field(name)} = {value}, expected at least {least}.")


def study_judges(config: ConfigDict, mesh=None) -> list:
    """The judges of a study's config, but for the refusal score, which its own model gives. Raises UserError as
    `parse_judges` does."""
    specs = [spec for spec in config.judges if spec != REFUSAL_SCORE]
    if not specs and config.judges:
        return []
    return parse_judges(specs, config.batch_size or ON_CPU.forward, config.dtype, mesh, config.cache)


def _hash(path: pathlib.Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} is not a file. Check the path in the config (data, loss or chat_template).")
    return file_hash(path)


@dataclasses.dataclass
class Study:
    """A config, its run's folder and the model, which is loaded when the first stage needs it."""

    config: ConfigDict
    run: Run
    folder: pathlib.Path

    def run_all(self) -> None:
        run = self.run
        completions = [self.completions_name(c) for c in self.conditions]
        verdicts = [evaluations_name(name) for name in completions]
        losses = [f"loss_evals/{name}_loss_eval.json" for name in ("baseline", "ablation", "actadd")]
        picked = [METADATA, DIRECTION]
        scores = [SCORES] if REFUSAL_SCORE in self.config.judges else []
        run.stage("prompts", [], [PROMPTS], self.prompts, alone=True)
        run.stage("activations", [PROMPTS], [SETUP, FILTER, MEANS], self.activations)
        run.stage("selection", [PROMPTS, SETUP, FILTER, MEANS], [EVALUATIONS, *picked], self.selection)
        run.stage("projections", [PROMPTS, DIRECTION], [PROJECTIONS], self.projections)
        run.stage("completions", [PROMPTS, *picked], [*completions, *scores], self.completions)
        own = [name for name in completions if name.endswith("harmless_baseline_completions.json")]
        run.stage("loss", [*own, *picked], [*losses, DAMAGE], self.loss)
        judged_alone = all(judge.of_text for judge in study_judges(self.config))
        tabled = [*verdicts, STATISTICS, TIDY]
        run.stage("evaluations", [*completions, *scores], tabled, self.evaluations, alone=judged_alone)
        run.stage(
            "report",
            [SETUP, FILTER, MEANS, EVALUATIONS, *picked, PROJECTIONS, *verdicts, STATISTICS, *losses, DAMAGE],
            [REPORT],
            lambda _: write_report(run, verdicts),
            alone=True,
        )

    @property
    def over_refusal(self) -> list[str]:
        return list(over_refusal_names(self.config.data))

    @property
    def conditions(self) -> list[str]:
        """Those of the config, and of each over-refusal set baseline and ablation."""
        more = [f"{name}_{kind}" for name in self.over_refusal for kind in ("baseline", "ablation")]
        return [*self.config.generation.conditions, *more]

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh | None:
        work = Workload(load_config(self.folder), weights_dtype(self.config.dtype), self.config, USUAL_LENGTH)
        return run_mesh(work, self.config.mesh, jax.devices())

    @property
    def chat(self) -> Chat:
        """The model's tokenizer, without its weights unless they are loaded already."""
        if "model" in self.__dict__:
            return self.model.chat
        sizes, config = load_config(self.folder), self.config
        return Chat.load(self.folder, sizes.context_length, sizes.vocab_size, config.chat_template, config.thinking)

    def release(self) -> None:
        """Frees the devices' memory of the model."""
        self.__dict__.pop("model", None)
        gc.collect()

    @functools.cached_property
    def model(self) -> ChatModel:
        mesh = self.mesh
        if distributed.several() and (mesh is None or mesh.size != jax.device_count()):
            raise UserError(
                f"The mesh has {1 if mesh is None else mesh.size} of the {jax.device_count()} devices of the "
                f"{jax.process_count()} processes, which must all take part. Make the product of "
                f"{field('mesh.data')}, {field('mesh.fsdp')} and {field('mesh.model')} {jax.device_count()}, or leave them all 0."
            )
        model = load_model(
            self.folder,
            self.config.dtype,
            mesh,
            progress=distributed.first(),
            chat_template=self.config.chat_template,
            thinking=self.config.thinking,
            cache=self.config.cache,
            generation_from_checkpoint=self.config.generation.from_checkpoint,
        )
        room = self.config.generation.max_new_tokens
        for split, rows in self.run.read_json(PROMPTS).items():
            longest = int(model.encode([row["instruction"] for row in rows]).mask.sum(axis=1).max())
            most = model.config.context_length - longest
            if split.endswith("test") and room > most:
                raise UserError(
                    f"{field('generation.max_new_tokens')} = {room} does not fit: the longest prompt of {split} has {longest} "
                    f"tokens and the model's context is {model.config.context_length}. Set it to at most {most}, or drop "
                    "the longest prompts."
                )
        return model

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Rows of the batches of each stage: what fits the devices, with the longest prompt there is."""
        prompts = [row["instruction"] for rows in self.run.read_json(PROMPTS).values() for row in rows]
        length = self.model.encode(prompts).tokens.shape[1]
        work = Workload(self.model.config, str(self.model.decoder.dtype), self.config, length)

        def note(text: str) -> None:
            LOG.info(f"Planning: {text}")

        return run_sizes(work, self.model.mesh, jax.local_devices(), note)

    def completions_name(self, condition: str) -> str:
        side, intervention = parse_condition(condition, self.over_refusal)
        dataset = dataset_name(self.config.data.harmful_test) if side == "harmful" else side
        return f"completions/{dataset}_{intervention}_completions.json"

    def instructions(self, split: str, kept_only: bool = True) -> list[str]:
        rows = self.run.read_json(PROMPTS)[split]
        kept = self.run.read_json(FILTER)[split]["kept"] if kept_only else [True] * len(rows)
        return [row["instruction"] for row, keep in zip(rows, kept, strict=True) if keep]

    def direction(self) -> tuple[np.ndarray, int]:
        return self.run.read_tensors(DIRECTION)["direction"], self.run.read_json(METADATA)["layer"]

    def prompts(self, ledger: Ledger) -> None:
        def note(text: str) -> None:
            LOG.info(f"Prompts: {text}")

        drawn = sample_prompts(self.config.data, note)
        for found in overlaps(drawn):
            note(" ".join(overlap_in_words(found)))
        self.run.write_json(PROMPTS, drawn)

    def refusal_tokens(self) -> tuple[tuple[int, ...], list[Opening]]:
        """The ids of the refusal tokens and, where the config leaves them open, the openings they were chosen from."""
        if self.config.refusal_tokens:
            return self.model.chat.opener_ids(self.config.refusal_tokens), []
        harmful, harmless = (self.instructions(f"{side}_train", kept_only=False) for side in ("harmful", "harmless"))
        openings = measure_openings(self.model, harmful, harmless, self.sizes.forward)
        return refusal_openings(openings, self.model.chat), openings

    def setup(self, positions: int, refusal_ids: tuple[int, ...], openings: list[Opening]) -> dict:
        """What of model, template and refusal tokens the results rest on."""
        chat = self.model.chat

        def named(ids) -> list[dict]:
            return [{"id": i, "text": text} for i, text in zip(ids, chat.token_names(ids), strict=True)]

        return {
            "model": str(self.folder.resolve()),
            "dtype": str(self.model.decoder.dtype),
            "n_layers": self.model.config.n_layers,
            "d_model": self.model.config.d_model,
            "over_refusal": self.over_refusal,
            "bundled_prompts": [split for split in SPLITS if self.config.model and self.config.data[split] == BUNDLED],
            "chat_template": chat.template_origin,
            "thinking": chat.thinking,
            "decoding": self.model.settings.record(self.config.generation.from_checkpoint),
            "positions": positions,
            "post_instruction_tokens": named(chat.post_instruction_ids),
            "refusal_tokens": named(refusal_ids),
            "refusal_tokens_from": "data" if openings else "config",
            "openings": [{**dataclasses.asdict(o), "chosen": o.chosen} for o in openings],
        }

    def activations(self, ledger: Ledger) -> dict:
        """Scores, filter and mean differences (paper, section 2.3), from one pass over the train and val prompts.

        Returns the setup, for the manifest.
        """
        config, chat = self.config, self.model.chat
        template = chat.post_instruction_ids
        positions = len(template) if config.positions is None else config.positions
        if not 1 <= positions <= len(template):
            raise UserError(
                f"{field('positions')} = {positions}, but the chat template puts {len(template)} tokens after the "
                f"instruction ({' '.join(chat.token_names(template))}). Choose 1 to {len(template)}."
            )
        refusal_ids, openings = self.refusal_tokens()
        setup = self.setup(positions, refusal_ids, openings)
        LOG.info("\n".join(setup_lines(setup)))  # now: if it is not what was meant, stop
        found = {}
        for split in SPLITS[:4]:
            sign = 0 if not config.filter else 1 if split.startswith("harmful") else -1
            found[split] = extract(
                self.model,
                self.instructions(split, kept_only=False),
                refusal_ids,
                positions,
                sign,
                self.sizes.forward,
                split,
            )
        self.run.write_json(SETUP, setup)
        self.run.write_json(
            FILTER, {split: {"scores": e.scores.tolist(), "kept": e.kept.tolist()} for split, e in found.items()}
        )
        harmful, harmless = (np.swapaxes(found[s].mean_lpd, 0, 1) for s in ("harmful_train", "harmless_train"))
        self.run.write_tensors(MEANS, {"mean_diffs": harmful - harmless, "harmful": harmful, "harmless": harmless})
        return setup

    def selection(self, ledger: Ledger) -> None:
        select, setup = self.config.select, self.run.read_json(SETUP)
        diffs_pld = self.run.read_tensors(MEANS)["mean_diffs"]
        rule = Rule(setup["n_layers"], select.kl_threshold, select.induce_threshold, select.prune_fraction)
        rows = evaluate_candidates(
            self.model,
            np.swapaxes(diffs_pld, 0, 1),
            self.instructions("harmful_val"),
            self.instructions("harmless_val"),
            [token["id"] for token in setup["refusal_tokens"]],
            rule,
            full_grid=select.full_grid,
            batch_size=self.sizes.select,
            known=ledger.rows,
            save=ledger.append,
        )
        best = pick(rows, rule)
        self.run.write_json(EVALUATIONS, rows)
        self.run.write_json(METADATA, {"pos": best["position"], "layer": best["layer"]})
        self.run.write_tensors(DIRECTION, {"direction": diffs_pld[best["position"], best["layer"]].astype(np.float32)})

    def projections(self, ledger: Ledger) -> None:
        """Every val prompt's residual at the last token along the direction, at each block's input."""
        direction, _ = self.direction()
        unit = np.asarray(direction / (np.linalg.norm(direction) + EPS), np.float32)
        along = {}
        for split in ("harmful_val", "harmless_val"):
            texts = self.instructions(split, kept_only=False)
            along[split] = np.zeros((len(texts), self.model.config.n_layers), np.float32)
            for index, batch in length_batches(self.model, texts, self.sizes.forward):
                values = project(self.model.decoder, *self.model.put(batch.tokens, batch.mask), unit)
                along[split][index] = np.asarray(values)[: len(index)]
                finite = np.isfinite(along[split][index]).all(axis=1)
                check_finite(finite, self.model.decoder.dtype, f"The projections of {split} cannot be read")
        self.run.write_tensors(PROJECTIONS, along)

    def completions(self, ledger: Ledger) -> None:
        prompts, generation = self.run.read_json(PROMPTS), self.config.generation
        sets = {side: prompts[f"{side}_test"] for side in ("harmful", "harmless", *self.over_refusal)}
        done = complete(
            self.model,
            sets,
            self.conditions,
            *self.direction(),
            max_new_tokens=generation.max_new_tokens,
            batch_size=self.sizes.generation,
            known=ledger.rows,
            save=ledger.append,
        )
        for condition, rows in done.items():
            self.run.write_json(self.completions_name(condition), rows)
        if REFUSAL_SCORE in self.config.judges:
            ids = [token["id"] for token in self.run.read_json(SETUP)["refusal_tokens"]]
            scores = score_replies(self.model, sets, self.conditions, *self.direction(), ids, self.sizes.forward)
            self.run.write_json(SCORES, {self.completions_name(c): values for c, values in scores.items()})

    def evaluations(self, ledger: Ledger) -> None:
        """What the judges say of the completions; judge models get the memory that the studied model had."""
        names = [self.completions_name(c) for c in self.conditions]
        completions = {name: self.run.read_json(name) for name in names}
        chat = self.chat
        judges = study_judges(self.config)
        if any(isinstance(judge, ModelJudge) for judge in judges):
            judges = study_judges(self.config, self.mesh)  # of all processes; without such a judge, one is here alone
            self.release()
        verdicts = judge_all(judges, completions, ledger.rows, ledger.append)
        if REFUSAL_SCORE in self.config.judges:
            for name, scores in self.run.read_json(SCORES).items():
                verdicts[name][REFUSAL_SCORE] = score_verdicts(scores)
        for name in names:
            self.run.write_json(evaluations_name(name), evaluate_completions(completions[name], verdicts[name]))
        stems = {name: stem_of(pathlib.PurePosixPath(name)) for name in names}
        found = tables(
            {stem: completions[name] for name, stem in stems.items()},
            {stem: verdicts[name] for name, stem in stems.items()},
            chat,
        )
        self.run.write_json(STATISTICS, found)
        self.run.write(TIDY, tidy_csv(found).encode("utf-8", "replace"))

    def loss(self, ledger: Ledger) -> None:
        """CE loss at baseline, under ablation and under -addition (paper, section 4.3 and appendix E), and how far these move the
        next-token distributions along the model's own answers to harmless prompts."""
        own = self.completions_name("harmless_baseline")
        answers = self.run.read_json(own) if self.run.exists(own) else []
        sets = loss_datasets(self.model, self.config.loss, answers)
        size, moved = self.sizes.loss, {}
        for name in ("baseline", "ablation", "actadd"):
            edits: Edits = intervention_edits(self.model, f"harmful_{name}", *self.direction())
            found = {
                title: measure_loss(self.model, rows, edits, size, f"{title}, {name}") for title, rows in sets.items()
            }
            self.run.write_json(f"loss_evals/{name}_loss_eval.json", found)
            if name != "baseline" and "on_distribution" in sets:
                moved[name] = measure_kl(self.model, sets["on_distribution"], edits, size, f"KL, {name}")
        self.run.write_json(DAMAGE, {"kl": moved})


@jax.jit
def project(decoder: Decoder, tokens_bt, mask_bt, edits: Edits, unit_d) -> jax.Array:
    """Last-token residual at each block's input, projected on `unit_d`; float32 `[B, L]`."""
    tapped = decoder.forward(tokens_bt, mask_bt, edits, Taps(("resid_pre",), 1)).taps["resid_pre"]
    along_bl = jnp.einsum("lbd,d->bl", tapped[:, :, 0].astype(jnp.float32), unit_d, precision="highest")
    return replicate(decoder.mesh, along_bl)
