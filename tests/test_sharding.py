"""Where arrays are placed on a mesh, and what communication that costs the compiled programs."""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from refusal_jax import Edits, UserError, load_model, make_mesh
from refusal_jax.models import sharding
from refusal_jax.models.generate import decode
from refusal_jax.models.sharding import constrain, kept_axes, kept_sharding, residual_axes, split_for, weight_place
from refusal_jax.models.weight import Weight
from refusal_jax.plan.hlo import collectives
from refusal_jax.plan.programs import Shapes
from refusal_jax.study.config import get_config
from refusal_jax.study.scoring import score_edits
from refusal_jax.study.study import workload

HEAD = 16


def spec(ways: int, kv_heads: int, queries: int, axis: str = "heads"):
    """Of a query or key projection over `ways` chips."""
    heads = (kv_heads, queries) if axis == "heads" else (kv_heads, 1)
    weight = Weight((2, math.prod(heads) * HEAD, 32), ("layers", axis, "embed"), 1.0, heads)
    return weight_place(split_for(make_mesh(model=ways), kv_heads), weight)[1].spec


@pytest.mark.parametrize(
    "ways,kv_heads,queries,q,k",
    [
        (4, 8, 2, ("kv", "q"), "kv"),  # as many ways as divide the key/value heads
        (8, 2, 4, ("kv", "q"), "kv"),  # more ways than those: the rest divides their queries
        (8, 1, 8, ("kv", "q"), "kv"),
        (8, 4, 3, "kv", "kv"),  # three queries do not divide by two
        (8, 12, 1, "kv", "kv"),  # 12 heads of their own divide by 4 only
        (5, 4, 2, "kv", "kv"),  # by nothing: replicated (`kv` has one way)
    ],
)
def test_heads_are_divided_but_never_cut(ways, kv_heads, queries, q, k):
    assert spec(ways, kv_heads, queries)[1] == q
    assert spec(ways, kv_heads, queries, "kv_heads")[1] == k


def test_a_vocabulary_that_does_not_divide_gets_rows():
    mesh = split_for(make_mesh(model=8), 2)
    shape, place = weight_place(mesh, Weight((49155, 32), ("vocab", "embed"), 1.0))
    assert shape == (49160, 32) and place.spec[0] == ("kv", "q")


def test_two_axes_on_one_mesh_axis_are_an_error(monkeypatch):
    monkeypatch.setitem(sharding.RULES, "embed", ("kv",))
    with pytest.raises(ValueError, match=r"a mesh axis can hold only one"):
        weight_place(split_for(make_mesh(model=8), 8), Weight((64, 32), ("mlp", "embed"), 1.0))


@pytest.mark.parametrize(
    "batch,length,rows,tokens",
    [
        (16, 7, ("data", "fsdp", "kv", "q"), ()),
        (2, 8, ("data", "fsdp"), ("kv", "q")),  # too few rows: the tokens of each
        (2, 7, ("data", "fsdp"), ()),
        (1, 8, (), ("kv", "q")),
    ],
)
def test_the_residual_is_divided_among_all_chips(batch, length, rows, tokens):
    assert residual_axes(split_for(make_mesh(2, 1, 4), 2), batch, length) == (rows, tokens)


@pytest.mark.parametrize(
    "rows,heads,held",
    [
        (16, 4, (("data", "fsdp", "q"), ("kv",))),  # two chips have the same heads, each of half the rows
        (16, 1, (("data", "fsdp", "kv", "q"), ())),  # one head, such as a latent: the rows among all
        (2, 4, (("data", "fsdp"), ("kv",))),  # a row for each part of the batch: nothing to share out
        (16, 8, (("data", "fsdp", "q"), ("kv",))),
    ],
)
def test_what_decoding_keeps_is_on_no_two_chips(rows, heads, held):
    mesh = split_for(make_mesh(2, 1, 4), 2)
    assert kept_axes(mesh, rows, heads) == held
    shape = (3, rows, heads, 5, 7)
    assert kept_sharding(mesh, shape).spec == P(None, *(axes or None for axes in held))
    assert kept_sharding(None, shape).is_fully_addressable


def test_decoding_exchanges_queries_and_no_cache(wide):
    """Every layer moves queries to the chips that keep their keys, and what they find back; nothing as large as a layer's cache
    moves."""
    decoder, steps = load_model(wide, mesh=make_mesh(1, 1, 8)).decoder, get_config()
    cfg = decoder.cfg
    shapes = Shapes(workload(cfg, "float32", steps, LENGTH), decoder.mesh)
    state, count = shapes.generation(ROWS), shapes.array((), jnp.int32)
    found = collectives(decode.lower(shapes.decoder, state, count, count, eos_ids=(0,)).compile().as_text())
    exchanged = [i for i in found if i.kind == "all-to-all"]
    assert sum(i.times for i in exchanged) == 2 * cfg.n_layers
    queries = 4 * ROWS * cfg.n_heads * cfg.head_dim // 4  # of the key/value head of two chips
    assert all(i.bytes <= queries for i in exchanged)
    kept = 4 * ROWS * shapes.work.slots * cfg.n_kv_heads * cfg.head_dim
    assert max(i.bytes for i in found) < kept / 8
    gathered = [i.times for i in found if i.kind == "all-gather" and i.bytes == 4 * ROWS * cfg.d_model]
    assert sum(gathered) == 2 * cfg.n_layers + 1  # and what the logits are made of


