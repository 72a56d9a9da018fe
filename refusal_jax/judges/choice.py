"""All available judges, and the choice among them by name."""

from collections.abc import Sequence

import jax

from refusal_jax.errors import UserError, did_you_mean
from refusal_jax.judges.asked import ENDPOINT, EndpointJudge
from refusal_jax.judges.judge import Judge
from refusal_jax.judges.models import KINDS, ModelJudge
from refusal_jax.judges.rules import RULES, RuleJudge
from refusal_jax.judges.scores import REFUSAL_SCORE, RefusalScore
from refusal_jax.judges.text import TEXT_JUDGES
from refusal_jax.judges.words import WORD_JUDGES, WordJudge

WITHOUT_MODEL: dict[str, Judge] = {judge.name: judge for judge in (*TEXT_JUDGES.values(), RuleJudge(), RefusalScore())}
REFUSAL_JUDGES = tuple(
    name for name, judge in WITHOUT_MODEL.items() if judge.of_refusals
)  # by which refusals are counted


def parse_judges(
    specs: Sequence[str],
    batch_size: int,
    dtype: str = "auto",
    mesh: jax.sharding.Mesh | None = None,
    cache: str = "",
) -> list[Judge]:
    """Returns the judges of specs, `NAME` for a judge without a model, `uses=WORDS` or `avoids=WORDS` for one of words,
    `KIND=MODEL` or `KIND=MODEL@TEMPLATE.txt` for a model, `endpoint=URL#MODEL` for one behind a server.

    The name of a judge model is its kind. Checks all that needs no weights: raises UserError for an unknown or repeated judge, a
    model without folder, tokenizer or the expected tokens, and a template file that is missing or without a place for request
    and completion.
    """
    judges: list[Judge] = []
    for spec in specs:
        name, _, rest = spec.partition("=")
        if name in WITHOUT_MODEL and not rest:
            judges.append(WITHOUT_MODEL[name])
        elif name == ENDPOINT:
            judges.append(EndpointJudge.of(rest))
        elif name in WORD_JUDGES:
            judges.append(WordJudge.of(name, rest))
        elif name not in KINDS:
            hint = did_you_mean(name, [*WITHOUT_MODEL, *WORD_JUDGES, *KINDS, ENDPOINT])
            raise UserError(
                f"there is no judge {spec!r}.{hint} Judges of text: {', '.join(TEXT_JUDGES)}, {RULES}; of words: "
                f"{', '.join(f'{judge}=WORDS' for judge in WORD_JUDGES)}. Judge models, written "
                f"KIND=MODEL or KIND=MODEL@TEMPLATE.txt: {', '.join(KINDS)}. A model behind a server: {ENDPOINT}=URL#MODEL. In a "
                f"study also {REFUSAL_SCORE}."
            )
        elif not rest:
            raise UserError(f"the judge {name!r} is a model: name its folder or its name on the hub, as {name}=MODEL.")
        else:
            folder, _, template = rest.rpartition("@") if rest.endswith(".txt") else (rest, "", "")
            judges.append(ModelJudge.load(name, folder, template, batch_size, dtype, cache).on(mesh))
        if name in [judge.name for judge in judges[:-1]]:
            raise UserError(f"two judges are called {name!r}: their columns would be mixed up. Judge in two runs.")
    if not judges:
        raise UserError(f"no judges: name at least one, such as {next(iter(TEXT_JUDGES))}.")
    return judges
