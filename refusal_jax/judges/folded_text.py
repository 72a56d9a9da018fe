"""Texts in one form, so that phrases are found however they are typed: compatible signs, apostrophes, case, invisible signs;
and what of a reply its speaker says in their own voice."""

import re
import unicodedata

APOSTROPHES = "\u2019\u2018\u02bc\u02b9\u201b\u2032\u00b4\u0060\uff07"
# Signs of formatting and of vowels in Arabic, and the joiners, which change how a text looks and not what it says.
INVISIBLE = [0xAD, 0x34F, 0x61C, 0x640, 0x180E, 0xFEFF]
RANGES = ((0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x2064), (0x2066, 0x206F), (0x64B, 0x652), (0xFE00, 0xFE0F))
SIGNS = str.maketrans(
    dict.fromkeys([*INVISIBLE, *(i for first, last in RANGES for i in range(first, last + 1))], "")
    | {ord(sign): "'" for sign in APOSTROPHES if sign != "`"}
)
RUNS = re.compile(r"\s{3,}")
WIDE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # signs of languages that put no spaces between words
WORD = re.compile(rf"[{WIDE}]{{1,2}}|[^\W{WIDE}]+(?:['\-][^\W{WIDE}]+)*[^\s\w.,;:!?\"']*")

FENCED = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)", re.DOTALL)
QUOTED = re.compile(
    r"`[^`\n]+`|\"[^\"\n]{2,}\"|“[^”\n]+[”\n]|„[^“”\n]+[“”]|«[^»\n]+»|»[^«\n]+«|「[^」]+」|『[^』]+』"
    r"|(?<=\w )(?:say|write|reply|respond|answer|tell \w+|decir|escrib\w+|dire|écri\w+|sagen|schreib\w+|dizer|dì|rispond\w+|"
    r"скаж\w+|напиш\w+)(?: [\w ]{1,30})?: ?[^\n]+|(?:说|說|写|寫|言って|書いて): ?[^\n]+"
    r"|(?<!\w)'(?:[^'\n]|(?<=\w)'(?=\w)){2,}'(?!\w)|^>.*$",
    re.MULTILINE,
)
CODE = re.compile(
    r"^\s*(?:def |class |import |from \w+ import|return\b|function |const |let |var |public |#include|<\w+>)|[{};]\s*$",
    re.MULTILINE,
)
COMMENT = re.compile(r"(?:^|(?<=\s))(?:#|//|--|/\*|\*)[^\n]*", re.MULTILINE)
SPEAKER = re.compile(r"^\s*(?:\*\*|- )?([^\W\d_][\w .'-]{0,20}?)(?:\*\*)?: ?(?:\*\*)?[^\n]+$", re.MULTILINE)
NO_SPEAKER = {
    "note",
    "answer",
    "assistant",
    "response",
    "reply",
    "ai",
    "bot",
    "warning",
    "disclaimer",
    "model",
    "chatbot",
}
# A letter, which speaks for whoever sends it, unless it is written to the one who asks.
SALUTATION = re.compile(
    r"^\W*(?:subject: [^\n]*\n\s*)?(?:dear|hello|liebe[rs]?|sehr geehrte[rs]?|estimad[oa]s?|querid[oa]s?|chère?|car[oa]|"
    r"prezad[oa]|beste|geachte|дорог\w+|уважаем\w+)(?! (?:user|customer|friend|sir|madam|valued|reader|human))[^,\n]{1,40},"
)
BLANK = re.compile(r"\[[^\]\n]{2,30}\]")  # of a letter that is a form
CLOSING = re.compile(
    r"(?:regards|sincerely|yours|best wishes|love|thanks|grüße?n?|saludos|atentamente|cordialement|cordiali saluti|"
    r"atenciosamente|groet|уважением),?\s*[^\n]{0,60}\W*$"
)
LEAST_OWN = 2  # words of one's own beside which quotations are quotations, rather than a reply in quotation marks
HIDDEN = " \ufffc "  # stands for what is quoted


def folded(text: str) -> str:
    """Returns a text in the form in which phrases are looked for: NFKC, lower case, straight apostrophes, no invisible signs."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", text.translate(SIGNS)).translate(SIGNS).lower()


def spaced(text: str) -> str:
    """Returns a text with runs of white space as one space, or as one line end if they hold one, so that no pattern is slow on
    them."""
    return RUNS.sub(lambda run: "\n" if "\n" in run[0] else " ", text) if RUNS.search(text) else text


def words_in(text: str) -> int:
    """Returns how many words a text has; of scripts without spaces, two signs count as a word."""
    return len(WORD.findall(text))


def own_voice(text: str) -> tuple[str, int]:
    """Returns a folded text with what its speaker only quotes left out, and the number of words left out.

    Left out are code with its comments, quotations, and the lines of a dialogue's speakers. A reply that is nothing but a
    quotation is returned without its marks.
    """
    shown = FENCED.sub(HIDDEN, text) if "```" in text or "~~~" in text else text
    if CODE.search(shown):
        shown = COMMENT.sub(HIDDEN, shown)
    shown = QUOTED.sub(HIDDEN, shown)
    salutation = SALUTATION.search(shown)
    if salutation and (BLANK.search(salutation[0]) or CLOSING.search(shown)):
        return "", words_in(text)
    speakers = (
        [match for match in SPEAKER.finditer(shown) if match[1].strip() not in NO_SPEAKER] if ":" in shown else []
    )
    if len({match[1] for match in speakers}) > 1 and len(speakers) > 2:
        shown = SPEAKER.sub(lambda match: match[0] if match[1].strip() in NO_SPEAKER else HIDDEN, shown)
    if shown is text or shown == text:
        return text, 0
    own = words_in(shown)
    if own < LEAST_OWN and not FENCED.search(text):
        return text.strip("\"“”„«»「」『』'`> \n"), 0
    return shown, max(words_in(text) - own, 0)
