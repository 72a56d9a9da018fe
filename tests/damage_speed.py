"""Times the grid of damage against editing weights and loading them for every setting.

  JAX_PLATFORMS=cpu python tests/damage_speed.py RUN [--settings 60] [--edited 6] [--prompts 64]

RUN is the folder of a finished study. Both ways measure the same on the same prompts: refusal scores of harmful prompts
and of harmless ones, the KL divergence of the next token, and the loss on the model's own answers. The grid's settings are
rows of compiled programs. The other way has three kinds. Within one process that has compiled everything, each setting's
weights are written, without any check, and loaded beside a tokenizer that is there already; or exported as the package
does, with its checks, and loaded as any folder. By commands, each setting is an export and then a process that loads and
measures. CPU seconds are of this process and of those that it starts, so that they mean something on a busy machine; wall
seconds do on a quiet one.
"""

import argparse
import dataclasses
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from refusal_jax.chat.loss_rows import LossRow, chat_rows
from refusal_jax.chat.model import ChatModel, demo_model_path, load_model
from refusal_jax.checkpoints.rewrite import Checkpoint
from refusal_jax.conditions import Ablate
from refusal_jax.damage.edited_rows import EditedRows
from refusal_jax.damage.partial import WRITTEN, Partial, edits_of
from refusal_jax.damage.places import places_of
from refusal_jax.directions import read_direction
from refusal_jax.edits import Edits
from refusal_jax.export.finished import FinishedStudy
from refusal_jax.export.partial import plan_of
from refusal_jax.export.run import Request, export
from refusal_jax.mechanism.edited_prompts import EditedPrompts
from refusal_jax.study.damage.settings import GridSettings

ROWS = 16  # of a batch, as the planner chooses on a CPU
SIDES = ("harmful", "harmless")


@dataclasses.dataclass
class Task:
    """The prompts and answers that are read, and the study that they are of."""

    folder: pathlib.Path
    model: pathlib.Path
    prompts: dict[str, list[str]]
    pairs: list[tuple[str, str]]
    ids: list[int]

    @classmethod
    def read(cls, folder: pathlib.Path, count: int) -> "Task":
        """Reads a finished study."""
        named = json.loads((folder / "manifest.json").read_text())["config"]["model"]
        splits = json.loads((folder / "prompts.json").read_text())
        prompts = {side: [row["instruction"] for row in splits[f"{side}_test"][:count]] for side in SIDES}
        answers = json.loads((folder / "completions" / "harmless_baseline_completions.json").read_text())[:count]
        ids = [token["id"] for token in json.loads((folder / "setup.json").read_text())["refusal_tokens"]]
        pairs = [(row["prompt"], row["response"]) for row in answers]
        return cls(folder, pathlib.Path(named) if named else demo_model_path(), prompts, pairs, ids)

    def rows(self, model: ChatModel) -> list[LossRow]:
        """Returns the model's own answers as rows."""
        return chat_rows(model.chat, self.pairs, model.config.context_length)


class Reader:
    """Reads what a model does under edits: scores and KL of prompts, and the loss on answers."""

    def __init__(self, task: Task, model: ChatModel):
        self.prompts = [EditedPrompts.build(model, task.prompts[side], ROWS, task.ids) for side in SIDES]
        self.rows = EditedRows.build(model, task.rows(model), ROWS)

    def of(self, model: ChatModel) -> np.ndarray:
        """Returns what another model does, in one pass of each batch, compared with the first one."""
        other = Reader.__new__(Reader)
        other.prompts = [dataclasses.replace(one, model=model) for one in self.prompts]
        other.rows = dataclasses.replace(self.rows, model=model)
        return other(Edits.none(model.config.d_model))[0]

    def __call__(self, edits: Edits) -> np.ndarray:
        """Returns the mean scores of both sides, the mean KL of harmless prompts and the loss by token, `[M, 4]`."""
        found = [one.read(edits) for one in self.prompts]
        loss = self.rows.losses(edits).sum(axis=1) / self.rows.tokens_n.sum()
        return np.stack([*(one.scores_mn.mean(axis=1) for one in found), found[1].kl_mn.mean(axis=1), loss], axis=1)


def seconds() -> np.ndarray:
    """Returns wall and CPU seconds, the latter with those of ended child processes."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)])


def timed(work: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Returns the wall and CPU seconds of work, and its result."""
    start = seconds()
    found = work()
    return seconds() - start, found


