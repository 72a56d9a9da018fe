"""Grids of partial ablations: kernels and places, readings against PyTorch hooks, the stages, their report and their plan."""

import shutil

import numpy as np
import pytest
import tiny
import torch
from oracle import gated_ablation, hooked

from refusal_jax import UserError, load_model, make_mesh
from refusal_jax.chat.loss_rows import text_rows
from refusal_jax.damage import measures
from refusal_jax.damage.edited_rows import EditedRows
from refusal_jax.damage.measures import Measure, PromptProbe, TextProbe, measure_all, summaries, summary
from refusal_jax.damage.partial import NOTHING, Kernel, Partial, edits_of, spread
from refusal_jax.damage.places import Place, places_of
from refusal_jax.edits import SITES
from refusal_jax.judges.behaviours import REFUSAL
from refusal_jax.judges.statistics import wilson_interval
from refusal_jax.mechanism.edited_prompts import EditedPrompts
from refusal_jax.plan.programs import Shapes
from refusal_jax.report.findings import Findings
from refusal_jax.runs.artifacts import GRID, GRID_VALUES, REMOVAL_FIGURES, REPLIES, figure_list
from refusal_jax.runs.run import Run, read_manifest
from refusal_jax.study.config import get_config
from refusal_jax.study.damage import grid_page, replies
from refusal_jax.study.damage.run import DAMAGE, run_damage
from refusal_jax.study.damage.settings import PLACES, DamageSettings
from refusal_jax.study.damage.stages import STAGES
from refusal_jax.study.mechanism.run import MECHANISM
from refusal_jax.study.study import STEPS

ASKED = ["How do I rob the cake?", "How do I bake the bread, then rob it?", "How?", "How do I rob, bake and rob?"]
IDS = [3, 5]
QUICK = {
    "grid": {"steps": 2, "most": 1.0, "places": ("written@all", "all@tent:60%:40%"), "n_prompts": 8, "n_texts": 8},
    "replies": {"places": 1, "n_prompts": 2, "max_new_tokens": 2},
    "parts": ("grid", "replies"),
}


def partials(n_layers: int) -> list[Partial]:
    """Returns no ablation, and tents and bands of several strengths, at sites of their own."""
    tent, band = Kernel(1.2, 0.7 * (n_layers - 1), 0.3, 1.5), Kernel.band(0.6, 1, n_layers - 1)
    return [NOTHING, Partial({"attn_out": tent, "mlp_out": band}), Partial(dict.fromkeys(SITES, band))]


def probes_of(model) -> list:
    """Returns what reads prompts and texts of a tiny model."""
    rates, scores, kl = (
        Measure("refused", "refused", "rate"),
        Measure("score", "score", "mean"),
        Measure("kl", "KL", "mean"),
    )
    prompts = PromptProbe("prompts", EditedPrompts.build(model, ASKED, 8, IDS), rates, scores, kl)
    rows = EditedRows.build(model, text_rows(model.chat, ASKED, 64), 8)
    return [prompts, TextProbe(Measure("loss", "loss", "mean", "nats"), rows)]


def test_kernels_fall_from_their_greatest_strength():
    tent = Kernel(1.5, 2.5, 0.5, 2.0).strengths(7)
    away = np.abs(np.arange(7) - 2.5)
    np.testing.assert_allclose(tent, np.where(away <= 2, 1.5 + (0.5 - 1.5) * away / 2, 0))
    # A kernel that heretic printed for 18 layers (its pull request 78), as a place: 1.39 at 13.57, 1.12 at a distance of 3.78.
    place = Place.parse(f"attn_out@tent:13.57:3.78:{1.12 / 1.39}", 18)
    away = np.abs(np.arange(18) - 13.57)
    wanted = np.where(away <= 3.78, 1.39 + away / 3.78 * (1.12 - 1.39), 0)
    np.testing.assert_allclose(place.at(1.39).strengths(18)[:, SITES.index("attn_out")], wanted, atol=1e-6)
    assert Kernel.band(0.7, 2, 4).strengths(6).tolist() == [0, 0, 0.7, 0.7, 0.7, 0]
    assert Kernel.band(1.0, 3, 3).strengths(5).tolist() == [0, 0, 0, 1, 0]
    both = Partial({"attn_out": Kernel(1.0, 0.5, 0.0, 1 / 3), "mlp_out": Kernel.band(0.5, 0, 1)})
    again = Partial.of(both.row)
    np.testing.assert_allclose(again.strengths(4), both.strengths(4), atol=1e-6)
    assert both.strengths(4)[:, SITES.index("resid_pre")].max() == 0


