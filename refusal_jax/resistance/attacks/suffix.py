"""Puts a suffix behind each harmful prompt: the embedded model's own, one that is searched on its family, or the user's.

This tool ships no suffix for another model and searches none.
"""

from refusal_jax.chat.model import demo_suffix_path
from refusal_jax.errors import setting
from refusal_jax.files import local_path
from refusal_jax.mechanism.suffix_files import read_suffixes
from refusal_jax.mechanism.suffixes import check_markers
from refusal_jax.organism.identity import of_embedded_family, weights_fingerprint
from refusal_jax.organism.suffix_search import Search, search_suffix
from refusal_jax.resistance.attack import Attack, Budget, Outcome
from refusal_jax.resistance.settings import ResistSettings
from refusal_jax.resistance.subject import Subject

SHIPPED, SEARCHED, GIVEN = "shipped", "searched", "given"


def impossible(subject: Subject, settings: ResistSettings) -> str:
    """Returns why there is no suffix to try, "" if there is one."""
    if settings.suffix.file or of_embedded_family(subject.model):
        return ""
    named = setting("suffix.file", "FILE") or "suffix.file=FILE"
    return f"No suffix was given ({named}), and none is shipped or searched for a model of another family than the embedded one."


def given_suffixes(subject: Subject, file: str) -> list[str]:
    """Returns the suffix of each harmful test prompt, "" where the file has none for it. Raises UserError as `read_suffixes` and
    `check_markers` do."""
    found = read_suffixes(local_path(file), subject.texts("harmful_test"))
    for suffix in dict.fromkeys(filter(None, found)):
        check_markers(subject.model.chat, suffix)
    return [suffix or "" for suffix in found]


def searched_suffix(subject: Subject, settings: ResistSettings, budget: Budget) -> tuple[str, str]:
    """Returns the suffix that a search on the training prompts chose by the validation prompts, and why the search stopped."""
    train, val = subject.texts("harmful_train"), subject.texts("harmful_val")
    search = Search(
        tokens=settings.suffix.tokens,
        steps=settings.suffix.steps,
        prompts=min(Search.prompts, len(train)),
        first=min(Search.first, len(train)),
        held=len(val),
        seed=settings.seed,
    )
    model = subject.model
    found = search_suffix(model, [*train, *val], subject.scoring_ids(), search, weights_fingerprint(model))
    row = search.tokens + len(model.chat.post_instruction_ids)
    done = min((len(found.losses) - 1) * search.check, search.steps)
    budget.training(done * search.prompts * row)
    budget.forward(done * 2 * search.candidates * search.first * row)
    if found.refused[-1] <= search.enough:
        return found.text, f"The search stopped at step {done}, as few enough validation prompts were refused."
    return found.text, f"All {search.steps} steps of the search were done."


def run(subject: Subject, settings: ResistSettings, budget: Budget) -> Outcome:
    """Measures the given suffixes; or the one of those shipped and searched with which most validation prompts are complied
    with."""
    if settings.suffix.file:
        suffixes = given_suffixes(subject, settings.suffix.file)
        left = suffixes.count("")
        note = (
            f"The file has no suffix for {left} of {len(suffixes)} prompts, which were asked without." if left else ""
        )
        chosen = {"origin": GIVEN, "suffixes": len({*suffixes} - {""})}
        return Outcome(subject.measure(suffixes=suffixes), chosen, {}, "Nothing is searched.", note)
    known = {SHIPPED: read_suffixes(demo_suffix_path(), [""])[0] or ""}
    stop, note = "Nothing is searched.", ""
    if settings.suffix.steps and subject.scoring_ids():
        known[SEARCHED], stop = searched_suffix(subject, settings, budget)
    elif settings.suffix.steps:
        note = "No suffix was searched: no token is known that refusals begin with."
    tried = {name: subject.measure(suffixes=text, split="val", budget=budget) for name, text in known.items()}
    origin = max(tried, key=lambda name: tried[name].complied.rate)  # the first of equals
    refused = {name: one.refusals.rate if one.refusals.n else None for name, one in tried.items()}
    chosen = {"origin": origin, "refused_by_origin": refused}
    used = {"steps": settings.suffix.steps} if SEARCHED in known else {}
    return Outcome(subject.measure(suffixes=known[origin]), chosen, used, stop, note)


ATTACK = Attack(
    "suffix",
    "Puts a suffix behind each harmful prompt: the embedded model's, on models of its family, or those of your file.",
    run,
    impossible,
    settings=("suffix",),
)
