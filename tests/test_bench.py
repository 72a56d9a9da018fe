"""The benchmark: what programs have to do, what was watched of them, ceilings, the table, and the comparison with PyTorch."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import forked, refused

from refusal_jax import UserError
from refusal_jax.chat import residuals
from refusal_jax.models import generate
from refusal_jax.plan.limits import parameters
from refusal_jax.plan.programs import Sizes
from refusal_jax.speed import ceilings, made_up, pytorch, table
from refusal_jax.speed.ceilings import Ceilings
from refusal_jax.speed.stages import STAGES, Bench, Task, Timed
from refusal_jax.speed.watch import Counted, Watched, counted, useful, watching
from refusal_jax.speed.work import Loops, Work, work_of

X, W = jnp.ones((4, 8)), jnp.ones((8, 8))
UNKNOWN = Loops()
ONCE = 2.0 * 4 * 8 * 8  # operations of X @ W
CEILINGS = Ceilings({"float32": 1e12, "float32 highest": 1e11}, 1e10, read=1e9, write=5e8)


def flops(function, *args, known=(), loops=UNKNOWN) -> float:
    return work_of(jax.jit(function).trace(*args).jaxpr, known, loops).total


def test_a_product_is_counted_as_the_compiler_counts_it():
    program = jax.jit(lambda x, w: x @ w).trace(X, W)
    compiled = program.lower().compile().cost_analysis()
    found = work_of(program.jaxpr)
    assert found == Work({"float32": compiled["flops"]}, compiled["bytes accessed"]) and found.total == ONCE
    assert work_of(jax.jit(lambda x: jnp.matmul(x, W, precision="highest")).trace(X).jaxpr).flops == {
        "float32 highest": ONCE
    }


def test_loops_count_as_often_as_they_run():
    def steps(x, low, high):
        return jax.lax.fori_loop(jnp.maximum(low, 1), high - 2, lambda _, x: x @ W, x)

    scanned = flops(lambda x: jax.lax.scan(lambda x, _: (x @ W, None), x, length=5)[0], X)
    assert scanned == 5 * ONCE and flops(steps, X, 0, 9, known=[None, 0, 9]) == 6 * ONCE
    assert flops(jax.jit(steps), X, 0, 9, loops=Loops(turns=4)) == 4 * ONCE  # not known: as told
    ends = flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ W, x), X, loops=Loops(turns=3))
    assert ends == 3 * ONCE


def test_choices_count_by_their_shares_and_experts_by_half_of_their_last_blocks():
    def chosen(x, kind):
        with jax.named_scope("mixer"):
            return jax.lax.switch(kind, [lambda x: x, lambda x: x @ W], x)

    assert flops(chosen, X, 0, loops=Loops(shares={"mixer": (0.25, 0.75)})) == 0.75 * ONCE
    assert flops(chosen, X, 0) == 0.5 * ONCE

    def blocks(x_smd, used):
        return jax.lax.fori_loop(0, used, lambda i, x: x.at[i].set(x[i] @ W), x_smd)

    assert flops(blocks, jnp.ones((10, 4, 8)), 3, loops=Loops(experts=4)) == 8 * ONCE


def test_padding_and_repeated_rows_are_not_useful():
    tokens, mask = np.arange(12).reshape(3, 4), np.array([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], bool)
    assert useful({"tokens_bt": tokens, "mask_bt": mask}) == 10 / 12
    tokens[2] = tokens[1]
    assert useful({"tokens_bt": tokens, "mask_bt": mask}) == 6 / 12
    assert useful({"decoder": None}) == 1


@pytest.fixture(scope="module")
def bench(model, tmp_path_factory) -> Bench:
    """The parts of a tiny model that need little time."""
    prompts = {
        f"{side}_{name}": ["Who", "Where is it?", "Why not"] for side in ("harmful", "harmless") for name in "ab"
    }
    prompts["test"] = ["Who are you?", "What"]
    scratch = tmp_path_factory.mktemp("bench")
    files = ceilings.weight_files(model.path)
    task = Task(lambda: model, model.path, files, prompts, Sizes(2, 2, 2, 2), 4, {}, 2, scratch)
    made = Bench(task, ("load", "extraction", "prefill", "decode"))
    made.run()
    return made


def test_what_a_model_computes_is_what_its_shape_says(bench, model):
    work, cfg = bench.timed["decode"].counted, model.config
    step = 2 * parameters(cfg, active=True) * 2  # operations of a token in each of 2 rows, besides attention and edits
    assert step * 3 < work.computed.total < step * 3 * 1.5 and work.calls["decode"] == 1
    assert 0.4 < bench.timed["extraction"].counted.useful.total / bench.timed["extraction"].counted.computed.total < 0.9
    assert bench.found.ids.shape == (2, 4) and set(bench.timed) == {"load", "extraction", "prefill", "decode"}
    assert bench.timed["load"].read == bench.task.files[0].stat().st_size


def test_nothing_is_watched_afterwards(bench):
    assert not isinstance(residuals.extract_batch, Watched) and not isinstance(generate.decode, Watched)
    with pytest.raises(ZeroDivisionError), watching() as calls:
        assert isinstance(residuals.extract_batch, Watched) and residuals.extract_batch.lower
        raise ZeroDivisionError
    assert not calls and not isinstance(residuals.extract_batch, Watched)
    assert counted([], bench.model.config) == Counted()


def test_rows_and_table(bench):
    rows = [table.row(name, bench.timed[name], CEILINGS) for name in bench.timed]
    shown, plain = table.table(rows, CEILINGS), json.loads(json.dumps(table.as_json(rows)))
    assert all(f"\n{name} " in shown for name in bench.timed) and "memory 10.0 GB/s; reading files 1.00 GB/s" in shown
    assert "activations: " in shown and "are kept for means" in shown
    keys = {"first_seconds", "seconds", "flops", "useful_flops", "bytes", "nearest", "share", "useful_share", "notes"}
    assert all(keys <= row.keys() for row in plain.values()) and plain["load"]["nearest"] == "disk"
    read = plain["extraction"]
    assert read["activations"] == read["prompt_tokens"] * bench.model.config.n_layers * bench.model.config.d_model
    assert math.isclose(read["activations_per_second"] * read["seconds"], read["activations"])
    assert plain["decode"]["new_tokens"] == 6


def test_the_nearest_limit_counts_and_surprises_are_marked():
    half = Counted(Work({"float32": 1e12, "float32 highest": 1e11}, 1e9), Work({"float32": 0.55e12}, 1e9))
    found = table.row("x", Timed(9, [4.0, 4.0, 4.0], half), CEILINGS)
    assert (found.nearest, found.share, found.useful_share, found.notes) == ("compute", 0.5, 0.25, ())
    quick = table.row("x", Timed(9, [1.0, 1.5, 1.0], half), CEILINGS)
    assert quick.notes[0].startswith("200% of the ceiling of compute: the ceiling may have been measured while")
    assert quick.notes[1].startswith("runs took 1.00 to 1.50 s: the machine was busy")
    memory = dataclasses.replace(half, computed=Work({"float32": 1.0}, 3e10))
    assert "may stay in a cache" in table.row("x", Timed(9, [1.0], memory), CEILINGS).notes[0]
    disk = table.row("x", Timed(9, [1.0], read=int(1e9), written=int(1e9)), CEILINGS)
    assert (disk.nearest, disk.share) == ("disk", 3) and "held the files in memory" in disk.notes[0]


def test_ceilings_are_of_all_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(ceilings, "SIDE", 64)
    monkeypatch.setattr(ceilings, "ARRAY_OF_HOST", 1 << 16)
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 20))
    found = ceilings.measure(["float32 highest"], jax.devices()[:2], [file], tmp_path)
    assert found.flops["float32 highest"] > 0 and min(found.memory, found.read, found.write) > 0
    assert ceilings.measure([], jax.devices()[:1], [], None).read == 0
    with pytest.raises(UserError, match=r"gone could not be written: .*Free space on the disk"):
        ceilings.writing(tmp_path / "gone", 8)


def test_a_shape_gets_weights(model):
    made = made_up.made_up(model.config, "bfloat16", None)
    assert jax.tree.map(jnp.shape, made.decoder.weights()) == jax.tree.map(jnp.shape, model.decoder.weights())
    assert made_up.shape_of("llama_3_8b").n_layers == 32
    assert made_up.shape_of("none") is made_up.shape_of("meta-llama/Meta-Llama-3-8B-Instruct") is None


def test_results_are_compared():
    row = {"position": -1, "layer": 2, "refusal_score": 1.0, "steering_score": None, "kl_div_score": 0.5}
    side = {"kept": {"a": ["x"]}, "rows": [row], "pick": [-1, 2], "seconds": {"extraction": 2.0, "selection": 4.0}}
    mine = side | {"first_seconds": {"extraction": 3.0, "selection": 9.0}}
    checks = pytorch.compare("extraction_selection", mine, side | {"rows": [row | {"refusal_score": 1.5}]})
    assert [check["ok"] for check in checks] == [True, True, False] and "5.0e-01 over the 2 of 3" in checks[2]["found"]
    shown = pytorch.table("extraction_selection", mine, side, checks)
    assert (
        "together            6.00         6.00   1.00x       12.00   0.50x" in shown and "FAIL scores within" in shown
    )
    mine, theirs = {"ids": [[1], [2]], "texts": ["a", "b"]}, {"ids": [[1], [3]], "texts": ["a", "b"]}
    checks = pytorch.compare("generation", mine, theirs)
    assert [(check["ok"], check["found"]) for check in checks] == [(False, "1 of 2 rows"), (True, "2 of 2 rows")]


def test_the_other_side_fails(bench, tmp_path):
    broken = tmp_path / "oracle.py"
    broken.write_text("import sys; sys.exit('no such thing')")
    with pytest.raises(UserError, match=r"exit code 1\. Leave it out .*--nopytorch`\), or see .*\nno such thing"):
        pytorch.run_oracle(broken, bench, "generation")
    assert "does not exist. The comparison is with" in pytorch.missing(tmp_path / "gone.py")


def test_the_job(llama, tmp_path):
    done = forked("bench", f"--model={llama}", "--stages=load", "--repeats=1", f"--out={tmp_path / 'bench.json'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["stages"]["load"]["runs"] and found["ceilings"]["read"] > 0 and found["dtype"] == "float32"
    assert "load" in done.stdout and "ceilings: memory" in done.stdout


@pytest.mark.parametrize(
    "flags,pattern",
    [
        (["--stages=lode"], rf"--stages=lode is not a list of {', '.join(STAGES)}\. Did you mean load"),
        (["--stages="], r"is not a list of load"),
        (["--oracle=gone.py"], r"gone\.py does not exist\. The comparison is with the PyTorch version"),
        (["--pytorch", "--dtype=bfloat16"], r"runs in float32 on one CPU: leave out --pytorch"),
        (
            ["--model=llama_3_8b", "--stages=load,decode"],
            r"--stages has load, which need a checkpoint's files, and llama",
        ),
        (["--model=llama_3_8b", "--inflate"], r"--inflate needs a checkpoint's files, and llama_3_8b is a shape"),
    ],
)
def test_errors(flags, pattern):
    refused(forked("bench", *flags), pattern)