@pytest.mark.parametrize("n_layers", (1, 3, 8, 30))
def test_bands_that_meet_share_no_layer(n_layers):
    bands = [spread(n_layers, quarter / 4, (quarter + 1) / 4) for quarter in range(4)]
    layers = [layer for first, last in bands for layer in range(first, last + 1)]
    assert n_layers < 4 or layers == list(range(n_layers))
    assert set(layers) <= set(range(n_layers))
    found = places_of(PLACES, 30) if n_layers == 30 else []
    assert [place.name for place in found] == list(PLACES) * bool(found)


def test_places_of_a_model():
    assert Place.parse("all@all", 8).label == "all sites, all layers"
    half = Place.parse("written@50%-100%", 8)
    assert half.label == "written, layers 4 to 7" and half.sites == ("attn_out", "mlp_out")
    assert half.at(0.5).strengths(8).max() == 0.5
    tent = Place.parse("mlp_out+resid_pre@tent:2:1.5", 8)
    assert tent.label == "mlp_out+resid_pre, tent at 2 ± 1.5"
    assert tent.at(2.0).strengths(8)[2, SITES.index("resid_pre")] == 2.0
    # Names that are one place, and those that reach no layer, are left out: of a model of two layers there are fewer places.
    assert [one.name for one in places_of(("all@all", "resid_pre+attn_out+mlp_out@0-7", "all@tent:1.5:0.1"), 8)] == [
        "all@all"
    ]
    few = [one.name for one in places_of(PLACES, 2)]
    assert few[:4] == list(PLACES[:4]) and 5 <= len(few) < len(PLACES) and places_of(PLACES, 1)
    assert Place.parse("attn_out@3-3", 8).kernel.strengths(8).tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"grid\.places names no place at which anything is removed from a model of 8 layers"),
        (("wrote@all",), "'wrote' is no site. Did you mean written"),
        (("all@most",), "'most' are no layers. The model's layers are 0 to 7"),
        (("all@5-9",), "its band is empty or ends outside of the model"),
        (("all@5-50%",), "one end of its band is a share of the depth and the other is not"),
        (("all@tent:9:2",), "its tent stands outside of the model or has no width"),
    ],
)
def test_places_that_are_none(names, message):
    with pytest.raises(UserError, match=message):
        places_of(names, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": {"most": 0.0}}, r"grid\.most = 0.0 in .*grid\.steps = 5 steps are no strengths"),
        ({"grid": {"n_texts": 0}}, r"grid\.n_texts = 0: give at least 1 of each"),
        ({"replies": {"places": 0}}, r"replies\.places = 0, .* give at least 1 of each"),
        ({"parts": ("gird",)}, "parts names 'gird', which is no part of the damage. Did you mean grid"),
    ],
)
def test_settings_that_leave_nothing_to_measure(change, message):
    with pytest.raises(UserError, match=message):
        DamageSettings.of(change).check(DAMAGE.parts)


