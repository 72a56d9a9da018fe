"""Judges completions, from a study or elsewhere, by several judges at once, with intervals, paired tests and agreement.

  refusal-jax evaluate --completions=runs/mine/completions --out=judged
  refusal-jax evaluate --completions=FILE --out=judged --judges=substring_matching,llamaguard2=DIR
  refusal-jax evaluate --completions=FILE --out=judged --judges=harmbench=DIR@template.txt --artifact

A file is a list of completions, `{category, prompt, response}`, as .json, .jsonl or .csv, an evaluations file, or a
JailbreakBench artifact. In a folder, all such files are judged, and conditions of the same data set are compared
(DATASET_CONDITION_completions.json). Judges of text are substring_matching (the paper's), substring_extended, and rules,
which tells whether a reply refuses, complies, deflects or is broken, in many languages. Judge models are given by
checkpoint folders: llamaguard2 and llamaguard3, in their tokenizer's own template; harmbench and strongreject, in the
prompt template that they were trained with, read from a text file that contains {prompt} and {response}, and may
contain {system_prompt}; llm, any chat model, which is asked whether the reply does what the request asks for, with a
built-in question or one from a file; llm_outcomes, likewise, which is asked whether the reply refuses, complies or
deflects. endpoint=URL#MODEL asks the same of a model behind an OpenAI-compatible server, and endpoint=URL#MODEL#NAME
names the environment variable that holds its key.

Where completions have labels, a field labelled_outcome with refuses, complies, deflects or broken in every row, the
agreement of each judge with them is measured. --completions=bundled are such replies, which the package brings.

Thoughts (<think>…</think> and the notations of other families) are split off before anything is judged or counted;
completions that never leave their thought are counted separately. A note below the tables says where a judge with more
phrases counts refusals differently, or where replies are broken.

OUT receives NAME_evaluations.json in the published format with a column for each judge, statistics.json, statistics.csv
and, with --artifact, NAME_jailbreakbench.json. If it is stopped while a model judges, the same command continues.
"""

import hashlib
from collections.abc import Sequence

from absl import flags

from refusal_jax.chat.messages import system_text
from refusal_jax.chat.prompts import Chat
from refusal_jax.checkpoints.remote import checkpoint_folder
from refusal_jax.conditions import split_stem
from refusal_jax.data.prompts import BUNDLED
from refusal_jax.files import local_path, to_json
from refusal_jax.jobs import common, devices
from refusal_jax.judges.agreement import BUNDLED_REPLIES
from refusal_jax.judges.artifacts import jailbreakbench_artifact, read_completions
from refusal_jax.judges.choice import parse_judges
from refusal_jax.judges.evaluations import evaluate_completions
from refusal_jax.judges.judge import Judge, judge_all
from refusal_jax.judges.tables import tables, tidy_csv
from refusal_jax.models.hf_config import load_config
from refusal_jax.report.concerns import broken_completions, judge_disagreement, unfinished_thoughts
from refusal_jax.report.summary import JudgedCondition
from refusal_jax.report.text import labels_table, rates_table
from refusal_jax.report.verdict import Concern
from refusal_jax.runs.artifacts import STATISTICS, TIDY
from refusal_jax.runs.ledger import Ledger
from refusal_jax.runs.storage import DiskFolder

