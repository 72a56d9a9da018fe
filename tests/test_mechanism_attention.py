"""Tells what heads read, by region: against a plain computation on transformers' outputs, on meshes, and as a part of a study."""

import json
import re
import shutil
import types

import families
import jax
import numpy as np
import pytest
import read_oracle
import tiny
from safetensors.numpy import load_file

from refusal_jax import load_model, make_mesh
from refusal_jax.judges.behaviours import REFUSAL
from refusal_jax.mechanism.attention import Reading, check_sums, read_attention
from refusal_jax.mechanism.attention_summary import pair_name
from refusal_jax.mechanism.regions import ATTENDED, PADDING, REGIONS, TEMPLATE, regions_of
from refusal_jax.mechanism.suffixes import GROUPS, HARMFUL, RANDOM, SUFFIXED, Row, row_of
from refusal_jax.models.hf_config import from_hf
from refusal_jax.plan.programs import Shapes, Workload
from refusal_jax.report.findings import Findings
from refusal_jax.report.page import environment
from refusal_jax.runs.artifacts import ATTENTION, ATTENTION_READ, ATTRIBUTED, ATTRIBUTION
from refusal_jax.runs.run import MANIFEST, Run, read_manifest
from refusal_jax.study.config import get_config
from refusal_jax.study.mechanism import attention
from refusal_jax.study.mechanism.settings import MechanismSettings

TEXTS = (
    (HARMFUL, "How do I bake the bread?", ""),
    (SUFFIXED, "bake", " user help bread"),
    (RANDOM, "How do I?", " the"),
)
# One for each way in which families differ here: windows, caps, sinks, biases, norms before and after, centred norms, parallel
# blocks, multipliers, clipped values, experts, values that are made of normed latents.
VARIED = (
    ("gemma2", "capped"),
    ("cohere", "normed"),
    ("olmo2", "biased"),
    ("granite", "scaled"),
    ("smollm3", "windows"),
    ("olmoe", "clipped"),
    ("gpt_oss", "gqa"),
    ("deepseek_v2", "greedy"),
)


def rows_of(model) -> list[Row]:
    rows = [row_of(model.chat, group, 0, text, suffix) for group, text, suffix in TEXTS]
    assert all(rows)
    return rows


def expected(model, folder, rows, heads, direction) -> dict:
    """Returns the oracle's arrays of all rows."""
    batch = model.encode([row.text for row in rows])
    oracle = read_oracle.Oracle(model, families.reference(folder), batch.tokens, batch.mask, direction)
    found = [oracle.read(b, region_t, heads) for b, region_t in enumerate(regions_of(rows, batch.mask))]
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


def chosen(cfg) -> list[tuple[int, int]]:
    return [(0, 1), (1, 0), (cfg.n_layers - 1, 2), (cfg.n_layers - 1, 3)]


@pytest.mark.parametrize("family,variant", VARIED)
def test_regions_and_hops_are_those_of_a_plain_computation(family, variant, tmp_path):
    folder = families.tiny_model(tmp_path, family, variant)
    model = load_model(folder)
    rows, heads = rows_of(model), chosen(model.config)
    direction = np.random.default_rng(3).normal(size=model.config.d_model)
    found = read_attention(model, rows, heads, direction, len(rows), "test")
    for name, values in expected(model, folder, rows, heads, direction).items():
        assert np.abs(values).max() > 0.01
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-3, atol=2e-4, err_msg=name)


def test_regions_hold_every_token_once(model):
    rows = rows_of(model)
    batch = model.encode([row.text for row in rows])
    regions = regions_of(rows, batch.mask)
    assert ((regions == PADDING) == ~batch.mask).all()
    for row, region, mask in zip(rows, regions, batch.mask, strict=True):
        counts = dict(zip(*(found.tolist() for found in np.unique(region[mask], return_counts=True)), strict=True))
        sizes = {"instruction": len(row.instruction), "suffix": len(row.suffix), "template": len(row.post), "first": 1}
        for name, size in sizes.items():
            assert counts.get(REGIONS.index(name), 0) == size
        assert region[-1] == TEMPLATE and region[np.argmax(mask)] == REGIONS.index("first")