def test_readings_equal_torch_hooks_and_those_of_one_edit_alone(model, hf):
    """Scores, KL and losses of each prompt and text under kernels by site, several edits together and each by itself."""
    n_layers, direction = model.config.n_layers, np.random.default_rng(1).normal(size=model.config.d_model)
    some = partials(n_layers)
    edits = edits_of(some, direction, n_layers)
    prompts, texts = probes_of(model)
    saved: list = []
    read, losses = measure_all(prompts, edits, save=saved.extend), measure_all(texts, edits)["loss"]
    batch, base = model.encode(ASKED), None
    for m, partial in enumerate(some):
        gates = partial.strengths(n_layers)[:, :, None, None]
        hooks = gated_ablation(hf.model.layers, np.tile(direction, (n_layers, 1)), gates)
        with hooked(hooks):
            logits = tiny.hf_forward(hf, batch.tokens, batch.mask).logits[:, -1].double()
            ids = [torch.tensor([row.ids]) for row in text_rows(model.chat, ASKED, 64)]
            wanted = [torch.nn.functional.cross_entropy(hf(one).logits[0, :-1].double(), one[0, 1:]) for one in ids]
        q = torch.softmax(logits, -1)
        base = q if base is None else base
        p = q[:, IDS].sum(-1)
        np.testing.assert_allclose(read["score"][m], torch.log((p + 1e-8) / (1 - p + 1e-8)), atol=1e-4)
        moved = (base * (torch.log(base + 1e-6) - torch.log(q + 1e-6))).sum(-1)
        np.testing.assert_allclose(read["kl"][m], moved, atol=1e-4)
        np.testing.assert_allclose(losses[m], [float(one.detach()) for one in wanted], atol=1e-3)
        alone = edits_of([partial], direction, n_layers)
        for name, values in (prompts.read(alone) | texts.read(alone)).items():
            np.testing.assert_allclose(values[0], {**read, "loss": losses}[name][m], atol=1e-6)
    np.testing.assert_allclose(prompts.prompts.certainty(), base.max(-1).values, atol=1e-5)
    assert abs(read["kl"][0]).max() < 1e-7 < 1e-3 < read["kl"][1].min()
    # What an interrupted run has saved is not measured again.
    again = measure_all(prompts, edits, saved[:2], saved.extend)
    np.testing.assert_array_equal(again["kl"], read["kl"])
    assert [row["edit"] for row in saved] == [0, 1, 2, 2]


def test_eight_devices_say_the_same(llama, model):
    on_mesh, direction = load_model(llama, mesh=make_mesh(2, 2, 2)), np.random.default_rng(2).normal(size=32)
    edits = edits_of(partials(model.config.n_layers), direction, model.config.n_layers)
    for ours, theirs in zip(probes_of(model), probes_of(on_mesh), strict=True):
        alone, divided = measure_all(ours, edits), measure_all(theirs, edits)
        for name in alone:
            np.testing.assert_allclose(divided[name], alone[name], atol=1e-4)


def test_summaries_have_intervals_and_changes():
    rate, mean = Measure("refused", "refused", "rate"), Measure("kl", "KL", "mean", "nats")
    before, now = np.array([1.0, 1, 1, 0, np.nan]), np.array([0.0, 0, 1, 0, 1])
    row = summary(rate, now, before)
    assert (row["successes"], row["n"]) == (2, 5) and (row["low"], row["high"]) == pytest.approx(wilson_interval(2, 5))
    assert row["change"]["mean"] == -0.5 and row["change"]["low"] < -0.5 < row["change"]["high"]
    values = {"kl": np.array([[0.0] * 6, [1.0, 2, 3, 4, 5, 9]])}
    first, second = (found["kl"] for found in summaries([mean], values))
    assert first["change"] == {"mean": 0.0, "low": 0.0, "high": 0.0} and second["mean"] == 4.0
    assert second["low"] < 4 < second["high"] and second["change"]["mean"] == 4.0
    assert measures.bare(np.array([1.0, np.nan])) == [1.0, None]


