"""The study, stage by stage, in one run's folder.

prompts -> activations -> selection -> projections, completions -> evaluations, loss -> report. Each stage reads and
writes files of the folder and nothing else, so that it can be skipped, resumed or redone alone.
"""

import dataclasses
import functools
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from refusal_jax import distributed
from refusal_jax.chat_model import ChatModel, demo_model_path, load_model, weights_dtype
from refusal_jax.data.prompts import BUNDLED, dataset_name, file_hash, read_prompts, resolve
from refusal_jax.edits import EPS, Edits
from refusal_jax.errors import UserError
from refusal_jax.models.attention import Context
from refusal_jax.models.config import load_config
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.mirror import checkpoint_folder
from refusal_jax.plan.planner import run_mesh, run_sizes
from refusal_jax.plan.programs import USUAL_LENGTH, Sizes, Workload
from refusal_jax.report.page import write_report
from refusal_jax.report.text import setup_lines
from refusal_jax.runs import Ledger, Run, checkpoint_fingerprint
from refusal_jax.sharding import replicate
from refusal_jax.study.activations import extract, length_batches
from refusal_jax.study.completions import complete, intervention_edits, parse_condition
from refusal_jax.study.judges import JUDGES, evaluate_completions
from refusal_jax.study.loss import loss_datasets, measure_loss, read_chat_pairs
from refusal_jax.study.refusal_tokens import Opening, measure_openings, refusal_openings
from refusal_jax.study.sampling import SPLITS, sample_prompts
from refusal_jax.study.selection import Rule, evaluate_candidates, pick
from refusal_jax.taps import Taps
from refusal_jax.templates import named_template

PROMPTS, SETUP, FILTER, MEANS = "prompts.json", "setup.json", "filter.json", "mean_diffs.safetensors"
EVALUATIONS, METADATA, DIRECTION = "direction_evaluations.json", "direction_metadata.json", "direction.safetensors"
PROJECTIONS, REPORT = "projections.safetensors", "report.html"


def run_study(config: ConfigDict, workdir: str | os.PathLike) -> Run:
    """Runs or continues the study of `config` in `workdir`; `worked` of the run names the stages that did work.

    workdir: a local folder or gs://BUCKET/FOLDER. Of several processes (`distributed.start`) all must call it alike.

    Raises UserError for anything wrong with config, model, data or folder, before long work where it can be known.
    """
    config = config.copy_and_resolve_references()
    check_settings(config)
    folder = checkpoint_folder(config.model) if config.model else demo_model_path()
    load_config(folder)
    inputs = {"model": checkpoint_fingerprint(folder)}
    for split in SPLITS:
        inputs[split] = _hash(resolve(config.data[split], split))
    template = [config.chat_template] if config.chat_template.endswith(".jinja") else []
    for file in (*config.loss.text_files, *config.loss.chat_files, *template):
        inputs[file] = _hash(pathlib.Path(file))
    settings = config.to_dict() | {"cache": ""}  # where copies are kept may change from run to run
    with Run.open(workdir, settings, inputs) as run:
        try:
            Study(config, run, folder).run_all()
        except UserError:
            if run.new and run.worked in ([], ["prompts"]):  # nothing was computed yet
                run.discard()
            raise
        return run


def check_settings(config: ConfigDict) -> None:
    """Raises UserError for settings and files that cannot work with any model."""
    if config.chat_template:
        named_template(config.chat_template)
    if not config.generation.conditions:
        raise UserError("--config.generation.conditions is empty: name at least one, such as harmful_baseline.")
    stems = ["on_distribution"]
    for read, files in ((read_prompts, config.loss.text_files), (read_chat_pairs, config.loss.chat_files)):
        for file in map(pathlib.Path, files):
            read(file)
            if file.stem in stems:
                raise UserError(f"two loss data sets are called {file.stem!r}: rename {file}.")
            stems.append(file.stem)
    for condition in config.generation.conditions:
        parse_condition(condition)
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
            raise UserError(f"--config.{name} = {value}, expected at least {least}.")
    if dataset_name(config.data.harmful_test) == "harmless":
        raise UserError(
            f"The harmful test prompts are in {config.data.harmful_test}, and results carry the file's name: they would be "
            "mixed up with those of the harmless prompts. Rename the file."
        )


