"""Times loading and exporting against plain reads and `cp` of the same files.

  JAX_PLATFORMS=cpu python tests/disk_speed.py [--model FOLDER] [--workdir FOLDER] [--times 3] [--prompts 2]

Without --model it makes a checkpoint of 1.7 GB in bfloat16 with four weight files, the embedded model inflated. "cold" is
after the kernel was told to forget the files, "warm" is from its page cache; what is written counts until it is on the disk.
Lines are medians of rounds in which everything is done once, and CPU seconds are of all threads. --model may be a GGUF file,
of which only loading is timed.
"""

import argparse
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

from refusal_jax.chat.model import demo_model_path
from refusal_jax.checkpoints.load import load_decoder
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.checkpoints.rewrite import Checkpoint
from refusal_jax.conditions import Ablate
from refusal_jax.directions import read_direction
from refusal_jax.export.finished import FinishedStudy
from refusal_jax.export.hf import Plan
from refusal_jax.export.run import Request, export
from refusal_jax.files import file_hash
from refusal_jax.organism.inflate import Shape, inflate

SHAPE = Shape(n_layers=16, d_model=2048, n_heads=64, n_kv_heads=16, d_mlp=5632, vocab_size=32000)
SHARD_BYTES = 512 << 20
CHUNK = 8 << 20


def forget(paths: list[pathlib.Path]) -> None:
    """Puts files on the disk, and out of the page cache."""
    for path in paths:
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def read(paths: list[pathlib.Path]) -> None:
    """Reads files to a buffer that is used again and again."""
    buffer = bytearray(CHUNK)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def load(model: pathlib.Path, dtype: str) -> None:
    jax.block_until_ready(load_decoder(model, dtype).weights())


def on_disk(folder: pathlib.Path) -> None:
    """Puts the files of a folder on the disk."""
    for path in folder.iterdir():
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def loading(model: pathlib.Path, paths: list[pathlib.Path]) -> dict[str, Callable]:
    """Returns what is timed of reading, by name."""
    kinds = {"read": lambda: read(paths)}
    kinds |= {f"load as {dtype}": lambda dtype=dtype: load(model, dtype) for dtype in ("bfloat16", "float32")}
    found = {}
    for name, work in kinds.items():

        def cold(work=work) -> float:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        found[f"{name}, cold"] = lambda cold=cold: (forget(paths), cold())[1]
        found[f"{name}, warm"] = cold
    return found


def writing(model: pathlib.Path, out: pathlib.Path, prompts: int) -> dict[str, Callable]:
    """Returns what is timed of writing, by name; each begins with files in the page cache, and without `out`."""
    checkpoint = Checkpoint.open(model)
    direction = out.with_name("direction.npy")
    np.save(direction, np.random.default_rng(0).normal(size=checkpoint.cfg.d_model).astype(np.float32))
    edit = Ablate(read_direction([direction]))
    plan, study = Plan.of(checkpoint, edit), FinishedStudy.none(max(prompts, 1))

    def timed(work: Callable) -> float:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        start = time.perf_counter()
        work()
        on_disk(out)
        return time.perf_counter() - start

    def written() -> None:
        out.mkdir()
        plan.write(out)

    found: dict[str, Callable] = {
        "cp": lambda: timed(lambda: subprocess.run(["cp", "-r", model, out], check=True)),
        "export, written and hashed": lambda: timed(written),
    }
    if prompts:
        found["export, whole"] = lambda: timed(lambda: export(Request(model, out, edit, study)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder or a GGUF file")
    parser.add_argument("--workdir", type=pathlib.Path, help="on the disk that is measured")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=2, help="of each side, for the verification; 0: no whole export")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.workdir) as temporary:
        work = pathlib.Path(temporary)
        if not asked.model:
            inflate(demo_model_path(), work / "model", SHAPE, "bfloat16", SHARD_BYTES)
        model = checkpoint_folder(asked.model or work / "model")
        paths = [pathlib.Path(asked.model)] if asked.model and asked.model.endswith(".gguf") else []
        ways: dict[str, Callable] = {}
        if not paths:
            paths = sorted(model.glob("*.safetensors"))
            ways |= writing(model, work / "out", asked.prompts)
        size = sum(path.stat().st_size for path in paths)
        ways = loading(model, paths) | ways
        start = cpu()
        file_hash(paths[0])
        print(f"{size / 1e9:.2f} GB; sha256 {paths[0].stat().st_size / 1e9 / (cpu() - start):.2f} GB/s on a core")
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(asked.times):
            for name, way in ways.items():
                before = cpu()
                seconds[name].append((way(), cpu() - before))
        for name, found in seconds.items():
            wall, used = (statistics.median(column) for column in zip(*found, strict=True))
            print(f"{name:<28}{wall:8.2f} s  {size / wall / 1e9:6.2f} GB/s  CPU {used:6.2f} s")


if __name__ == "__main__":
    main()