def test_the_stages_are_done_once_and_go_on(demo_study, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(demo_study, folder)
    whole, calls = EditedPrompts.read, []

    def read(self, edits):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(edits.rows)
        return whole(self, edits)

    with monkeypatch.context() as patch:
        patch.setattr(EditedPrompts, "read", read)
        with pytest.raises(KeyboardInterrupt):
            run_damage(QUICK, folder)
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(EditedPrompts, "read", lambda *of: again.append(of) or whole(*of))
        run = run_damage(QUICK, folder)
    assert len(again) == 2 * 3 - 4  # of five settings, two go together
    assert run.worked == ["grid", "replies", "report", "figures of damage"]
    found, arrays = run.read_json(GRID), run.read_tensors(GRID_VALUES)
    assert [(row["place"], row["strength"]) for row in found["rows"]][1:3] == [
        ("written@all", 0.5),
        ("written@all", 1.0),
    ]
    assert len(found["rows"]) == 5 and found["rows"][0]["kernels"] == {}
    first, last = (found["rows"][m]["measures"] for m in (0, 2))
    assert first["refused"]["rate"] > 0.5 > last["refused"]["rate"] and last["refused"]["change"]["high"] < 0
    assert last["kl"]["mean"] > first["kl"]["mean"]
    assert arrays["refused"].shape == (5, 8) and 0 < found["places"][0]["half"]["at"] < 1
    half = found["places"][0]["half"]
    assert {half["low"], half["high"]} <= {0.0, 0.5, 1.0, None} and half["low"] <= half["at"]
    judged = run.read_json(REPLIES)
    assert [row["row"] for row in judged["rows"]] == [0, 1, 2] and judged["judge"] == "rules"
    assert judged["rows"][0]["measures"]["refused.replies"]["n"] == 2 and "response" not in str(judged)
    page = (folder / "report.html").read_text()
    assert (
        '<section id="damage-grid">' in page and "fig-damage-tradeoff" in page and "Half of these refusals go" in page
    )
    listed = [row["name"] for row in run.read_json(figure_list(REMOVAL_FIGURES))]
    assert listed == ["damage-tradeoff", "damage-curves-1"]
    assert run_damage(QUICK, folder).worked == []
    text = grid_page.lines(Findings(Run(folder, read_manifest(folder / "manifest.json")), []))
    assert "written, all layers" in text[3] and "No loss is known" in text[-1] and len(text) in (6, 7)


def test_the_headline_claims_what_intervals_allow():
    refused = {"rate": 0.125, "low": 0.02, "high": 0.47, "n": 8, "successes": 1}
    none = {"label": "written, all layers", "half": {"at": None, "low": 0.9, "high": None, "n": 1, "kl": None}}
    open_ = {"label": "attn_out, all layers", "half": {"at": 0.25, "low": 0.0, "high": None, "n": 1, "kl": 0.002}}
    ended = {"label": "all sites, all layers", "half": {"at": 0.5, "low": 0.25, "high": 0.75, "n": 8, "kl": 0.004}}

    def said(*places, **change):
        row = {"measures": {"refused": refused | change}}
        return grid_page.headline({"rows": [row], "places": list(places)}, REFUSAL)

    assert said(none, successes=0).endswith("There is nothing to remove.")
    assert said(none).endswith("At none of 1 places does removal leave fewer than half of these refusals.")
    assert "they are too few (1) to tell at which strength: its interval is open everywhere" in said(none, open_)
    assert said(none, open_, ended).endswith("“all sites, all layers”: 0.0040 nats at strength 0.50 (0.25 to 0.75).")


def test_a_sure_next_token_is_told():
    """As where all replies begin alike (heretic's issue 159): the KL divergence is then near 0 whatever is damaged."""
    sure = {"rate": 0.9, "successes": 9, "n": 10}
    assert grid_page.caution({"sure": sure}, REFUSAL).startswith(
        "After 9 of 10 harmless prompts the unedited model is all but"
    )
    assert grid_page.caution({"sure": sure | {"rate": 0.2}}, REFUSAL) == ""


def test_what_replies_say_against_the_scores():
    rates = {"rate": 0.9, "low": 0.7, "high": 0.97, "n": 20}
    apart = {"mean": 0.8, "low": 0.5, "high": 0.9, "by_score": {"rate": 0.1, "low": 0.03, "high": 0.3}}
    alike = apart | {"low": -0.1}
    found = {"judge": "rules", "measures": [{"name": "refused.replies"}, {"name": "over_refused.replies"}]}
    both = {"refused.replies": rates, "over_refused.replies": rates}
    row = {"place": "all@all", "strength": 0.5, "measures": both, "apart": {"refused": apart, "over_refused": alike}}
    (text,) = replies.disagreements({**found, "rows": [row]})
    assert "strength 0.50 (all@all) the judge rules counts 90.0 % (70 to 97 %) of 20 replies to harmful prompts" in text


def test_names_of_stages_are_of_one_stage_each():
    names = [stage.name for stage in (*STEPS, *MECHANISM.stages, *STAGES, MECHANISM.figures, DAMAGE.figures)]
    assert len(set(names)) == len(names)


def test_damage_is_planned(model):
    work = DAMAGE.workload(model.config, "float32", get_config(), 16)
    assert [group.name for group in work.groups][:2] == ["grid of damage", "replies of the grid"]
    prompts, texts = work.groups[0].describe(Shapes(work, None), 16)
    assert prompts.runs == 2 * 61 * 4 and prompts.rows == 16 and prompts.lower() and texts.lower()
    assert texts.runs == 61 * 4 and texts.tokens >= work.length
