"""The whole method against the plain PyTorch version of it, number by number.

Both see the same checkpoint and the same prompts. The random model has no refusal direction, so refusal tokens and
thresholds are chosen such that some prompts pass the filter and some candidates the rule; what is compared does not
depend on that. The embedded model, once more, with the paper's own settings.
"""

import dataclasses

import numpy as np
import pytest
import safetensors
import tiny
import torch
from oracle import Oracle

from refusal_jax import Edits, UserError, demo_model_path, load_model
from refusal_jax.chat.loss_rows import chat_rows, text_rows
from refusal_jax.chat.residuals import extract
from refusal_jax.checkpoints.tensor_files import INDEX
from refusal_jax.data.sampling import sample_prompts
from refusal_jax.organism.inflate import Shape, inflate, source_layers
from refusal_jax.study.config import get_config
from refusal_jax.study.loss import measure_losses
from refusal_jax.study.selection import Rule, evaluate_candidates, pick

pytestmark = pytest.mark.usefixtures("beginnings_shared")
WORDS = ("bake", "steal", "paint", "a red boat", "the neighbour's old bicycle", "bread", "9 nails", "my very long poem")
PROMPTS = [f"{start} {a} and {b}?" for start in ("Why", "Tell me how to") for a in WORDS for b in WORDS]
SPLITS = ("harmful_train", "harmless_train", "harmful_val", "harmless_val")
SCORES = ("refusal_score", "steering_score", "kl_div_score")
LOOSE = {"kl_threshold": 0.3, "induce_threshold": -0.4}
SMALL = Shape(n_layers=5, d_model=45, n_heads=9, n_kv_heads=3, d_mlp=64, vocab_size=400)


@dataclasses.dataclass
class Pair:
    """One checkpoint, in both; the prompts by split; what both make of them, and the picked direction."""

    model: object
    oracle: Oracle
    prompts: dict[str, list[str]]
    thresholds: dict[str, float]

    def __post_init__(self):
        self.positions = len(self.oracle.template_ids)
        self.theirs = self.oracle.extract(self.prompts)
        self.ours = {
            split: extract(self.model, rows, self.oracle.refusal_ids, self.positions, _sign(split), 16, split)
            for split, rows in self.prompts.items()
        }
        self.diffs_lpd = self.ours["harmful_train"].mean_lpd - self.ours["harmless_train"].mean_lpd
        self.rows, self.best = self.oracle.select(self.theirs, **self.thresholds)
        self.direction = self.theirs.mean_diffs[self.best["position"], self.best["layer"]].numpy()

    def select(self, full_grid: bool) -> tuple[list[dict], dict]:
        """What this package makes of the candidates."""
        kept = self.theirs.kept
        rule = Rule(self.model.config.n_layers, **self.thresholds)
        rows = evaluate_candidates(
            self.model,
            self.diffs_lpd,
            kept["harmful_val"],
            kept["harmless_val"],
            self.oracle.refusal_ids,
            rule,
            full_grid=full_grid,
            batch_size=16,
        )
        return rows, pick(rows, rule)

    def intervention(self, name: str):
        """(edits, hooks) of a named one."""
        layer = self.best["layer"]
        if name == "ablation":
            return Edits.ablate(self.direction), self.oracle.ablation(self.direction)
        if name == "baseline":
            return None, []
        scale = 1.0 if name == "addition" else -1.0
        return Edits.add(self.direction, layer, scale), self.oracle.addition(self.direction, layer, scale)


def _sign(split: str) -> int:
    return 1 if split.startswith("harmful") else -1


def random_pair(folder) -> Pair:
    """Of a random checkpoint; half of the vocabulary counts as refusal, so that the filter splits the prompts."""
    vocab = len(load_model(folder).chat.tokenizer)
    order = np.random.default_rng(6).permutation(len(PROMPTS))
    rows = [[PROMPTS[i] for i in part] for part in np.split(order[:72], (24, 48, 60))]
    oracle = Oracle(str(folder), refusal_ids=list(range(0, vocab, 2)))
    return Pair(load_model(folder), oracle, dict(zip(SPLITS, rows, strict=True)), LOOSE)


