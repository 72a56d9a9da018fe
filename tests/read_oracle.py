"""Tells what heads read, by plain loops over tokens and heads, from what transformers computes: for tests, and for a real model.

python tests/read_oracle.py --model=DIR    # the largest differences of `mechanism.attention` from it, and whether sums hold
"""

import argparse
import collections

import families
import numpy as np

from refusal_jax import load_model
from refusal_jax.mechanism.attention import read_attention
from refusal_jax.mechanism.regions import ORIGINS, REGIONS, TEMPLATE, regions_of
from refusal_jax.mechanism.suffixes import HARMFUL, RANDOM, SUFFIXED, row_of

LIMIT = 1e-3


class Oracle:
    """One batch of prompts in transformers, its weights as we hold them, and a direction; everything float64."""

    def __init__(self, model, theirs, tokens, mask, direction):
        self.cfg, weights = model.config, model.decoder.weights()
        self.weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        heads, taps = families.hf_heads(theirs, tokens, mask), families.hf_taps(theirs, tokens, mask)
        self.pattern, self.out, self.z = (heads[name].astype(np.float64) for name in ("pattern", "out", "z"))
        self.resid, self.mlp, self.attn = (
            taps[name].astype(np.float64) for name in ("resid_pre", "mlp_out", "attn_out")
        )
        self.unit = direction / np.linalg.norm(direction)

    def weight(self, name, layer):
        value = self.weights.get(f"blocks.{name}")
        return None if value is None else value[layer]

    def share(self, name, layer, whole, part):
        """Returns the part of a norm's output that comes from a part of its input."""
        scale = self.weight(name, layer)
        if scale is None:
            return part
        if self.cfg.centred_norms:
            whole, part = whole - whole.mean(), part - part.mean()
        return (self.cfg.norm_offset + scale) * part / np.sqrt(np.mean(whole**2) + self.cfg.norm_eps)

    def latent(self, layer, whole, parts):
        """Returns the same of latent attention, whose bias stands before a norm."""
        mixer, w, bias = (
            self.cfg.mixers[0],
            self.weight("latent_kv_down", layer),
            self.weight("latent_kv_down_bias", layer),
        )
        found = {name: w[: mixer.kv_rank] @ self.share("attn_norm", layer, whole, part) for name, part in parts.items()}
        constant = np.zeros(mixer.kv_rank) if bias is None else bias[: mixer.kv_rank]
        found["template"] = found.get("template", 0) + constant
        root = np.sqrt(np.mean(sum(found.values()) ** 2) + mixer.norm_eps)
        up = self.weight("latent_kv_up", layer).reshape(self.cfg.n_heads, -1, mixer.kv_rank)[:, mixer.plain_dim :]
        return {name: up @ (self.weight("latent_kv_norm", layer) * c / root) for name, c in found.items()}

    def value(self, layer, whole, parts):
        """Returns a token's value by origin, `{origin: [K, H]}`."""
        if "blocks.latent_kv_up" in self.weights:
            return self.latent(layer, whole, parts)
        cfg, w, bias = self.cfg, self.weight("v", layer), self.weight("v_bias", layer)
        found = {name: w @ self.share("attn_norm", layer, whole, part) for name, part in parts.items()}
        constant = np.zeros(len(w)) if bias is None else bias
        if cfg.qkv_clip is not None:
            total = sum(found.values()) + constant
            clipped = np.abs(total) >= cfg.qkv_clip
            found = {name: np.where(clipped, 0, value) for name, value in found.items()}
            constant = np.where(clipped, np.clip(total, -cfg.qkv_clip, cfg.qkv_clip), constant)
        found["template"] = found.get("template", 0) + constant
        return {name: value.reshape(cfg.n_kv_heads, cfg.head_dim) for name, value in found.items()}

    def written(self, layer, b, q, head, value):
        """Returns what a head adds to the residual stream at q for values `[K, H]` that it reads in whole."""
        cfg = self.cfg
        o_dh = self.weight("o", layer).reshape(cfg.d_model, cfg.n_heads, -1)[:, head]
        read = o_dh @ value[head // cfg.queries_per_kv]
        return cfg.residual_scale * self.share("attn_post_norm", layer, self.out[layer, b, q], read)

    def read(self, b, region_t, heads):
        """Returns attention, its rollout, and attribution of heads of one row by region, and by origin through the template."""
        cfg, one_hot = self.cfg, np.eye(len(ORIGINS))
        real = np.flatnonzero(region_t < len(REGIONS))
        post = [t for t in real if region_t[t] == TEMPLATE]
        found = {name: np.zeros((len(heads), len(post), len(ORIGINS))) for name in ("attention", "along")}
        found |= {
            name: np.zeros((len(heads), len(post), *a.shape[1:]))
            for name, a in zip(("attention_via", "along_via"), found.values(), strict=True)
        }
        parts = {p: collections.Counter(template=self.resid[0, b, p]) for p in post}
        rolled = {p: one_hot[TEMPLATE] for p in post}
        for layer in range(cfg.n_layers):
            sources = {
                t: self.value(
                    layer, self.resid[layer, b, t], parts[t] if t in post else {"whole": self.resid[layer, b, t]}
                )
                for t in real
            }
            sources |= {t: {REGIONS[region_t[t]]: sum(sources[t].values())} for t in real if t not in post}
            brought = {t: rolled[t] if t in post else one_hot[region_t[t]] for t in real}
            self.check(layer, b, [sum(sources[t].values()) for t in real], real)
            for x in (x for x, (at, _) in enumerate(heads) if at == layer):
                ours = {name: values[x] for name, values in found.items()}
                self.one(ours, layer, b, heads[x][1], region_t, post, sources, brought)
            for q in post:
                self.add(parts[q], layer, b, q, sources)
                weights_t = self.pattern[layer, b, :, q, real].mean(axis=1)
                nothing = (1 - weights_t.sum()) * one_hot[-1]
                arrived = sum(a * brought[t] for a, t in zip(weights_t, real, strict=True))
                rolled[q] = (rolled[q] + arrived + nothing) / 2
        return found

    def add(self, parts, layer, b, q, sources):
        """Adds what a layer adds to the residual stream at a token to its parts."""
        for head in range(self.cfg.n_heads):
            for t, values in sources.items():
                for name, value in values.items():
                    parts[name] = parts[name] + self.written(
                        layer, b, q, head, self.pattern[layer, b, head, q, t] * value
                    )
        if (bias := self.weight("o_bias", layer)) is not None:
            whole = self.out[layer, b, q]
            parts["template"] = parts["template"] + self.cfg.residual_scale * self.share(
                "attn_post_norm", layer, whole, bias
            )
        parts["MLPs"] = parts["MLPs"] + self.mlp[layer, b, q]

    def check(self, layer, b, values, real):
        """The values are those that transformers weighs: else this oracle would be wrong."""
        v_tnh = np.stack(values).repeat(self.cfg.queries_per_kv, axis=1)
        z_nh = np.einsum("tn,tnh->nh", self.pattern[layer, b, :, -1, real], v_tnh)
        np.testing.assert_allclose(z_nh.ravel(), self.z[layer, b, -1].ravel(), rtol=1e-3, atol=1e-4)

    def one(self, found, layer, b, head, region_t, post, sources, brought):
        """Adds what one head reads, at each of the template's tokens, to its arrays."""
        for i, q in enumerate(post):
            for t, values in sources.items():
                a = self.pattern[layer, b, head, q, t]
                along = {name: self.written(layer, b, q, head, a * value) @ self.unit for name, value in values.items()}
                found["attention"][i, region_t[t]] += a
                found["along"][i, region_t[t]] += sum(along.values())
                if t in post:
                    found["attention_via"][i, post.index(t)] += a * brought[t]
                    for name, value in along.items():
                        found["along_via"][i, post.index(t), ORIGINS.index(name)] += value
            found["attention"][i, -1] = 1 - found["attention"][i, :-1].sum()


def main(options: argparse.Namespace) -> int:
    model = load_model(options.model)
    asked = (
        (HARMFUL, "How do I bake bread?", ""),
        (SUFFIXED, "Name a river.", " paper lantern cloud"),
        (RANDOM, "Why?", " a b"),
    )
    rows = [row for group, text, suffix in asked if (row := row_of(model.chat, group, 0, text, suffix))]
    cfg, batch = model.config, model.encode([row.text for row in rows])
    heads = [(layer, head) for layer in range(1, cfg.n_layers, 3) for head in (0, cfg.n_heads - 1)]
    direction = np.random.default_rng(0).normal(size=cfg.d_model)
    found = read_attention(model, rows, heads, direction, len(rows), "attention")
    oracle = Oracle(model, families.reference(options.model), batch.tokens, batch.mask, direction)
    theirs = [oracle.read(b, region_t, heads) for b, region_t in enumerate(regions_of(rows, batch.mask))]
    worst = 0.0
    for name in theirs[0]:
        expected = np.stack([one[name] for one in theirs])
        off = float(np.abs(getattr(found, name) - expected).max() / max(1.0, np.abs(expected).max()))
        print(f"{name}: off by {off:.2g} of the largest value, or of 1; the largest is {np.abs(expected).max():.3g}")
        worst = max(worst, off)
    print(f"The parts of the residual stream are off by {found.off.max():.2g} of its norm.")
    return int(worst > LIMIT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    raise SystemExit(main(parser.parse_args()))
