"""Tensor names of Nemotron-H: a layer's norm and its only part go by the same names whatever the part is."""

import re

from refusal_jax.models.tables.granite_hybrid import state_space

LAYER = "backbone.layers.{l}."
MIXER = f"{LAYER}mixer."
NEMOTRON_H = {
    "embed": "backbone.embeddings.weight",
    "blocks.attn_norm": f"{LAYER}norm.weight",
    "blocks.mlp_norm": f"{LAYER}norm.weight",
    **{f"blocks.{part}": f"{MIXER}{part}_proj.weight" for part in "qkvo"},
    **state_space(f"{LAYER}mixer"),
    "blocks.router": f"{MIXER}gate.weight",
    "blocks.router_correction": f"{MIXER}gate.e_score_correction_bias",
    "final_norm": "backbone.norm_f.weight",
    "unembed": "lm_head.weight",
}
EXPERT, SHARED = f"{MIXER}experts.{{e}}.", f"{MIXER}shared_experts."
for kind, where in (("", EXPERT), ("inner_", EXPERT), ("dense_", MIXER), ("shared_", SHARED)):
    for part in ("up", "down"):
        NEMOTRON_H |= {
            f"blocks.{kind}{part}": f"{where}{part}_proj.weight",
            f"blocks.{kind}{part}_bias": f"{where}{part}_proj.bias",
        }
for path, part in (("experts_in", "fc1"), ("experts_out", "fc2")):
    NEMOTRON_H |= {f"blocks.{path}{one}": f"{MIXER}{part}_latent_proj.{one[1:] or 'weight'}" for one in ("", "_bias")}
TABLES = {"nemotron_h": NEMOTRON_H}
OTHER_PARTS = {"nemotron_h": re.compile(r"^mtp\.")}  # layers that guess tokens ahead
