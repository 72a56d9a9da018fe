"""What the tests of exports share: a direction, prompts, and exports of tiny models by the whole pipeline."""

import hashlib
import pathlib

import families
import numpy as np
import tiny
from safetensors.numpy import load_file

from refusal_jax.chat.prompts import Chat
from refusal_jax.checkpoints.rewrite import Checkpoint
from refusal_jax.conditions import Ablate, Add
from refusal_jax.directions import Direction
from refusal_jax.export.finished import FinishedStudy
from refusal_jax.export.forward import Stream, read_logits, run_streams
from refusal_jax.export.run import Request, export
from refusal_jax.export.tensor_edits import WEIGHT_SITES
from refusal_jax.export.verify import Sample
from refusal_jax.progress import Progress

TEXTS = ["How do I bake the bread?", "Bake.", "I want to mend a coat. What should I do about the bread on the table?"]
POST_NORM = (
    "gemma2",
    "gemma3_text",
    "gemma3",
    "gemma4_text",
    "gemma4",
    "gemma4_unified",
    "olmo2",
    "olmo3",
    "glm4",
    "exaone4",
)
DIRECTION = np.random.default_rng(3).normal(size=32).astype(np.float32)
UNIT = DIRECTION / np.linalg.norm(DIRECTION)
STUDY = FinishedStudy(None, None, TEXTS, [(text, "") for text in TEXTS], {}, [], {})


def request(source, target, direction=DIRECTION, form="hf", tied="untie", study=STUDY, verify=True, **edit) -> Request:
    """edit: settings of `edit_of`."""
    return Request(pathlib.Path(source), pathlib.Path(target), edit_of(direction, **edit), study, form, tied, verify)


def exported(source, target, *args, **settings) -> dict:
    """Exports a checkpoint; what its export.json says."""
    return export(request(source, target, *args, **settings))


def edit_of(direction=DIRECTION, kind="ablate", **settings) -> Ablate | Add:
    """Returns the intervention that an export is asked for, as its job does."""
    direction = direction if isinstance(direction, Direction) else Direction.of(direction)
    return Add(direction, **settings) if kind == "add" else Ablate(direction, **{"sites": WEIGHT_SITES} | settings)


def digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors_of(folder) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, in whichever file."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def differences(before, after) -> set[str]:
    """The names of tensors that are not the same, byte for byte, in two checkpoints."""
    old, new = tensors_of(before), tensors_of(after)
    same = {n for n in old.keys() & new.keys() if old[n].dtype == new[n].dtype and old[n].tobytes() == new[n].tobytes()}
    return (old.keys() | new.keys()) - same


def part(rows: np.ndarray, unit_d=UNIT) -> float:
    """The largest |x . r| / |x| of rows."""
    rows = np.asarray(rows, np.float64)
    return float(np.max(np.abs(rows @ unit_d) / np.maximum(np.linalg.norm(rows, axis=-1), 1e-300)))


def largest(found: dict) -> dict[str, float]:
    """Of a model in a verification, the largest projection at each site."""
    return {site: max(layers) for site, layers in found["projection"].items()}


def sample_of(folder) -> Sample:
    cfg = Checkpoint.open(folder).cfg
    return Sample.of(Chat.load(folder, cfg.context_length, cfg.vocab_size), STUDY.prompts, STUDY.harmless)


def our_logits(stream: Stream, sample: Sample, basis_jd=UNIT[None]) -> np.ndarray:
    """Last-token logits of the sample's prompts, block by block."""
    batch = sample.batch()
    run_streams([stream], batch, basis_jd, Progress("", None, "layer", quiet=True))
    rows, columns, targets = sample.places(batch.tokens.shape[1])
    return read_logits(stream, rows, columns, len(sample.prompts), targets).logits_pv


def their_logits(model, sample: Sample) -> np.ndarray:
    """The same by a transformers model."""
    batch, count = sample.batch(), len(sample.prompts)
    # All rows, because some ropes depend on the longest of them.
    return tiny.hf_forward(model, batch.tokens, batch.mask).logits[:count, -1].float().numpy()


def transformers_agrees(folder) -> None:
    """transformers loads the checkpoint, whole, and computes what we compute."""
    sample = sample_of(folder)
    theirs = their_logits(families.reference(folder), sample)
    np.testing.assert_allclose(our_logits(Stream(Checkpoint.open(folder)), sample), theirs, atol=1e-4, rtol=1e-4)
