"""Puts a suffix behind each harmful prompt: the embedded model's own, one that is searched on its family, or the user's.

This tool ships no suffix for another model and searches none.
"""

from refusal_jax.chat.model import demo_suffix_path
from refusal_jax.errors import setting
from refusal_jax.files import local_path
from refusal_jax.mechanism.suffix_files import read_suffixes
from refusal_jax.mechanism.suffixes import check_markers
from refusal_jax.organism.identity import is_embedded, of_embedded_family, weights_fingerprint
from refusal_jax.organism.suffix_search import Found, Search, search_suffix
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


def unsearched(subject: Subject) -> str:
    """Returns why no suffix is searched on a model of the embedded family, "" if one can be."""
    if not subject.scoring_ids():
        return "No suffix was searched: no token is known that refusals begin with."
    if not is_embedded(subject.model, weights_fingerprint(subject.model)):
        return "No suffix was searched: the model has other sizes than the embedded one, and on those alone it is done."
    return ""


def searched_suffix(subject: Subject, settings: ResistSettings, budget: Budget) -> tuple[Found, str]:
    """Returns what a search on the training prompts found, chosen by the validation prompts, and why it stopped."""
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
    found = search_suffix(
        model, [*train, *val], subject.scoring_ids(), search, weights_fingerprint(model), lambda: budget.over
    )
    row = search.tokens + len(model.chat.post_instruction_ids)
    done = found.steps
    budget.training(done * search.prompts * row)
    budget.forward(done * 2 * search.candidates * search.first * row)
    if found.refused[-1] <= search.enough:
        return found, f"The search stopped at step {done}, as few enough validation prompts were refused."
    if done < search.steps:
        return found, f"It stopped after its {budget.seconds:g} seconds, at step {done} of {search.steps}."
    return found, f"All {search.steps} steps of the search were done."


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
    stop, used, note = "Nothing is searched.", {}, unsearched(subject) if settings.suffix.steps else ""
    if settings.suffix.steps and not note:
        searched, stop = searched_suffix(subject, settings, budget)
        known[SEARCHED], used = searched.text, {"steps": searched.steps, "of": settings.suffix.steps}
    tried = {name: subject.measure(suffixes=text, split="val", budget=budget) for name, text in known.items()}
    origin = max(tried, key=lambda name: tried[name].complied.rate)  # the first of equals
    refused = {name: one.refusals.rate if one.refusals.n else None for name, one in tried.items()}
    chosen = {"origin": origin, "refused_by_origin": refused}
    return Outcome(subject.measure(suffixes=known[origin]), chosen, used, stop, note)


ATTACK = Attack(
    "suffix",
    "Puts a suffix behind each harmful prompt: the embedded model's, on models of its family, or those of your file.",
    run,
    impossible,
    settings=("suffix",),
)
