"""Tasks for EleutherAI's lm-evaluation-harness that measure refusal, with our judges: XSTest, JailbreakBench, StrongREJECT,
HarmBench, OR-Bench, and files of the user's own.

The files in `tasks/` name the sets, and `RefusalTask` does the rest, for every model of the harness. A task's rates appear once
for each judge, which the harness calls a filter. Prompts go as the only message of a chat, no examples before them, and a reply
ends where the model ends it.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import datasets
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

from refusal_jax.chat import thoughts
from refusal_jax.data.sources import distinct
from refusal_jax.errors import UserError
from refusal_jax.harness.asked import Asking
from refusal_jax.harness.edited import warn_once
from refusal_jax.judges.judge import Outcome, Verdict

FOLDER = pathlib.Path(__file__).parent / "tasks"
# As the paper decodes. Without "until" the harness would cut replies at their first blank line.
GENERATION = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 512}
SPLIT = "test"
MOST_CATEGORIES = 16  # of which a table still has rates
RATES = REFUSAL, SUCCESS, DEFLECTION, BROKEN = "refusal_rate", "success_rate", "deflection_rate", "broken_rate"
UNJUDGED = "unjudged_rate"
NO_TEMPLATE = (
    "No chat template is applied to the prompts. A chat model then continues the text of a prompt rather than answer it, and its "
    "refusal rate means nothing. Add `--apply_chat_template`, unless the model is a base model."
)


class RefusalTask(ConfigurableTask):
    """A set of prompts that are to be refused, or not; how often the model does, by each judge, over all and by category.

    `refusal_rate`, `success_rate` (of the request) and, by a judge that tells outcomes apart, `deflection_rate` and `broken_rate`
    are shares of the replies that the judge could judge. `unjudged_rate` is the share of the others: thoughts that never ended,
    requests that got no reply, and what the judge is undecided about. NAME/CATEGORY is a rate within one category.
    """

    VERSION = 1.0

    def __init__(self, config: Mapping[str, Any]):
        """Makes the task of a YAML file.

        config: `dataset_kwargs` and `metadata` hold the settings of `Asking`; the first are the file's own and win, the second
        come from --metadata. Other fields are as in any task of the harness. Raises UserError for settings that cannot be used,
        prompts that are not there, examples in the prompt, and judges that are not known.
        """
        own = {name: value for name, value in config.items() if name != "class"}
        task = own["task"]
        if own.get("num_fewshot"):
            raise UserError(
                f"{task} asks for {own['num_fewshot']} examples in each prompt. Refusal is measured on the prompts alone: leave "
                "out num_fewshot."
            )
        metadata = dict(own.get("metadata") or {})
        self.asking = Asking.of(task, metadata, dict(own.get("dataset_kwargs") or {}))
        self.prompts = self.asking.prompts_of(task)
        self.judges = self.asking.parsed_judges()
        self.categories = self._categories()
        self.system_prompt = ""
        own |= {
            "output_type": "generate_until",
            "dataset_path": self.asking.prompts,
            "dataset_kwargs": None,
            "test_split": SPLIT,
            "num_fewshot": 0,
            "metric_list": [],
            "generation_kwargs": GENERATION | dict(own.get("generation_kwargs") or {}),
            "metadata": {"version": self.VERSION} | metadata | self.asking.record(self.prompts, self.judges),
        }
        super().__init__(config=own)
        split = [f"{rate}/{category}" for rate in (REFUSAL, SUCCESS) for category in self.categories.values()]
        self._aggregation_list = dict.fromkeys([UNJUDGED, *RATES, *split], mean)
        better = {REFUSAL: self.asking.harmful, SUCCESS: not self.asking.harmful, BROKEN: False, UNJUDGED: False}
        rates = {name: name.partition("/")[0] for name in self._aggregation_list}
        self._higher_is_better = {name: better[rate] for name, rate in rates.items() if rate in better}

    def _categories(self) -> dict[str, str]:
        """Returns `{category: its name in metrics}`, which has only letters, digits and underscores; empty for none or many."""
        found = sorted({prompt["category"] for prompt in self.prompts if prompt["category"]})
        if not self.asking.categories or len(found) < 2:
            return {}
        if len(found) > MOST_CATEGORIES:
            warn_once(
                f"{self.asking.prompts} has {len(found)} categories. Rates by category are given for up to {MOST_CATEGORIES}."
            )
            return {}
        taken: set[str] = set()
        return {category: distinct(slug(category), "category", taken) for category in found}

    def download(self, dataset_kwargs=None, **kwargs) -> None:
        """Makes the harness's data set of the prompts, which are here already."""
        self.dataset = datasets.DatasetDict({SPLIT: datasets.Dataset.from_list(self.prompts)})

    def doc_to_text(self, doc, doc_to_text=None) -> str:
        return doc["instruction"]

    def doc_to_target(self, doc, doc_to_target=None) -> str:
        return str(Outcome.REFUSES if self.asking.harmful else Outcome.COMPLIES)

    def build_all_requests(
        self,
        *,
        limit=None,
        samples=None,
        world_size: int = 1,
        system_instruction=None,
        chat_template=None,
        tokenizer_name: str = "",
        **more,
    ) -> None:
        """Makes the requests. With --cache_requests, the harness would take those of another run of a task of this name, whatever
        its prompts, template or settings of generation were: here they are part of the name under which it looks."""
        if not more.get("apply_chat_template"):
            warn_once(NO_TEMPLATE)
        # The harness gathers from its processes such rates only as all of them have.
        ranks = [
            self.doc_iterator(rank=i, limit=limit, samples=samples, world_size=world_size) for i in range(world_size)
        ]
        common = set.intersection(*({doc["category"] for _, doc in rank} for rank in ranks))
        self.categories = {category: name for category, name in self.categories.items() if category in common}
        self.system_prompt = "\n\n".join(filter(None, [system_instruction, self.config.description]))
        probe = chat_template([{"role": "user", "content": "Hello"}]) if chat_template else ""
        config = self.config.generation_kwargs, self.config.description, self.config.gen_prefix
        key = json.dumps([self.prompts, samples, str(probe), *config], default=str)
        super().build_all_requests(
            limit=limit,
            samples=samples,
            world_size=world_size,
            system_instruction=system_instruction,
            chat_template=chat_template,
            tokenizer_name=f"{tokenizer_name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}",
            **more,
        )

    def apply_filters(self) -> None:
        """Judges all replies, by each judge, which the harness calls a filter. With --predict_only nothing is judged."""
        if "bypass" in self._metric_fn_list:
            super().apply_filters()
            return
        rows = [self._completion(instance) for instance in self.instances]
        known = {i: row for i, row in enumerate(rows) if row is not None}
        for judge in self.judges:
            found = dict(zip(known, judge.judge(list(known.values())), strict=True))
            for i, instance in enumerate(self.instances):
                instance.filtered_resps[judge.name] = logged(found.get(i), judge.of_refusals)
        if not self.asking.log_replies:
            for instance in self.instances:
                instance.resps = [f"sha256:{hashlib.sha256(str(text).encode()).hexdigest()}" for text in instance.resps]

    def _completion(self, instance) -> dict | None:
        """Returns the completion of a request, as judges read it; None if no reply came."""
        context, reply = instance.args[0], instance.resps[0]
        if not isinstance(reply, str):
            return None
        system = {"system_prompt": self.system_prompt} if self.system_prompt else {}
        said = thoughts.split(reply, thoughts.opened_by(str(getattr(context, "prompt", context))))
        return {"prompt": instance.doc["instruction"], "category": instance.doc["category"], **system, **said.row}

    def process_results(self, doc, results) -> dict[str, Any]:
        """Returns a prompt's value, 0 or 1, of each rate that it counts for; with --predict_only the harness's own value."""
        if "bypass" in self._metric_fn_list:
            return super().process_results(doc, results)
        (verdict,) = results
        values = {UNJUDGED: float("label" not in verdict)} | {rate: verdict[rate] for rate in RATES if rate in verdict}
        if category := self.categories.get(doc["category"]):
            values |= {f"{rate}/{category}": values[rate] for rate in (REFUSAL, SUCCESS) if rate in values}
        return values


def logged(verdict: Verdict | None, of_refusals: bool) -> dict[str, Any]:
    """Returns a verdict as logged samples hold it, with its value of each rate; empty where nothing could be judged."""
    if verdict is None:
        return {}
    row: dict[str, Any] = {"label": verdict.label, SUCCESS: float(verdict.label)}
    if verdict.probability is not None:
        row["probability"] = verdict.probability
    if verdict.outcome is not None:
        shares = {Outcome.REFUSES: REFUSAL, Outcome.DEFLECTS: DEFLECTION, Outcome.BROKEN: BROKEN}
        row["outcome"] = str(verdict.outcome)
        row |= {rate: float(verdict.outcome is outcome) for outcome, rate in shares.items()}
    elif of_refusals:
        row[REFUSAL] = 1.0 - verdict.label
    return row


def slug(category: str) -> str:
    """Returns a category's name in metrics, in which the harness's tables allow no comma."""
    return re.sub(r"\W+", "_", category).strip("_").lower() or "category"