def test_splitting_a_mesh_twice_changes_nothing():
    mesh = split_for(make_mesh(2, 1, 4), 2)
    assert split_for(mesh, 3) is mesh and dict(mesh.shape) == {"data": 2, "fsdp": 1, "kv": 2, "q": 2}
    assert split_for(None, 2) is None


def test_meshes_over_slices_keep_slices_apart():
    class Device:
        platform = "tpu"

        def __init__(self, index):
            self.slice_index = index

    with pytest.raises(UserError, match=r"cannot be laid over 2 slices: make mesh.data a multiple of 2"):
        make_mesh(1, 1, 4, [Device(i // 2) for i in range(4)])


def test_constraints_without_a_mesh_do_nothing():
    x = jnp.ones((2, 3))
    assert constrain(None, x, "batch") is x


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A tiny model whose vocabulary, widths and layers are all of different sizes."""
    import tiny

    return tiny.tiny_llama(tmp_path_factory.mktemp("wide"), kv_heads=4, heads=8, mlp=96, layers=3)


ROWS, LENGTH = 16, 24


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 1, 4), (1, 1, 8), (2, 2, 2), (1, 8, 1)])
def test_selection_communicates_what_it_must_and_no_more(wide, mesh):
    """Kinds and sizes of the collectives of the compiled step: per layer, what enters attention and MLP is gathered and what
    leaves them is scattered, on a mesh with tensor parallelism; weights are gathered one layer at a time and only along
    `fsdp`; nothing else is larger than a row of logits a prompt."""
    decoder = load_model(wide, mesh=make_mesh(*mesh)).decoder
    cfg, config = decoder.cfg, get_config()
    shapes = Shapes(workload(cfg, "float32", config, LENGTH), decoder.mesh)
    inputs = *shapes.prompts(ROWS), shapes.edits(1, None), shapes.logits(ROWS)
    ids = shapes.array((1,), jnp.int32)
    found = collectives(score_edits.lower(shapes.decoder, None, *inputs, ids).compile().as_text())
    data, fsdp, model = mesh
    activation = (ROWS // (data * fsdp), LENGTH, cfg.d_model)
    scattered = (ROWS // (data * fsdp * model), LENGTH, cfg.d_model)
    kinds = Counter()
    small = 4 * ROWS * max(cfg.d_model, 4 * len(jax.devices()))
    for i in found:
        shape = next(iter(i.shapes))[1]
        if shape in (activation, scattered) and i.times == cfg.n_layers:
            kinds[i.kind] += 1
        elif fsdp > 1 and i.kind == "all-gather" and i.times == cfg.n_layers:
            assert i.bytes <= 4 * cfg.d_model * cfg.d_mlp  # one weight of one layer
        elif i.times == 1 and i.bytes <= 4 * math.prod(activation):
            assert shape[0] != cfg.vocab_size  # the embedding's rows, once
        elif i.times == 1 and fsdp > 1 and i.kind == "all-gather":
            assert i.bytes <= 4 * cfg.vocab_size * cfg.d_model // model  # the unembedding
        else:
            assert i.bytes <= small, (i.kind, i.shapes, i.times)
    if model > 1:
        assert kinds["all-gather"] == 2 and kinds["reduce-scatter"] == 2 and not kinds["all-reduce"], kinds
    else:
        assert not kinds, kinds


def test_placed_for_several_uses_arrays_are_the_same(wide):
    """The same numbers, whatever the mesh, with edits of many rows and a vocabulary of padded rows."""
    base = load_model(wide)
    batch = base.encode(["bake", "help with that bread", "how"])
    edits = Edits.ablate(np.random.default_rng(0).normal(size=base.config.d_model))
    expected = np.asarray(base.logits(batch.tokens, batch.mask, edits))
    for mesh in ((3, 1, 1), (1, 1, 5), (1, 3, 2)):
        other = load_model(wide, mesh=make_mesh(*mesh)).logits(batch.tokens, batch.mask, edits)
        assert other.shape == expected.shape
        np.testing.assert_allclose(np.asarray(other), expected, rtol=1e-4, atol=1e-4)


def test_specs_of_whole_models():
    """Everything that tensor parallelism can divide is divided; norms are everywhere."""
    mesh = split_for(make_mesh(1, 2, 4), 4)
    assert weight_place(mesh, Weight((3, 32), ("layers", "norm"), None))[1].spec == P(None, None)
    assert weight_place(mesh, Weight((3, 96, 32), ("layers", "mlp", "embed"), 1.0))[1].spec == P(
        None, ("kv", "q"), "fsdp"
    )
