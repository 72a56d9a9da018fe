"""The configs of real checkpoints that `refusal-jax plan` knows, by the last part of their name on the hub.

They are in `refusal_jax/plan/models.json`, in the hub's spelling, quirks included, because readers must cope with them:
Gemma 3's multimodal configs leave most of their text part to the defaults of its config class, Qwen 1 counts both MLP branches
in `intermediate_size`, Phi-3 has a sliding window of 2047. Left out are token ids, versions and the like, which nothing
computes with.
"""

from typing import NamedTuple

from refusal_jax.plan.known import KNOWN


class Real(NamedTuple):
    """A checkpoint: hub repository, number of parameters that we load (a tied matrix counts once) and config.

    The published count, except where a multimodal checkpoint is read for its language model only: then that part's.
    """

    repo: str
    parameters: int
    config: dict


def text_part(name: str, *architectures: str) -> dict[str, Real]:
    """Returns what a copy of the text part of a multimodal checkpoint is, under a name that says so."""
    whole = REAL_MODELS[name]
    tied = {"tie_word_embeddings": whole.config["tie_word_embeddings"]} if "tie_word_embeddings" in whole.config else {}
    config = whole.config["text_config"] | tied | ({"architectures": list(architectures)} if architectures else {})
    return {f"{name}, text part": Real("a copy of its text part", whole.parameters, config)}


REAL_MODELS = {repo.rpartition("/")[2]: Real(repo, model.parameters, model.config) for repo, model in KNOWN.items()}
REAL_MODELS |= text_part("gemma-4-E4B-it", "Gemma4ForCausalLM")
REAL_MODELS |= text_part("Ministral-3-8B-Instruct-2512-BF16")  # it may name none
REAL_MODELS |= text_part("Qwen3.5-9B", "Qwen3_5ForCausalLM")
REAL_MODELS |= text_part("Qwen3.5-35B-A3B", "Qwen3_5MoeForCausalLM")
