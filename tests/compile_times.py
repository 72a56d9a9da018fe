"""How long an 80-layer forward pass of each family takes to trace and compile: `python tests/compile_times.py`.

At small width, with edits and every tap, on the CPU; no weights are made. What it shows is that layers are scanned: the
time does not grow with their number.
"""

import time

import families
import jax

from refusal_jax import Edits, Taps
from refusal_jax.models.decoder import Decoder
from refusal_jax.models.hf_config import from_hf
from refusal_jax.models.predict import predict
from refusal_jax.taps import RESIDUAL_SITES

LAYERS = 80


def lowered(family: str, layers: int):
    """The traced forward pass of a tiny model of this family with so many layers."""
    variant = next(v for v in ("gqa", *families.FAMILIES[family]) if v in families.FAMILIES[family])
    more = {"num_hidden_layers": layers}
    types = families.FAMILIES["gemma3_text" if family == "gemma3" else family][variant].get("layer_types", [])
    if types:
        more["layer_types"] = (types * layers)[:layers]
    if family == "nemotron_h":
        more["hybrid_override_pattern"] = (families.FAMILIES[family][variant]["hybrid_override_pattern"] * layers)[
            :layers
        ]
    cfg = from_hf(families.hf_config(family, variant, **more))
    decoder = jax.eval_shape(lambda key: Decoder.init(cfg, key), jax.random.key(0))
    tokens, mask = jax.ShapeDtypeStruct((4, 32), "int32"), jax.ShapeDtypeStruct((4, 32), "bool")
    edits = Edits.none(cfg.d_model).for_batch(4, cfg.n_layers, cfg.d_model)
    return predict.lower(decoder, tokens, mask, edits, taps=Taps(RESIDUAL_SITES, 5), last=True)


def main():
    print(f"{LAYERS} layers   tracing  compiling   seconds")
    for family in families.FAMILIES:
        start = time.perf_counter()
        program = lowered(family, LAYERS)
        traced = time.perf_counter()
        program.compile()
        print(f"{family:<12} {traced - start:>6.2f} {time.perf_counter() - traced:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
