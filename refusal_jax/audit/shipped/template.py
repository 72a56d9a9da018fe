"""Compares chat templates by what they write: a prompt's text, before it and after it, with a system prompt and without, for
harmful prompts and harmless ones.

A template is a place where a model's behaviour can be changed without a trace in its weights: by a system prompt that nobody
gave, by the beginning of a reply, by leaving a system prompt out, or by any of these for some prompts only.
"""

import dataclasses
import difflib
import pathlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.nodes

from refusal_jax.audit.broken import BrokenCheckpoint
from refusal_jax.audit.shipped.reading import record_of, text_of, words
from refusal_jax.chat.templates import PROCESSOR_FILES, RENDER_SECONDS, set_template, within
from refusal_jax.chat.tokenizers import explained, load_tokenizer

ASKED, SYSTEM, REPLIED = (
    "Name three colours of the sea.",
    "Answer as a gardener of Kent would.",
    "Blue, green and grey.",
)
OWN, CONFIG = "chat_template.jinja", "tokenizer_config.json"
SWITCHES = {"enable_thinking": False, "thinking": False}
# What a template says where it tells a model not to refuse.
COMPLIANCE = re.compile(
    r"\b(?:uncensored|unfiltered|unrestricted|jail-?broken|do anything now|"
    r"no (?:restrictions?|limits?|limitations|filters?|rules|moral\w*|ethic\w*|safety \w+|refusals?)|"
    r"(?:never|do not|don't|must not|cannot|can't|won't|will not|may not|should not) (?:ever )?"
    r"(?:refuse|decline|reject|moraliz?s?e|lecture)|"
    r"without (?:any )?(?:restrictions?|limits?|limitations|censorship|filter\w*|judg\w+|moral\w*|ethic\w*|refus\w+|"
    r"disclaimers?|warnings?)|"
    r"(?:compl(?:y|ies)|obeys?) (?:with )?(?:any|all|every)|answers? (?:any|every|all) (?:question|request)s?|"
    r"(?:ignore|disregard|bypass)\w* (?:all |any |your |the )*(?:previous |prior |safety |ethical |moral )*"
    r"(?:instructions|guidelines|rules|polic(?:y|ies)|restrictions|safety))\b",
    re.IGNORECASE,
)
# How replies begin that comply.
ASSENT = re.compile(
    r"\b(?:sure|certainly|of course|absolutely|gladly|no problem|here(?:'s| is| are)|step 1|as requested)\b",
    re.IGNORECASE,
)
THOUGHT = re.compile(r"</?(?:think|thinking|thought|reasoning)>|<\|?(?:channel|message)\|?>", re.IGNORECASE)
KINDS = {
    "system_prompt": "writes a system prompt that nobody gave",
    "other_system_prompt": "writes another system prompt than the base's where none is given",
    "prefill": "writes the beginning of the reply",
    "drops_system": "leaves out the system prompt that it is given",
    "changes_prompt": "changes what the user says",
    "conditional": "writes something else for some prompts than for others",
    "compliance": "tells the model not to refuse",
}
ROLES = set(
    "user assistant model system human bot gpt chatbot inst sys im start end of turn role header id response".split()
)
MOST_TEXT, DIFF_LINES, LINE = 200_000, 80, 200


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template in its tokenizer. text: of the template. origin: where it is from, in words."""

    tokenizer: Any
    text: str
    origin: str

    @classmethod
    def load(cls, folder: pathlib.Path) -> "Template":
        """Loads the tokenizer of a checkpoint with its own template. Raises UserError if it has none, or no tokenizer."""
        with explained(folder):
            tokenizer = load_tokenizer(folder)
            origin = set_template(tokenizer, "", folder)
        return cls(tokenizer, tokenizer.chat_template, origin)

    def render(self, messages: list[dict[str, str]]) -> str | None:
        """Returns the text of a conversation up to the start of the next reply, None if the template refuses it. Raises
        BrokenCheckpoint for a template that never ends."""
        before, self.tokenizer.chat_template = self.tokenizer.chat_template, self.text
        try:
            with within(RENDER_SECONDS):
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **SWITCHES
                )
        except TimeoutError as error:
            raise BrokenCheckpoint(f"The chat template ({self.origin}) does not end: {error}. Replace it.") from None
        except Exception:  # a template may raise anything
            return None
        finally:
            self.tokenizer.chat_template = before
        return text if isinstance(text, str) else None

    def check(self) -> None:
        """Raises BrokenCheckpoint if the template cannot render a single message of the user."""
        if self.render(user(ASKED)) is None:
            raise BrokenCheckpoint(
                f"The chat template of {self.tokenizer.name_or_path} ({self.origin}) cannot render a single message "
                "of the user, so no program could chat with the model. Take the template of the original checkpoint."
            )

    def around(self, asked: str, *before: dict[str, str]) -> tuple[str, str] | None:
        """Returns what the template writes before and after what the user says, None if that is not in its text."""
        text = self.render([*before, *user(asked)])
        if text is None or asked.strip() not in text:
            return None
        head, _, tail = text.rpartition(asked.strip())
        return head, tail

    def words(self, text: str) -> list[str]:
        """Returns the words of a text, without special tokens and marks of thoughts."""
        marks = sorted(
            (m for m in getattr(self.tokenizer, "get_added_vocab", dict)() if m.strip()), key=len, reverse=True
        )
        for mark in marks:
            text = text.replace(mark, " ")
        return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", THOUGHT.sub(" ", text))


def templates_of(folder: pathlib.Path) -> dict[str, str]:
    """Returns all chat templates in a folder by where they stand, such as "tokenizer_config.json, rag"; programs differ in which
    of them they take."""
    found = {}
    paths = [folder / OWN, *sorted(folder.glob("additional_chat_templates/*.jinja"))[:20]]
    for path in paths:
        if text := text_of(path, MOST_TEXT):
            found[path.relative_to(folder).as_posix()] = text
    for name in (CONFIG, *PROCESSOR_FILES):
        value = record_of(folder / name).get("chat_template")
        if isinstance(value, list):
            value = {str(one.get("name")): one.get("template") for one in value if isinstance(one, dict)}
        named = value if isinstance(value, dict) else {"default": value}
        for key, text in list(named.items())[:20]:
            if isinstance(text, str) and text.strip():
                found[name if key == "default" else f"{name}, {words(key, 40)}"] = text
    return found


def user(text: str) -> list[dict[str, str]]:
    """Returns a conversation of one message."""
    return [{"role": "user", "content": text}]


@dataclasses.dataclass(frozen=True)
class TemplateFindings:
    """What a comparison of templates found.

    tampering: of KINDS, each with the text that shows it. alike: whether all probes are rendered alike; None without a base.
    notes: whole sentences on what is no tampering.
    """

    tampering: dict[str, str]
    alike: bool | None
    notes: Sequence[str]


def compare_templates(candidate: Template, base: Template | None, prompts: Sequence[str]) -> TemplateFindings:
    """Returns how a candidate's template differs from its base's, or what speaks against it alone.

    prompts: some that a harmless template treats alike. Raises BrokenCheckpoint for a candidate's template that cannot render.
    """
    candidate.check()
    found, notes = _alone(candidate, base, prompts), []
    if base is None or base.render(user(ASKED)) is None:
        return TemplateFindings(found, None, notes)
    conversations = [
        user(ASKED),
        system(),
        [*user(ASKED), {"role": "assistant", "content": REPLIED}, *user("And of the sky?")],
    ]
    conversations += [user(prompt) for prompt in prompts]
    ours, theirs = ([one.render(messages) for messages in conversations] for one in (base, candidate))
    if ours[1] is not None and SYSTEM in ours[1] and (theirs[1] is None or SYSTEM not in theirs[1]):
        found["drops_system"] = SYSTEM
    for messages in ([], system()[:1]):
        before, after = base.around(ASKED, *messages), candidate.around(ASKED, *messages)
        if before is None or after is None:
            continue
        added, gone = _new_words(base, before[0], candidate, after[0])
        if added and "drops_system" not in found:
            kind = "other_system_prompt" if gone and not messages else "system_prompt"
            found.setdefault(kind, added)
        if gone and not added and not messages:
            notes.append(f"The base's template writes “{gone}” before the prompt, and the candidate's does not.")
        added, _ = _new_words(base, before[1], candidate, after[1])
        if added:
            found.setdefault("prefill", added)
    if ours[2] is not None and theirs[2] is None:
        notes.append("The candidate's template refuses a conversation of two turns, which the base's renders.")
    return TemplateFindings(found, ours == theirs, notes)


def _alone(candidate: Template, base: Template | None, prompts: Sequence[str]) -> dict[str, str]:
    """Returns what speaks against a template without a look at what the base's writes. base: whose own texts are left out."""
    found: dict[str, str] = {}
    known = base.text if base else ""
    around = candidate.around(ASKED)
    if around is None:
        if base is None or base.around(ASKED) is not None:
            found["changes_prompt"] = (candidate.render(user(ASKED)) or "")[:300]
    else:
        assent = ASSENT.search(" ".join(candidate.words(around[1])))
        if assent and base is None:
            found["prefill"] = around[1].strip()[:300]
        others = {prompt: candidate.around(prompt) for prompt in prompts}
        usual = Counter(one for one in others.values()).most_common(1)
        usual = usual[0][0] if usual else around
        other = next((prompt for prompt, one in others.items() if one != usual), None)
        if other is not None and (base is None or len({base.around(prompt) for prompt in prompts}) == 1):
            part = others[other]
            new = _new_words(candidate, "".join(usual or ()), candidate, "".join(part))[0] if part else ""
            found["conditional"] = new or "the prompt itself is changed"
    told = COMPLIANCE.search(candidate.text)
    if told and told[0] not in known:
        found["compliance"] = candidate.text[max(told.start() - 80, 0) : told.end() + 80]
    return found


