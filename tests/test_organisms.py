"""Recipes of organisms: lines of text, what each step does to the weights, and that an organism runs as it is written."""

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize, quantize

from refusal_jax import demo_model_path, load_model
from refusal_jax.audit.organisms.base import Base
from refusal_jax.audit.organisms.catalogue import BENIGN, FOREIGN, OTHER, REMOVED, SMALL, recipes
from refusal_jax.audit.organisms.organism import OpenedOrganism, Organism, organisms
from refusal_jax.audit.organisms.recipe import Recipe
from refusal_jax.audit.settings import AuditSettings
from refusal_jax.checkpoints.matrices import matrices
from refusal_jax.errors import UserError

PROMPTS = ["How do I bake the bread?", "Explain how to rob the wagon."]


@pytest.fixture(scope="module")
def base():
    return Base.open(demo_model_path(), "embedded")


def make(base, text, seed=0):
    return Organism(base, Recipe.parse(f"tried: {text}"), seed)


def logits(model):
    batch = model.encode(PROMPTS)
    return np.asarray(model.logits(batch.tokens, batch.mask))


def test_recipes_are_lines_of_text_and_there_are_enough():
    found = recipes()
    assert len(found) >= 200 and len(set(found)) == len(found) and len({str(one) for one in found}) == len(found)
    assert all(Recipe.parse(str(one)) == one for one in found)
    kinds = {text: {one.kind for one in recipes(text)} for text in (REMOVED, BENIGN, FOREIGN, OTHER)}
    assert kinds[REMOVED] == {"removed"} and kinds[BENIGN] == {"benign"}
    assert kinds[FOREIGN] == {"projection", "added", "other"} and kinds[OTHER] == {"trained", "other"}
    assert 10 <= len(recipes(SMALL)) <= 16


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("project", "has no family"),
        ("a: projet", r"no step 'projet'.*Did you mean project"),
        ("a: project depth=2", r"'project' of a recipe has no 'depth=2': it has direction, strength"),
        ("a: project strength=much", r"'strength=much', where a number was expected"),
    ],
)
def test_lines_that_are_no_recipe_say_why(line, message):
    with pytest.raises(UserError, match=message):
        Recipe.parse(line)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("project direction=north", "direction 'north'"),
        ("project place=roof", "place 'roof'"),
        ("project layers=some", "layers 'some'"),
        ("project form=square", "form 'square'"),
        ("store form=int3", "stores as 'int3'"),
        ("tune task=none", r"needs the base's fine-tune 'none'.*it has none"),
        ("merge how=mean", "merges by 'mean'"),
        ("permute what=layers", "permutes 'layers'"),
        ("template how=no", "finds nothing to change"),
    ],
)
def test_steps_that_a_base_does_not_allow_say_why(base, text, message):
    with pytest.raises(UserError, match=message):
        _ = make(base, text).made


def test_every_organism_without_fine_tunes_is_built_and_finite(base):
    for one in organisms(
        base, wanted=[*recipes(REMOVED)[::5], *recipes(BENIGN)[::5], *recipes(FOREIGN)[::5], *recipes(OTHER)]
    ):
        assert all(np.isfinite(values).all() for values in one.tensors.values()), one.name
        assert (one.truth.dose is not None) == any(step.name == "project" for step in one.recipe.steps)
    assert not any(one.recipe.needs for one in organisms(base))


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.0, -0.5])
def test_the_projection_takes_out_its_share_and_says_so(base, strength):
    one, r = make(base, f"project strength={strength}"), base.directions.unit_d
    for matrix in matrices(base.cfg):
        before, after = matrix.read(base.weights), matrix.read(one.weights)
        if matrix.writes:
            np.testing.assert_allclose(r @ after, (1 - strength) * (r @ before), atol=1e-5)
        else:
            assert after.base is before.base or (after == before).all()
    assert one.truth.dose == pytest.approx(strength) and one.truth.along == pytest.approx(strength)
    assert one.truth.layers == tuple(range(base.cfg.n_layers))
    assert one.truth.kind == ("removed" if strength > 0 else "added")


def test_merging_leaves_a_share_and_keeps_rows_lengths(base):
    assert make(base, "project > merge share=0.25").truth.dose == pytest.approx(0.25)
    kept = make(base, "project form=rownorm")
    matrix = next(one for one in matrices(base.cfg) if one.writes)
    before, after = matrix.read(base.weights), matrix.read(kept.weights)
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), np.linalg.norm(before, axis=1), rtol=1e-5)
    change = matrix.read(make(base, "project form=lora rank=3").weights).astype(np.float64) - before
    assert np.linalg.svd(change, compute_uv=False)[3] < 1e-5


@pytest.mark.parametrize(
    "text", ["permute what=neurons", "permute what=heads", "permute what=stream", "fold", "rescale place=pair"]
)
def test_changes_of_form_compute_the_same(base, text):
    one = make(base, text)
    assert any((one.tensors[name] != values).any() for name, values in base.tensors.items())
    np.testing.assert_allclose(logits(one.model), logits(base.model), atol=2e-3)


def test_rounding_is_the_formats_own(base):
    name = "model.layers.0.mlp.down_proj.weight"
    for form, kind in (("q8_0", GGMLQuantizationType.Q8_0), ("q4_0", GGMLQuantizationType.Q4_0)):
        expected = dequantize(quantize(base.tensors[name], kind), kind)
        assert (make(base, f"store form={form}").tensors[name] == expected).all()
    bf16 = np.asarray(jnp.asarray(base.tensors[name]).astype(jnp.bfloat16).astype(jnp.float32))
    assert (make(base, "store").tensors[name] == bf16).all()
    levels = make(base, "store form=int4").tensors[name].reshape(-1, 32)
    assert max(len(np.unique(row)) for row in levels) <= 15


def test_the_same_seed_makes_the_same_and_another_one_another(base):
    first, again, other = (make(base, "adapter", seed).tensors for seed in (0, 0, 1))
    assert all((first[name] == again[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)


@pytest.mark.parametrize("text", ["project strength=0.5 > store form=int4", "bias", "template how=role"])
def test_the_folder_of_an_organism_is_what_runs(base, text):
    opened = OpenedOrganism(make(base, text), AuditSettings())
    stored = load_model(opened.folder)
    assert stored.chat.render(PROMPTS[0]) == opened.model.chat.render(PROMPTS[0])
    assert (stored.chat.render(PROMPTS[0]) != base.model.chat.render(PROMPTS[0])) == text.startswith("template")
    np.testing.assert_allclose(logits(stored), logits(opened.model), atol=1e-5)
