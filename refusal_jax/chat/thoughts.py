"""Splits thoughts from replies: models that reason write thoughts between marks, before they address the user.

Refusals, lengths and damage are measured on the reply alone, so thoughts are split off once, where replies are made or
read.
"""

import dataclasses
import re

# How thoughts open and close, by family: Qwen, DeepSeek and most others; prompted models; Seed; MiniMax M3; Magistral; Cohere;
# Kimi; Kimi K3; OpenThinker; gpt-oss; Solar; Gemma 4; MedGemma; Granite 3; Apriel.
MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("<|think|>", "<|content|>"),
    ("<|channel>thought", "<channel|>"),
    ("<unused94>thought", "<unused95>"),
    ("Here is my thought process:", "Here is my response:"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)
STRIPPED = ("analysis", "assistantfinal")  # what decoding without special tokens leaves of gpt-oss's marks
OPENS = frozenset([STRIPPED[0], *(opening.lower() for opening, _ in MARKS)])
# Marks of thoughts that open in plain words.
IN_WORDS = frozenset([*STRIPPED, *(m.lower() for pair in MARKS if pair[0].startswith("Here ") for m in pair)])


def _pattern(mark: str) -> str:
    """Returns a regular expression for a mark. The channel of gpt-oss may name a format before its message."""
    return re.escape(mark).replace(re.escape("final<|message|>"), r"final(?:[^<]|<\|constrain\|>)*<\|message\|>")


ANY = re.compile(
    "|".join(
        [rf"(?-i:\A{STRIPPED[0]}(?=[A-Z])|{STRIPPED[1]})", *(_pattern(mark) for marks in MARKS for mark in marks)]
    ),
    re.IGNORECASE,
)
# What may stand before a mark, or after a reply, where special tokens were decoded too.
SPECIAL = r"<\|[^|<>]*\|>|</?s>|<bos>|<eos>|<(?:start|end)_of_turn>"
NOTHING = re.compile(rf"(?:{SPECIAL}|assistant|model|\s)*")
ENDS = re.compile(rf"(?:\s*(?:{SPECIAL}))+\Z")


@dataclasses.dataclass(frozen=True)
class Reply:
    """A generated reply in two parts: `thought`, with its marks, is empty where there was none, and `text` is what follows
    it. finished: whether the thought ended; if it did not, there is no text."""

    thought: str
    text: str
    finished: bool = True

    @property
    def inner(self) -> str:
        """Returns the thought without its marks."""
        return ANY.sub("", self.thought).strip()

    @property
    def row(self) -> dict:
        """Returns the reply as fields of a completion: "thought" only if there is one, "thought_ended" only if it did
        not end."""
        thought = {"thought": self.thought} if self.thought else {}
        return {"response": self.text, **thought, **({} if self.finished else {"thought_ended": False})}


def split(generated: str, opened: str = "") -> Reply:
    """Splits the thought from generated text, which is stripped of white space at both ends.

    opened: what the prompt had opened already (`opened_by`), which is put before the text. A thought begins with an opening mark
    at the start or the end of a line and ends with the next closing mark; marks within a line are only talked about. Words close
    what words opened, tags what tags opened. A closing tag that nothing opened ends a thought too, as templates that open one
    leave no trace of it in the reply.
    """
    whole = ENDS.sub("", (opened + generated).strip())
    said, inside, mentioned = 0, "", False  # said: where what is said begins; inside: the mark that opened the thought
    for mark in ANY.finditer(whole):
        if mark[0].lower() in OPENS:
            first = NOTHING.fullmatch(whole[said : mark.start()].rpartition("\n")[2])
            real = first or whole.startswith("\n", mark.end())
            inside, mentioned = inside or (mark[0] if real else ""), not (inside or real)
        elif is_tag(mark[0]) == is_tag(inside) if inside else is_tag(mark[0]) and not (said or mentioned):
            said, inside = mark.end(), ""
    if inside:
        return Reply(whole, "", finished=False)
    text = whole[said:].strip()
    return Reply(whole[: len(whole) - len(text)] if said else "", text)


def is_tag(mark: str) -> bool:
    """Returns whether a mark is written with signs that no ordinary sentence has, or closes what such a mark opened, rather than
    what words opened."""
    return mark.lower() not in IN_WORDS


def opened_by(prompt: str) -> str:
    """Returns the mark that a prompt ends in and that opens a thought, with the white space after it; "" if there is none."""
    marks = list(ANY.finditer(prompt))
    last = prompt[marks[-1].start() :] if marks and marks[-1][0].lower() in OPENS else ""
    return last if last and not last[len(marks[-1][0]) :].strip() else ""


def closing(opened: str) -> str:
    """Returns what closes a thought that a prompt opened, before anything is thought: the closing mark and, where the opening one
    has a line of its own, the line ends around it. opened: as from `opened_by`."""
    mark = next(close for mark, close in MARKS if opened.lower().startswith(mark.lower()))
    return f"\n{mark}\n\n" if opened.endswith("\n") else mark


def first_mark(text: str) -> int:
    """Returns where the first mark of a thought begins in a text; its length, if there is none."""
    mark = ANY.search(text)
    return mark.start() if mark else len(text)


def outside(text: str) -> str:
    """Returns what a template writes outside of thoughts, without the white space after them."""
    parts, at, inside = [], 0, False
    for mark in ANY.finditer(text):
        parts += [] if inside else [text[at : mark.start()]]
        inside, at = mark[0].lower() in OPENS, mark.end()
    return "".join([*parts, "" if inside else text[at:].lstrip() if at else text])


def is_marked(text: str) -> bool:
    """Returns whether a text holds a mark of a thought."""
    return ANY.search(text) is not None


def is_unfinished(completion: dict) -> bool:
    """Returns whether a completion never left its thought, so that it says nothing that could be judged."""
    return completion.get("thought_ended") is False