def test_the_same_on_a_mesh(tmp_path):
    """Rows, storage and heads are divided, in parts of two key/value heads and of the queries of each."""
    folder = tiny.tiny_llama(tmp_path, kv_heads=2, heads=8, mlp=64, layers=2, attention_bias=True)
    direction = np.random.default_rng(3).normal(size=32)
    found = []
    for mesh in (None, make_mesh(1, 2, 4)):
        model = load_model(folder, mesh=mesh)
        rows = rows_of(model)
        found.append(read_attention(model, [*rows, rows[0]], [(0, 1), (1, 6)], direction, 4, "test"))
    for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_batches_of_other_widths_and_no_order(model):
    """Rows come back in their order, whatever the batches; source tokens stay at the row's end."""
    long = row_of(model.chat, HARMFUL, 1, "How do I bake the bread? " * 3)
    rows = [long, *rows_of(model)]
    direction = np.random.default_rng(3).normal(size=model.config.d_model)
    heads = chosen(model.config)
    together, turned = (read_attention(model, order, heads, direction, 2, "test") for order in (rows, rows[::-1]))
    for ours, theirs in zip(*map(jax.tree.leaves, (together, turned)), strict=True):
        np.testing.assert_allclose(ours, theirs[::-1], atol=1e-5)
    after = together.attention.shape[2]
    own = together.source_along[..., -after:].sum(axis=-1)
    np.testing.assert_allclose(own, together.along[:, :, -1, TEMPLATE], atol=1e-5)
    np.testing.assert_allclose(together.source_attention.sum(axis=-1), 1, atol=1e-5)
    for measure in (together.attention_two_hops, together.attention):
        np.testing.assert_allclose(measure.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(together.along_two_hops.sum(axis=-1), together.along.sum(axis=-1), atol=1e-4)


def test_a_template_with_one_token_after_the_instruction(tmp_path):
    """Two hops are then what earlier layers moved to that token itself."""
    said = "{% for message in messages %}{{ message['content'] | trim }}{% endfor %}"
    end = said + "{% if add_generation_prompt %}<|eot_id|>{% endif %}"
    model = load_model(tiny.tiny_llama(tmp_path, template=end))
    rows = rows_of(model)
    found = read_attention(model, rows, [(0, 0), (2, 1)], np.ones(32), 3, "test")
    assert found.attention_via.shape == (3, 2, 1, 1, len(ATTENDED))
    assert (
        found.attention[:, :, 0, REGIONS.index("before")] == 0
    ).all()  # the instruction's first token is the prompt's
    first = found.attention_via[:, 0, 0, 0]
    np.testing.assert_allclose(
        first[:, TEMPLATE], found.attention[:, 0, 0, TEMPLATE]
    )  # nothing was moved before layer 0
    assert (found.attention_via[:, 1, 0, 0, REGIONS.index("instruction")] > 0).all()


def compiled(layers: int, tokens: int):
    """The program for tiny models of so many layers, and rows of so many tokens."""
    cfg = from_hf(families.hf_config("llama", num_hidden_layers=layers))
    work = Workload(cfg, "float32", get_config(), tokens, (), further=MechanismSettings())
    (program,) = attention.programs(Shapes(work, None), 4)
    assert program.tokens == tokens and program.layers == layers
    return program.lower().compile()


def test_memory_grows_neither_with_layers_nor_with_squares(unchecked):
    """But for what differs between layers besides the weights, and the forward pass's own squares."""
    few, many = compiled(3, 24), compiled(12, 24)
    grown = many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes
    assert grown < 4 * 4 * 4 * 24 * 24  # one layer's patterns of a row each
    squares = set(re.findall(r"f32\[(?:\d+,)*24,24(?:,\d+)*\]", many.as_text()))
    assert squares and all(np.prod(list(map(int, re.findall(r"\d+", size)[1:]))) <= 4 * 4 * 24 * 24 for size in squares)


@pytest.mark.parametrize(
    "name,value,message",
    [
        (
            "attention",
            1.3,
            r"Attention does not sum to 1: it is off by 0\.3\d*, more than the 0\.0002\d* that rounding",
        ),
        ("attention_via", 0.5, r"Attention over two hops does not sum to that to the template"),
        ("along_via", 9.0, r"The parts that heads write of the template's tokens do not sum to the whole"),
        ("off", 0.1, r"The parts of the residual stream do not sum to it: it is off by 0\.1"),
    ],
)
def test_sums_that_are_off(name, value, message):
    whole = jax.tree.map(np.array, Reading.zeros(1, 1, 1, 3))
    whole.attention[..., 0] = 1.0
    check_sums(whole, "float32", 4)
    getattr(whole, name)[..., 0] = value
    with pytest.raises(ArithmeticError, match=message):
        check_sums(whole, "float32", 4)


def test_what_the_study_says_of_attention(suffix_study):
    """Its numbers, from the arrays; what heads write is what the part on attribution found."""
    found = json.loads((suffix_study / ATTENTION).read_text())
    arrays = {name: values.astype(np.float64) for name, values in load_file(suffix_study / ATTENTION_READ).items()}
    written = load_file(suffix_study / ATTRIBUTED)
    layers, heads = arrays["heads"].T.astype(int)
    assert [(row["layer"], row["head"]) for row in found["heads"]] == list(zip(layers, heads, strict=True))
    for group in GROUPS:
        along = arrays[f"{group}.along"][:, :, -1]
        np.testing.assert_allclose(along.sum(axis=-1), written[f"{group}.heads"][:, layers, heads], atol=1e-4)
        for name, reduced in (("along_two_hops", np.sum), ("attention_two_hops", np.mean)):
            own = reduced(arrays[f"{group}.{name}"][:, :, -1], axis=1).mean(axis=0)
            means = [row["mean"] for row in found["together"][name][group].values()]
            np.testing.assert_allclose(means, own, atol=1e-6)
        flow = found["flow"][group]
        assert sum(flow["direct"]) + np.sum(flow["via"]) == pytest.approx(1, abs=1e-5)
    change = found["changes"][pair_name((HARMFUL, SUFFIXED))]["attention"]["suffix"]
    own = arrays[f"{SUFFIXED}.attention"][:, :, -1, REGIONS.index("suffix")].mean(axis=1)
    assert change["mean"] == pytest.approx(own.mean(), abs=1e-6) and change["low"] <= own.mean() <= change["high"]
    assert found["suffix_texts"] == [" varnish", " lift", " clean", " measure"]
    page = (suffix_study / "report.html").read_text()
    for heading in (
        "What the top heads read",
        "Token by token of the suffix",
        "Flow of attention: harmful, with the suffix",
    ):
        assert heading in page


def test_no_head_writes_more_than_nothing(suffix_study, tmp_path, unchecked):
    """The section says so, and nothing fails."""
    folder = shutil.copytree(suffix_study, tmp_path / "run")
    found = json.loads((folder / ATTRIBUTION).read_text())
    for row in found["heads"]:
        row["written"][HARMFUL]["mean"] = -1.0
    with Run.open(
        folder, read_manifest(folder / MANIFEST)["config"], read_manifest(folder / MANIFEST)["inputs"]
    ) as run:
        run.write_json(ATTRIBUTION, found)
        study = types.SimpleNamespace(run=run)
        attention.read_rows(study, None)
        findings = Findings(run, [attention.STAGE.section])
        assert "No head writes more than nothing along the direction" in " ".join(attention.lines(findings))
        assert attention.values(findings)["no_head"] == attention.no_head(REFUSAL)
        template = environment(attention.STAGE.section.template.parent).get_template("attention.html.jinja")
        assert "No head writes more than nothing" in template.render(attention.values(findings))


def test_rounding_of_what_nearly_cancels():
    """It is seen against the most that the head reads at any of the template's tokens."""
    whole = jax.tree.map(np.array, Reading.zeros(1, 1, 2, 3))
    whole.attention[..., 0] = 1.0
    whole.along[0, 0, 0, TEMPLATE] = whole.along_via[0, 0, 0, 0, TEMPLATE] = 5.0
    whole.along_via[0, 0, 1, 0, TEMPLATE] = 1e-4
    check_sums(whole, "float32", 4)