def _hash(path: pathlib.Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} is not a file. Check the path in the config (data, loss or chat_template).")
    return file_hash(path)


def evaluations_name(completions: str) -> str:
    """The evaluations file that belongs to a completions file."""
    return completions.removesuffix("_completions.json") + "_evaluations.json"


@dataclasses.dataclass
class Study:
    """A config, its run's folder and the model, which is loaded when the first stage needs it."""

    config: ConfigDict
    run: Run
    folder: pathlib.Path

    def run_all(self) -> None:
        run = self.run
        completions = [self.completions_name(c) for c in self.config.generation.conditions]
        verdicts = [evaluations_name(name) for name in completions]
        losses = [f"loss_evals/{name}_loss_eval.json" for name in ("baseline", "ablation", "actadd")]
        picked = [METADATA, DIRECTION]
        run.stage("prompts", [], [PROMPTS], self.prompts, alone=True)
        run.stage("activations", [PROMPTS], [SETUP, FILTER, MEANS], self.activations)
        run.stage("selection", [PROMPTS, SETUP, FILTER, MEANS], [EVALUATIONS, *picked], self.selection)
        run.stage("projections", [PROMPTS, DIRECTION], [PROJECTIONS], self.projections)
        run.stage("completions", [PROMPTS, *picked], completions, self.completions)
        run.stage("evaluations", completions, verdicts, self.evaluations, alone=True)
        own = [name for name in completions if name.endswith("harmless_baseline_completions.json")]
        run.stage("loss", [*own, *picked], losses, self.loss)
        run.stage(
            "report",
            [SETUP, FILTER, MEANS, EVALUATIONS, *picked, PROJECTIONS, *verdicts, *losses],
            [REPORT],
            lambda _: write_report(run, verdicts),
            alone=True,
        )

    @functools.cached_property
    def model(self) -> ChatModel:
        devices = jax.devices()
        work = Workload(load_config(self.folder), weights_dtype(self.config.dtype), self.config, USUAL_LENGTH)
        mesh = run_mesh(work, self.config.mesh, devices)
        if distributed.several() and (mesh is None or mesh.size != jax.device_count()):
            raise UserError(
                f"The mesh has {1 if mesh is None else mesh.size} of the {jax.device_count()} devices of the "
                f"{jax.process_count()} processes, which must all take part. Make the product of --config.mesh.data, "
                f"--config.mesh.fsdp and --config.mesh.model {jax.device_count()}, or leave them all 0."
            )
        model = load_model(
            self.folder,
            self.config.dtype,
            mesh,
            progress=distributed.first(),
            chat_template=self.config.chat_template,
            thinking=self.config.thinking,
            cache=self.config.cache,
        )
        room = self.config.generation.max_new_tokens
        for split, rows in self.run.read_json(PROMPTS).items():
            longest = int(model.encode([row["instruction"] for row in rows]).mask.sum(axis=1).max())
            most = model.config.context_length - longest
            if split.endswith("test") and room > most:
                raise UserError(
                    f"--config.generation.max_new_tokens = {room} does not fit: the longest prompt of {split} has {longest} "
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
            if distributed.first():
                tqdm.write(f"Planning: {text}", file=sys.stderr)

        return run_sizes(work, self.model.mesh, jax.devices(), note)

    def completions_name(self, condition: str) -> str:
        side, intervention = parse_condition(condition)
        dataset = dataset_name(self.config.data.harmful_test) if side == "harmful" else "harmless"
        return f"completions/{dataset}_{intervention}_completions.json"

    def instructions(self, split: str, kept_only: bool = True) -> list[str]:
        rows = self.run.read_json(PROMPTS)[split]
        kept = self.run.read_json(FILTER)[split]["kept"] if kept_only else [True] * len(rows)
        return [row["instruction"] for row, keep in zip(rows, kept, strict=True) if keep]

    def direction(self) -> tuple[np.ndarray, int]:
        return self.run.read_tensors(DIRECTION)["direction"], self.run.read_json(METADATA)["layer"]

    def prompts(self, ledger: Ledger) -> None:
        self.run.write_json(PROMPTS, sample_prompts(self.config.data))

    def refusal_tokens(self) -> tuple[tuple[int, ...], list[Opening]]:
        """The ids of the refusal tokens and, where the config leaves them open, the openings they were chosen from."""
        if self.config.refusal_tokens:
            return self.model.chat.opener_ids(self.config.refusal_tokens), []
        harmful, harmless = (self.instructions(f"{side}_train", kept_only=False) for side in ("harmful", "harmless"))
        openings = measure_openings(self.model, harmful, harmless, self.sizes.forward)
        return refusal_openings(openings), openings

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
            "bundled_prompts": [split for split in SPLITS if self.config.model and self.config.data[split] == BUNDLED],
            "chat_template": chat.template_origin,
            "thinking": chat.thinking,
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
                f"--config.positions = {positions}, but the chat template puts {len(template)} tokens after the "
                f"instruction ({' '.join(chat.token_names(template))}). Choose 1 to {len(template)}."
            )
        refusal_ids, openings = self.refusal_tokens()
        setup = self.setup(positions, refusal_ids, openings)
        if distributed.first():
            tqdm.write("\n".join(setup_lines(setup)), file=sys.stderr)  # now: if it is not what was meant, stop
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
        self.run.write_tensors(PROJECTIONS, along)

    def completions(self, ledger: Ledger) -> None:
        prompts, generation = self.run.read_json(PROMPTS), self.config.generation
        done = complete(
            self.model,
            {side: prompts[f"{side}_test"] for side in ("harmful", "harmless")},
            generation.conditions,
            *self.direction(),
            max_new_tokens=generation.max_new_tokens,
            batch_size=self.sizes.generation,
            known=ledger.rows,
            save=ledger.append,
        )
        for condition, rows in done.items():
            self.run.write_json(self.completions_name(condition), rows)

    def evaluations(self, ledger: Ledger) -> None:
        for condition in self.config.generation.conditions:
            name = self.completions_name(condition)
            verdicts = {}
            for judge in JUDGES:
                verdicts |= evaluate_completions(self.run.read_json(name), judge)
            self.run.write_json(evaluations_name(name), verdicts)

    def loss(self, ledger: Ledger) -> None:
        """CE loss at baseline, under ablation and under -addition (paper, section 4.3 and appendix E)."""
        own = self.completions_name("harmless_baseline")
        sets = loss_datasets(
            self.model,
            self.config.loss,
            self.run.read_json(own) if self.run.exists(own) else [],
        )
        for name in ("baseline", "ablation", "actadd"):
            edits: Edits = intervention_edits(self.model, f"harmful_{name}", *self.direction())
            self.run.write_json(
                f"loss_evals/{name}_loss_eval.json",
                {
                    title: measure_loss(self.model, rows, edits, self.sizes.loss, f"{title}, {name}")
                    for title, rows in sets.items()
                },
            )


@jax.jit
def project(decoder: Decoder, tokens_bt, mask_bt, edits: Edits, unit_d) -> jax.Array:
    """Last-token residual at each block's input, projected on `unit_d`; float32 `[B, L]`."""
    ctx = Context.of_prompt(decoder.cfg, mask_bt)
    tapped = decoder.run(decoder.embed_tokens(tokens_bt), ctx, edits, Taps(("resid_pre",), 1))[1]["resid_pre"]
    along_bl = jnp.einsum("lbd,d->bl", tapped[:, :, 0].astype(jnp.float32), unit_d, precision="highest")
    return replicate(decoder.mesh, along_bl)