def settings(n_layers: int, count: int) -> list[Partial]:
    """Returns `count` partial ablations of the grid's default places that weights can hold."""
    own = GridSettings()
    places = [p for p in places_of(own.places, n_layers) if "resid_pre" not in p.sites]
    steps = -(-count // len(places))
    return [p.at(float(s)) for s in np.linspace(0, own.most, steps + 1)[1:] for p in places][:count]


def by_weights(task: Task, checkpoint: Checkpoint, reader: Reader, partial: Partial) -> np.ndarray:
    """Writes an ablation's weights, loads them, and reads them."""
    direction = read_direction([task.folder])
    with tempfile.TemporaryDirectory() as folder:
        plan_of(checkpoint, direction, partial.strengths(checkpoint.cfg.n_layers)).write(pathlib.Path(folder))
        return reader.of(load_model(folder, "float32", chat=reader.rows.model.chat))


def by_exports(task: Task, reader: Reader, strength: float) -> np.ndarray:
    """Exports an ablation as the package does, with its checks, card and hashes, loads the folder as any other, and reads it."""
    direction = read_direction([task.folder])
    edit = Ablate(direction, sites=WRITTEN, scale=strength)
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "edited"
        export(Request(task.model, out, edit, FinishedStudy.read(task.folder, 16)))
        return reader.of(load_model(out, "float32"))


def by_commands(task: Task, count: int, strength: float) -> np.ndarray:
    """Exports an ablation by the command, and reads the export in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(pathlib.Path(folder) / "edited")
        export = [
            "export",
            f"--direction={task.folder}",
            f"--out={out}",
            f"--scale={strength}",
            "--sites=attn_out,mlp_out",
        ]
        run = {"check": True, "capture_output": True, "text": True}
        subprocess.run([sys.executable, "-m", "refusal_jax.jobs.main", *export, f"--model={task.model}"], **run)
        done = subprocess.run(
            [sys.executable, __file__, str(task.folder), f"--prompts={count}", f"--only={out}"], **run
        )
        return np.array(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path)
    for name, default in (("settings", 60), ("edited", 6), ("commands", 2), ("prompts", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", help="measure this checkpoint and print the numbers")
    asked = parser.parse_args()
    task = Task.read(asked.run.resolve(), asked.prompts)
    if asked.only:
        edited = load_model(asked.only, "float32")
        print(json.dumps(Reader(task, edited)(Edits.none(edited.config.d_model))[0].tolist()))
        return
    model, checkpoint = load_model(task.model, "float32"), Checkpoint.open(task.model)
    partials = settings(model.config.n_layers, asked.settings)
    edits = edits_of(partials, read_direction([task.folder]).raw_jd, model.config.n_layers)
    compiling, reader = timed(lambda: Reader(task, model))
    compiling += timed(lambda: reader(edits.take([0])))[0]
    grid, found = timed(lambda: reader(edits))
    by_weights(task, checkpoint, reader, partials[0])  # compiles what the grid has not
    some = range(0, len(partials), max(len(partials) // asked.edited, 1))
    weights, edited = timed(lambda: [by_weights(task, checkpoint, reader, partials[m]) for m in some])
    print(f"{len(partials)} settings, {asked.prompts} prompts a side and as many answers; seconds as wall / CPU")
    print(f"{'compiling:':<44}{compiling[0]:8.3f} / {compiling[1]:.3f}")
    print(f"{'the grid, all settings:':<44}{grid[0]:8.3f} / {grid[1]:.3f}")
    print(f"{'the grid, a setting:':<44}{grid[0] / len(partials):8.3f} / {grid[1] / len(partials):.3f}")
    gap = np.abs(found[list(some)] - np.array(edited)).max()
    print(f"largest difference of a mean between both: {gap:.1e}")
    by_exports(task, reader, 0.5)
    ways = {"weights written and loaded": weights / len(some)}
    for name, work, times in (
        ("exported with checks and loaded", lambda: by_exports(task, reader, 0.5), asked.edited),
        ("by commands", lambda: by_commands(task, asked.prompts, 0.5), asked.commands),
    ):
        if times:
            ways[name] = timed(lambda work=work, times=times: [work() for _ in range(times)])[0] / times
    for name, cost in ways.items():
        wall, cpu = cost * len(partials) / grid
        print(f"{name + ', a setting:':<44}{cost[0]:8.3f} / {cost[1]:.3f}, {wall:.1f} / {cpu:.1f} times the grid's")


if __name__ == "__main__":
    main()
