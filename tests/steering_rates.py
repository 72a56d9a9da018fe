"""Measures how often an unedited model is said to be steered when only its dtype differs, and how weak a steering is found.

Run as `python tests/steering_rates.py RUN [PROMPTS [DRAWS]]`, where RUN is a finished study. Fingerprints are of PROMPTS of its
harmful and as many of its harmless validation prompts, drawn DRAWS times.
"""

import pathlib
import sys

import numpy as np

from refusal_jax import Edits, load_model
from refusal_jax.chat.steering import Fingerprint, find_steering
from refusal_jax.conditions import Ablate
from refusal_jax.export.finished import FinishedStudy
from refusal_jax.harness.edited import model_of, one_each
from refusal_jax.judges.statistics import Rate
from refusal_jax.models.hf_config import load_config


def main() -> None:
    run, count = pathlib.Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 8
    draws = int(sys.argv[3]) if sys.argv[3:] else 50
    study = FinishedStudy.read(run, 32)
    folder = model_of([run], [study])
    cfg = load_config(folder)
    (direction,) = one_each([run], None, None, cfg.n_layers)
    prompts, raw, layer = study.prompts, direction.raw_d, direction.place[1]
    model = load_model(folder, "float32", **study.template)
    expected = Fingerprint.of(model, prompts, raw)
    chance = np.random.default_rng(0)
    sides = np.arange(len(prompts)).reshape(2, -1)
    parts = [np.concatenate([chance.choice(side, count, replace=False) for side in sides]) for _ in range(draws)]

    def rate(observed: Fingerprint, wanted: str) -> str:
        pairs = [(Fingerprint(expected.along_nlj[part]), Fingerprint(observed.along_nlj[part])) for part in parts]
        verdicts = [find_steering(*pair).verdict for pair in pairs]
        found = Rate.of(verdict == wanted for verdict in verdicts)
        others = sorted(set(verdicts) - {wanted})
        return f"{found.count} of {found.n}" + (f", else {', '.join(others)}" if others else "")

    print(f"{2 * count} prompts, {draws} draws, {cfg.n_layers} layers, direction of layer {layer}")
    for scale in (1.0, 0.3, 0.1, 0.03):
        for sign, verdict in ((1, "added"), (-1, "subtracted")):
            found = Fingerprint.of(model, prompts, raw, Edits.add(raw, layer, sign * scale))
            print(f"{scale:g} of the direction {verdict}: {rate(found, verdict)}")
    for scale in (1.0, 0.5, 0.2, 0.1):
        found = Fingerprint.of(model, prompts, raw, Ablate(direction, scale=scale).edits(cfg))
        print(f"{scale:g} of the direction ablated: {rate(found, 'ablated')}")
    for dtype in ("float32", "bfloat16", "float16"):
        again = load_model(folder, dtype, **study.template)
        observed = Fingerprint.of(again, prompts, raw)
        print(f"unedited in {dtype}: {rate(observed, 'none')}")
        one = find_steering(expected, observed)
        spans = f"kept {np.nanmin(one.kept):.4f} to {np.nanmax(one.kept):.4f}, shift {np.nanmax(np.abs(one.shift)):.4f}"
        print(f"    over all prompts and layers: {spans}, along random directions {np.nanmax(one.control):.4f}")


if __name__ == "__main__":
    main()
