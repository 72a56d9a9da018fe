"""Trains small chat models of hybrid architectures that refuse, and puts each through study, export and audit.

  JAX_PLATFORMS=cpu python tests/hybrid_organisms.py OUT [FAMILY …]

Each model is trained as the embedded one is, on the same requests, but with the architecture of another family: no checkpoint of
these is small enough to come with the code, and a random model has no refusal that a direction could mediate. The commands are
those that a user would type. Printed for each family: how many harmful test prompts are refused, unedited and under ablation, how
many harmless ones once the direction is added, the loss on unrelated text before and after, whether the exported weights do what
ablation at inference time does, and the verdict of the audit on the export and on the model itself. Each takes 5 to 15 minutes of
CPU; what is there already is kept.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys

from refusal_jax.organism.recipe import Recipe, train

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES: dict[str, dict] = {
    "lfm2": {
        "layer_types": ["conv", "conv", "full_attention", "conv"] * 2,
        "block_auto_adjust_ff_dim": False,
        "norm_eps": 1e-5,
        "rope_parameters": ROPE,
        "tie_word_embeddings": False,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "mamba", "mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 32,
        "mamba_expand": 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 384,
        "position_embedding_type": "nope",
        "attention_multiplier": 32**-0.5,
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "head_dim": 32,
        "rope_parameters": ROPE | {"partial_rotary_factor": 0.5},
    },
}
SIZES = """
    vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size max_position_embeddings
    torch_dtype
""".split()


@dataclasses.dataclass(frozen=True)
class HybridRecipe(Recipe):
    """The embedded model's recipe with the architecture of a family."""

    family: str = ""

    def hf_config(self, vocab_size: int) -> dict:
        """Returns the model's config.json."""
        config = super().hf_config(vocab_size)
        return {name: config[name] for name in SIZES} | {"model_type": self.family} | FAMILIES[self.family]


def command(*words: str, allowed: tuple[int, ...] = (0,)) -> None:
    """Runs `refusal-jax` and shows what it prints; some codes say what an audit found."""
    done = subprocess.run([sys.executable, "-m", "refusal_jax.jobs.main", *words])
    if done.returncode not in allowed:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}")


def figures(out: pathlib.Path, family: str) -> dict:
    """Trains, studies, exports and audits; returns the numbers."""
    model, run, edited = (out / family / name for name in ("model", "study", "edited"))
    if not (model / "generation_config.json").exists():
        train(HybridRecipe(family=family), 0, model)
    command("study", "--config=configs/demo.py", f"--config.model={model}", f"--workdir={run}")
    if not (edited / "config.json").exists():
        command("export", f"--run={run}", f"--out={edited}")
    verdicts = {}
    for name, folder in (("export", edited), ("itself", model)):
        record = out / family / f"audit-{name}"
        command("audit", str(folder), f"--base={model}", f"--out={record}", allowed=(0, 10, 20, 30))
        verdicts[name] = json.loads((record / "audit.json").read_text())
    return {"run": json.loads((run / "results.json").read_text()), "verdicts": verdicts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), choices=[[], *FAMILIES])
    options = parser.parse_args()
    for family in options.families:
        found = figures(options.out, family)
        print(family, json.dumps(found, indent=1)[:4000])


if __name__ == "__main__":
    main()