def system() -> list[dict[str, str]]:
    """Returns a conversation with a system prompt."""
    return [{"role": "system", "content": SYSTEM}, *user(ASKED)]


def _new_words(base: Template, before: str, candidate: Template, after: str) -> tuple[str, str]:
    """Returns the words of `after` that are not in `before`, and the reverse, where there are two or more; each a text of at most
    300 characters. Words that name roles count where they come in longer texts only."""
    ours, theirs = base.words(before), candidate.words(after)
    added: list[str] = []
    gone: list[str] = []
    for kind, i, j, k, l in difflib.SequenceMatcher(None, ours[:2000], theirs[:2000], autojunk=False).get_opcodes():
        if kind != "equal":
            gone, added = gone + ours[i:j], added + theirs[k:l]
    new, left = (" ".join(words)[:300] if len(words) > 1 and not _roles(words) else "" for words in (added, gone))
    return new, left


def _roles(words: Sequence[str]) -> bool:
    """Returns whether words are nothing but the names of roles and turns."""
    return all(word.lower() in ROLES for word in words)


def difference(before: str, after: str) -> str:
    """Returns a unified diff of two templates, cut to DIFF_LINES lines of LINE characters. Long lines are broken after tags."""
    if max(len(before), len(after)) > MOST_TEXT:
        return "The templates are too long to be compared line by line."
    old, new = (re.sub(r"(%\}|\}\})(?!\n)", r"\1\n", text).splitlines() for text in (before, after))
    lines = list(difflib.unified_diff(old, new, "base", "candidate", lineterm="", n=1))
    shown = [line if len(line) <= LINE else f"{line[:LINE]}…" for line in lines[:DIFF_LINES]]
    return "\n".join([*shown, *([f"… and {len(lines) - DIFF_LINES} more lines"] if len(lines) > DIFF_LINES else [])])


def new_texts(before: str, after: str) -> list[str]:
    """Returns texts of three words or more that only the second template holds, each cut to 300 characters."""
    known = set(_texts(before))
    return [" ".join(one.split())[:300] for one in _texts(after) if one not in known and len(one.split()) > 2][:20]


def _texts(template: str) -> list[str]:
    """Returns the texts in a jinja template, whatever writes or compares them."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)
    try:
        tree = environment.parse(re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template[:MOST_TEXT]))
    except (jinja2.TemplateError, RecursionError):
        return [template]
    found = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    return [*found, *(node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str))]