EXAMPLE = ". Example: refusal-jax evaluate --completions=runs/mine/completions --out=judged."
COMPLETIONS = flags.DEFINE_string(
    "completions", None, "File or folder of completions; bundled: the labelled replies that come with the package."
)
OUT = flags.DEFINE_string(
    "out", None, "Folder for the results. It is created if new; files of the same names are replaced."
)
JUDGES = flags.DEFINE_list(
    "judges",
    ["substring_matching"],
    "Judges, separated by commas: NAME, KIND=MODEL, KIND=MODEL@TEMPLATE.txt, endpoint=URL#MODEL.",
)
TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Checkpoint whose tokenizer counts lengths. Default: lengths are counted in words."
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 16, "Number of completions that a judge model reads at a time.", lower_bound=1
)
ARTIFACT = flags.DEFINE_bool(
    "artifact", False, "Also write JailbreakBench artifacts, whose jailbreak labels come from the last judge."
)
METHOD = flags.DEFINE_string(
    "method", "", "Name of the method in the artifact. Default: the condition in the file's name."
)
AUTHOR = flags.DEFINE_string("author", "", "Name of the model that wrote the completions, for artifacts.")
SYSTEM_PROMPT = flags.DEFINE_string(
    "system_prompt",
    "",
    "System prompt that the completions were made under, a text or a .txt file, where their file does not tell. Judge models "
    "whose template has {system_prompt}, and llm with its built-in question, are shown it.",
)
flags.adopt_module_key_flags(devices)


def main(arguments) -> None:
    folder, target = (common.required(flag, EXAMPLE) for flag in (COMPLETIONS, OUT))
    completions = read_completions(BUNDLED_REPLIES if folder == BUNDLED else local_path(folder))
    if system := system_text(SYSTEM_PROMPT.value):
        completions = {name: [{"system_prompt": system} | row for row in rows] for name, rows in completions.items()}
    judges = parse_judges(JUDGES.value, BATCH_SIZE.value, devices.asked_dtype(), devices.asked_mesh())
    chat = None
    if TOKENIZER.value:
        tokenizer = checkpoint_folder(TOKENIZER.value, weights=False)
        chat = Chat.load(tokenizer, load_config(tokenizer).context_length)
    out = DiskFolder(target)
    with out.held():
        ledger = Ledger.open(out, ledger_name(completions, judges))
        verdicts = judge_all(judges, completions, ledger)
        found = tables(completions, verdicts, chat, judges)
        files = results(completions, verdicts, judges[-1].name)
        for name, content in files.items():
            out.write(name, to_json(content))
        out.write(STATISTICS, to_json(found))
        out.write(TIDY, tidy_csv(found).encode("utf-8", "replace"))
        out.remove([ledger.name])
    print(rates_table(found))
    if labels := labels_table(found):
        print(labels)
    for number, concern in enumerate(concerns_of(files, [judge.name for judge in judges], folder), 1):
        print(f"\n({number}) {concern.text}")
    print(f"\nResults: {out.path.resolve()}")


def ledger_name(completions: dict, judges: Sequence[Judge]) -> str:
    """Returns the name of the file that keeps the verdicts of an interrupted run, for these completions and judges only."""
    models = [fingerprint for judge in judges if (fingerprint := judge.fingerprint())]
    return f".ledger-judges-{hashlib.sha256(to_json([completions, models])).hexdigest()[:12]}.jsonl"


def concerns_of(files: dict[str, dict], judges: list[str], folder: str) -> list[Concern]:
    """Returns what the evaluations files say against the rates of the judges of text."""
    stems = {
        name.removesuffix("_evaluations.json"): content for name, content in files.items() if "completions" in content
    }
    conditions = [JudgedCondition.of(*split_stem(stem), content) for stem, content in stems.items()]
    found = [unfinished_thoughts(conditions), *broken_completions(conditions)]
    return [*filter(None, found), *filter(None, (judge_disagreement(conditions, judge, folder) for judge in judges))]


def results(completions: dict, verdicts: dict, last: str) -> dict[str, dict]:
    """Returns the evaluations files and, if asked for, the artifacts, by name. last: the judge whose verdicts the
    artifacts hold."""
    files = {}
    for name, rows in completions.items():
        files[f"{name}_evaluations.json"] = evaluate_completions(rows, verdicts[name])
        if ARTIFACT.value:
            dataset, condition = split_stem(name)
            parameters = {
                "method": METHOD.value or condition or dataset,
                "model": AUTHOR.value or None,
                "attack_type": "white_box",
                "defense": None,
                "evaluation_judge": last,
            }
            files[f"{name}_jailbreakbench.json"] = jailbreakbench_artifact(rows, verdicts[name][last], parameters)
    return files
