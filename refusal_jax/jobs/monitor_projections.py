"""The action `projections` of the monitor's job: how well the projection on the refusal direction detects refusals."""

from absl import flags

from refusal_jax.errors import UserError
from refusal_jax.files import local_path
from refusal_jax.judges.choice import parse_judges

PROMPTS = flags.DEFINE_integer(
    "prompts",
    64,
    "For `projections`: the most prompts of each side, harmful and harmless, that are read.",
    lower_bound=2,
)


def projections(words: list[str], judge: str) -> int:
    """Prints how well the projection detects, on the replies of the study that the words name, and returns the exit code.

    judge: of the replies, as `parse_judges` takes it. Raises UserError as `detect` does.
    """
    if not words:
        raise UserError("The study's folder is missing: refusal-jax monitor projections runs/first.")
    from refusal_jax.monitor.projections import detect, detection_text  # a monitor of logs needs no models

    (one,) = parse_judges([judge], 8)
    print(detection_text(detect(local_path(words[0]), one, PROMPTS.value)), end="")
    return 0