def demo_pair() -> Pair:
    """The embedded model with the paper's thresholds, on fewer prompts."""
    data = get_config().data
    data.n_train, data.n_val, data.n_test = 32, 16, 1
    drawn = sample_prompts(data)
    prompts = {split: [row["instruction"] for row in drawn[split]] for split in SPLITS}
    folder = demo_model_path()
    return Pair(load_model(folder), Oracle(str(folder)), prompts, {"kl_threshold": 0.1, "induce_threshold": 0.0})


HAS_DEMO = (demo_model_path() / "config.json").exists()


@pytest.fixture(scope="module")
def random_model(llama):
    return random_pair(llama)


@pytest.fixture(scope="module", params=["random", "demo"] if HAS_DEMO else ["random"])
def pair(request):
    return request.getfixturevalue("random_model") if request.param == "random" else demo_pair()


def test_filter_and_means(pair):
    for split, rows in pair.prompts.items():
        np.testing.assert_allclose(pair.ours[split].scores, pair.theirs.scores[split], atol=1e-4)
        kept = [row for row, keep in zip(rows, pair.ours[split].kept, strict=True) if keep]
        assert kept == pair.theirs.kept[split]
        assert kept
    np.testing.assert_allclose(np.swapaxes(pair.diffs_lpd, 0, 1), pair.theirs.mean_diffs.numpy(), atol=2e-5)


def test_template_tokens_agree(pair):
    assert pair.model.chat.post_instruction_ids == tuple(pair.oracle.template_ids)


def test_every_score_of_the_full_grid(pair):
    ours, best = pair.select(full_grid=True)
    assert [(row["position"], row["layer"]) for row in ours] == [(r["position"], r["layer"]) for r in pair.rows]
    for key in SCORES:
        np.testing.assert_allclose([row[key] for row in ours], [row[key] for row in pair.rows], atol=1e-3, err_msg=key)
    assert (best["position"], best["layer"]) == (pair.best["position"], pair.best["layer"])


def test_the_lazy_selection_picks_the_same(pair):
    ours, best = pair.select(full_grid=False)
    assert (best["position"], best["layer"]) == (pair.best["position"], pair.best["layer"])
    assert sum(row[key] is None for row in ours for key in SCORES) > len(ours) // 2
    for row, full in zip(ours, pair.rows, strict=True):
        for key in SCORES:
            assert row[key] is None or abs(row[key] - full[key]) < 1e-3


@pytest.mark.parametrize("name", ["baseline", "ablation", "addition", "subtraction"])
def test_logits_and_replies(pair, name):
    edits, hooks = pair.intervention(name)
    texts = pair.prompts["harmful_val"][:6] + pair.prompts["harmless_val"][:6]
    batch = pair.model.encode(texts)
    logits = pair.model.logits(batch.tokens, batch.mask, edits)
    np.testing.assert_allclose(logits, pair.oracle.logits(texts, hooks), atol=1e-4)
    assert pair.model.generate(texts, 24, edits) == pair.oracle.generate(texts, hooks, 24)


@pytest.mark.parametrize("name", ["baseline", "ablation", "subtraction"])
def test_loss(pair, name):
    edits, hooks = pair.intervention(name)
    edits = edits or Edits.none(pair.model.config.d_model)
    # The space keeps the random model's tokenizer from splitting the template's "\n\n" differently before a letter.
    pairs = [
        (text, " Sure, here is how to do it." * (i + 1)) for i, text in enumerate(pair.prompts["harmless_val"][:5])
    ]
    plain = [text for row in pairs for text in row]
    for ours, theirs in (
        (chat_rows(pair.model.chat, pairs, 200), pairs),
        (text_rows(pair.model.chat, plain, 200), plain),
    ):
        (found,), _ = measure_losses(pair.model, ours, edits, 4, name)
        loss, count = pair.oracle.loss(theirs, hooks)
        assert found["n_tokens"] == count
        assert abs(found["ce_loss"] - loss) < 1e-4


