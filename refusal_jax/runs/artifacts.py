"""The names of the files in a run's folder, each declared once.

Names that depend on a condition or a judge are made by functions here. The names of the direction's own files are in
`refusal_jax.directions`, because directions are also read from folders that hold no run.
"""

from refusal_jax.directions import DIRECTION as DIRECTION
from refusal_jax.directions import METADATA as METADATA
from refusal_jax.directions import NO_DIRECTION as NO_DIRECTION

PROMPTS = "prompts.json"
SETUP, FILTER, MEANS = "setup.json", "filter.json", "mean_diffs.safetensors"
CANDIDATES = "direction_evaluations.json"  # the scores of every candidate direction
PROJECTIONS = "projections.safetensors"
SCORES = "refusal_scores.json"
DAMAGE = "damage.json"
STATISTICS, TIDY = "statistics.json", "statistics.csv"
REPORT = "report.html"
MECHANISM = "mechanism"  # the folder of what the mechanism adds to a study
SUFFIXES = f"{MECHANISM}/suffixes.json"
AGREEMENT = f"{MECHANISM}/agreement.json"
RANK, RANK_DIRECTIONS = f"{MECHANISM}/rank.json", f"{MECHANISM}/rank.safetensors"
DOSE, DOSES = f"{MECHANISM}/dose.json", f"{MECHANISM}/dose.safetensors"
ATTRIBUTION, ATTRIBUTED = f"{MECHANISM}/attribution.json", f"{MECHANISM}/attribution.safetensors"
ATTENTION, ATTENTION_READ = f"{MECHANISM}/attention.json", f"{MECHANISM}/attention.safetensors"
COSMIC = f"{MECHANISM}/cosmic.json"
SOM, SOM_DIRECTIONS = f"{MECHANISM}/som.json", f"{MECHANISM}/som.safetensors"
CONES, CONE_BASES = f"{MECHANISM}/cones.json", f"{MECHANISM}/cones.safetensors"
ALTERNATIVES = f"{MECHANISM}/alternatives.json"
PLANE, PLANE_POINTS = f"{MECHANISM}/plane.json", f"{MECHANISM}/plane.safetensors"
SCATTER, SCATTER_POINTS = f"{MECHANISM}/scatter.json", f"{MECHANISM}/scatter.safetensors"
MATRICES, MATRIX_DIRECTIONS = f"{MECHANISM}/matrices.json", f"{MECHANISM}/matrices.safetensors"
REMOVAL = "damage"  # the folder of what is added about the damage that removal does
GRID, GRID_VALUES = f"{REMOVAL}/grid.json", f"{REMOVAL}/grid.safetensors"
REPLIES, REPLY_VALUES = f"{REMOVAL}/replies.json", f"{REMOVAL}/replies.safetensors"
FRONT = f"{REMOVAL}/front.json"
ANSWER_COSTS, ANSWER_SUMS = f"{REMOVAL}/answers.json", f"{REMOVAL}/answers.safetensors"
TEXTS = f"{REMOVAL}/texts.json"
EDITED = f"{REMOVAL}/weights.json"
REMOVAL_FIGURES = f"{REMOVAL}/figures"  # the folder of its figures as files
FIGURES = f"{MECHANISM}/figures"  # the folder of the report's figures as files, and their list
RESISTANCE = "resistance"  # the folder of what resistance tests add to a checkpoint's study
UNATTACKED = f"{RESISTANCE}/unattacked.json"


def resistance_name(test: str) -> str:
    """Returns the name of the file with what a resistance test has found."""
    return f"{RESISTANCE}/{test}.json"


def attacked_replies_name(test: str) -> str:
    """Returns the name of the file with the replies under a resistance test, which is written only if it is asked for."""
    return f"{RESISTANCE}/replies/{test}.json"


def figure_list(folder: str) -> str:
    """Returns the name of the list of the figures that a folder has as files."""
    return f"{folder}/figures.json"


def loss_name(intervention: str) -> str:
    """Returns the name of the file with the losses under an intervention."""
    return f"loss_evals/{intervention}_loss_eval.json"