def test_inflated_model_computes_the_same(llama, random_model, tmp_path):
    """Wider, deeper, with more query heads for each key head, in several files; and so in both implementations."""
    config = inflate(llama, tmp_path / "big", SMALL, shard_bytes=60_000)
    assert len(list((tmp_path / "big").glob("*.safetensors"))) > 2 and (tmp_path / "big" / INDEX).exists()
    assert (config.n_layers, config.queries_per_kv) == (5, 3)
    small, big = random_model.model, load_model(tmp_path / "big")
    batch = small.encode(PROMPTS[:8])
    before, after = (np.asarray(model.logits(batch.tokens, batch.mask)) for model in (small, big))
    np.testing.assert_allclose(after[:, : before.shape[1]], before, rtol=2e-6, atol=1e-5)
    assert after[:, before.shape[1] :].max() < before.min() - 100
    np.testing.assert_allclose(Oracle(str(tmp_path / "big")).logits(PROMPTS[:8]), after, rtol=1e-5, atol=1e-4)


def test_inflated_model_has_the_same_scores(llama, random_model, tmp_path):
    """The picked direction, wider and at the layer that its own became."""
    inflate(llama, tmp_path / "big", SMALL)
    big, best = load_model(tmp_path / "big"), random_model.best
    layer = next(new for new, old in source_layers(3, 5).items() if old == best["layer"])
    directions_lpd = np.zeros((SMALL.n_layers, 1, SMALL.d_model))
    directions_lpd[layer, 0, : len(random_model.direction)] = random_model.direction
    kept, rule = random_model.theirs.kept, Rule(SMALL.n_layers, np.inf, -np.inf, 0.0)
    sets = kept["harmful_val"], kept["harmless_val"], random_model.oracle.refusal_ids
    row = evaluate_candidates(big, directions_lpd, *sets, rule, full_grid=False, batch_size=16)[layer]
    assert (row["position"], row["layer"]) == (-1, layer)
    for key in SCORES:
        assert abs(row[key] - best[key]) < 1e-4


def test_inflated_tied_embeddings_biases_and_bfloat16(tmp_path):
    tiny.tiny_llama(tmp_path / "small", tied=True, attention_bias=True, mlp_bias=True)
    inflate(tmp_path / "small", tmp_path / "big", SMALL)
    inflate(tmp_path / "small", tmp_path / "half", SMALL, dtype="bfloat16")
    batch = load_model(tmp_path / "small").encode(PROMPTS[:4])
    before, after, half = (
        np.asarray(load_model(tmp_path / name).logits(batch.tokens, batch.mask)) for name in ("small", "big", "half")
    )
    np.testing.assert_allclose(after[:, : before.shape[1]], before, rtol=2e-6, atol=1e-5)
    assert np.abs(half[:, : before.shape[1]] - before).mean() < 0.1
    with safetensors.safe_open(tmp_path / "half" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"n_kv_heads": 9}, "1 query heads for each kv head are under the source's 2"),
        ({"n_heads": 8}, "n_heads = 8 is not a multiple of n_kv_heads = 3"),
        ({"d_model": 16}, "d_model = 16 is under the source's 32"),
        ({"d_model": 40}, "d_model = 40 is not a multiple of n_heads = 9, as HF demands"),
        ({"d_model": 32}, "a larger vocab_size needs a larger d_model"),
    ],
)
def test_inflate_refuses_what_cannot_hold_the_source(llama, tmp_path, shape, message):
    with pytest.raises(UserError, match=message):
        inflate(llama, tmp_path / "big", dataclasses.replace(SMALL, **shape))
    assert not (tmp_path / "big").exists()


def test_inflate_overwrites_nothing(llama, tmp_path):
    with pytest.raises(UserError, match="exists"):
        inflate(llama, tmp_path, SMALL)
    with pytest.raises(UserError, match="dtype 'int8' is not one of"):
        inflate(llama, tmp_path / "big", SMALL, dtype="int8")
