"""Makes a tokenizer's files, as HF has them, from the metadata of a GGUF file.

The file holds the vocabulary and the merges (or scores that tell their order), and names how text is split before; the patterns
that go with the names are those of the models' own tokenizers. A name that is not known here is an error, because another
pattern gives other tokens for some texts.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from refusal_jax.errors import UserError, shown
from refusal_jax.files import to_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
SPACE = "\u2581"  # that stands for a space in SentencePiece's vocabularies
WORDS, REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class Splitting:
    """How a byte-level tokenizer splits text before it merges.

    patterns: each cuts its matches out of what the one before left. gpt2: whether GPT-2's own pattern comes last. digits:
    whether digits stand alone. whole: whether a piece that is in the vocabulary is taken without merges. bos: whether texts begin
    with a token where the file does not say. nfc: whether text is normalised first.
    """

    patterns: tuple[str, ...] = ()
    gpt2: bool = False
    digits: bool = False
    whole: bool = False
    bos: bool = False
    nfc: bool = False


GPT_2, DIGITS = Splitting(gpt2=True), Splitting(gpt2=True, digits=True)
LLAMA_3 = Splitting((rf"{SHORT}|{WORDS}|\p{{N}}{{1,3}}|{REST}",), whole=True, bos=True)
QWEN_2 = Splitting((rf"{SHORT}|{WORDS}|\p{{N}}|{REST}",), nfc=True)
GPT_4O = Splitting((rf"{BEFORE}{UPPER}*{LOWER}+{SHORT}?|{BEFORE}{UPPER}+{LOWER}*{SHORT}?|\p{{N}}{{1,3}}|{CASED_REST}",))
TEKKEN = Splitting((rf"{BEFORE}{UPPER}*{LOWER}+|{BEFORE}{UPPER}+{LOWER}*|\p{{N}}|{CASED_REST}",), whole=True, bos=True)
DEEPSEEK_3 = Splitting(
    (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
DEEPSEEK_CODER = Splitting(
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"), digits=True
)
SEED = Splitting((rf"{SHORT}|{WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",))
SPLITTINGS: dict[str, Splitting] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mellum", "exaone4", "trillion", "a.x-4.0", "gigachat"), GPT_2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "exaone", "minerva-7b", "codeshell"), DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"), LLAMA_3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), dataclasses.replace(LLAMA_3, whole=False, bos=False)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez"), QWEN_2),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), GPT_4O),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), DEEPSEEK_3),
    "tekken": TEKKEN,
    "deepseek-coder": DEEPSEEK_CODER,
    "seed-coder": SEED,
}
BY_ARCHITECTURE = {"qwen2": "qwen2", "qwen3": "qwen2", "qwen3moe": "qwen2"}  # of files that name none
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
ENDS = ("eos", "eot", "eom")  # whose tokens end a reply


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokenizer as a GGUF file describes it. where: the file. types: of each token. roles: ids by their part in `ROLES`."""

    where: pathlib.Path
    model: str
    splitting: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]] | None
    roles: dict[str, int]
    metadata: Mapping[str, Any]

    @classmethod
    def of(cls, metadata: Mapping[str, Any], where: pathlib.Path) -> "Vocabulary":
        """Takes the tokenizer out of a file's metadata. Raises UserError if it is missing, malformed or not supported."""

        def take(key: str, default: Any = None) -> Any:
            return metadata.get(f"tokenizer.ggml.{key}", default)

        model, tokens, architecture = take("model"), take("tokens"), metadata.get("general.architecture")
        if model is None or not isinstance(tokens, list) or not tokens or not all(type(t) is str for t in tokens):
            raise UserError(f"{where} holds no tokenizer (tokenizer.ggml.model and tokens). {_ADVICE}")
        model = "llama" if model == "gemma4" else model  # whose merges the file holds
        if model not in ("gpt2", "llama"):
            raise UserError(
                f"{where} has a tokenizer of the kind {shown(model)}, and 'gpt2' (byte-level) and 'llama' (SentencePiece) are "
                f"read. {_ADVICE}"
            )
        splitting = take("pre") if take("pre") not in (None, "default") else BY_ARCHITECTURE.get(str(architecture))
        if model == "gpt2" and splitting not in SPLITTINGS:
            raise UserError(
                f"{where} splits text in a way called {shown(take('pre'))} (tokenizer.ggml.pre), which is not known, so some "
                f"texts would get wrong tokens. {_ADVICE}"
            )
        count = len(tokens)
        types, scores, merges = take("token_type", [NORMAL] * count), take("scores", [0.0] * count), take("merges")
        roles = {key: take(f"{key}_token_id") for key in (*ROLES.values(), *ENDS[1:])}
        roles = {key: value for key, value in roles.items() if value not in (None, 2**32 - 1)}
        bad = [key for key, value in roles.items() if type(value) is not int or not 0 <= value < count]
        right = all(isinstance(one, list) and len(one) == count for one in (types, scores))
        pairs = [pair for merge in merges or () if (pair := _pair(merge))] if isinstance(merges, list | None) else []
        right = (
            right and len(set(tokens)) == count and len(pairs) == len(merges or ()) and bool(pairs or model == "llama")
        )
        if bad or not right:
            found = f"{bad[0]}_token_id is {shown(roles[bad[0]])}" if bad else "its lists do not fit together"
            raise UserError(f"{where} holds a damaged tokenizer of {count:,} tokens: {found}. {_ADVICE}")
        return cls(where, model, splitting or "", tokens, types, scores, pairs or None, roles, metadata)

    def flag(self, key: str, default: bool) -> bool:
        """Returns a setting that is true or false."""
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        return value if isinstance(value, bool) else default

    def text(self, role: str) -> str | None:
        """Returns the token that plays a part, None if there is none."""
        return self.tokens[self.roles[role]] if role in self.roles else None


_ADVICE = (
    "Put the file into a folder of its own together with tokenizer.json and tokenizer_config.json of the original model, and "
    "pass that folder."
)


def _pair(merge: Any) -> tuple[str, str] | None:
    """Returns the two parts of a merge, None if it has none. The first may begin with a space."""
    at = merge.find(" ", 1) if isinstance(merge, str) else -1
    return (merge[:at], merge[at + 1 :]) if at > 0 else None


def write_tokenizer(metadata: Mapping[str, Any], where: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, generation_config.json and, if the file has one, chat_template.jinja.

    where: the GGUF file. Raises UserError if its tokenizer is missing, malformed or not supported.
    """
    words = Vocabulary.of(metadata, where)
    try:
        tokenizer = _byte_level(words) if words.model == "gpt2" else _sentencepiece(words)
        tokenizer.add_special_tokens(_added(words, CONTROL, True))
        tokenizer.add_tokens(_added(words, USER_DEFINED, False))
        tokenizer.save(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{where} holds a tokenizer that cannot be built ({str(error)[:300]}). {_ADVICE}") from None
    write_settings(words, folder)


def write_settings(words: Vocabulary, folder: pathlib.Path) -> None:
    """Writes what a tokenizer's files say beside its vocabulary."""
    roles = {role: words.text(key) for role, key in ROLES.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | {
        role: text for role, text in roles.items() if text is not None
    }
    (folder / "tokenizer_config.json").write_bytes(to_json(settings))
    ends = list(dict.fromkeys(words.roles[key] for key in ENDS if key in words.roles))
    generation = {"eos_token_id": ends} if ends else {}
    (folder / "generation_config.json").write_bytes(to_json(generation))
    template = words.metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        (folder / "chat_template.jinja").write_bytes(template.encode("utf-8", "replace"))


def _added(words: Vocabulary, kind: int, special: bool) -> list:
    """Returns the tokens of a type, which are found whole in a text before it is split."""
    from tokenizers import AddedToken

    strip = (
        words.model == "llama" and words.metadata.get("general.architecture") == "phi3"
    )  # what follows Phi-3's marks
    kept = ("<unk>", "<s>", "<|endoftext|>")
    found = (_spelt(words, i) for i, own in enumerate(words.types) if own == kind)
    return [AddedToken(t, normalized=False, special=special, rstrip=strip and t not in kept) for t in found]


def _spelt(words: Vocabulary, index: int) -> str:
    """Returns a token as HF spells it: llama.cpp writes the spaces of a user's tokens as spaces."""
    token = words.tokens[index]
    return token.replace(" ", SPACE) if words.model == "llama" and words.types[index] == USER_DEFINED else token


def _vocabulary(words: Vocabulary) -> dict[str, int]:
    """Returns the ids of all tokens but those that only fill the embedding up."""
    return {
        _spelt(words, i): i
        for i, token in enumerate(words.tokens)
        if not (words.types[i] == UNUSED and token == f"[PAD{i}]")
    }


def _byte_level(words: Vocabulary):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    splitting = SPLITTINGS[words.splitting]
    tokenizer = Tokenizer(models.BPE(_vocabulary(words), words.merges, ignore_merges=splitting.whole))
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    steps += [pre_tokenizers.Digits(individual_digits=True)] * splitting.digits
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.gpt2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _framing(words, splitting.bos) or processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _sentencepiece(words: Vocabulary):
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary, prefix = _vocabulary(words), words.flag("add_space_prefix", True)
    merges = words.merges or _merges(words, vocabulary)
    unknown = words.text("unknown") or next((words.tokens[i] for i, t in enumerate(words.types) if t == UNKNOWN), None)
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in words.types)
    tokenizer = Tokenizer(model)
    before = [normalizers.Prepend(SPACE)] * prefix
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    after = [decoders.Strip(" ", 1, 0)] * prefix
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    tokenizer.decoder = decoders.Sequence(parts)
    if framing := _framing(words, True):
        tokenizer.post_processor = framing
    return tokenizer


def _merges(words: Vocabulary, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Returns the merges that a SentencePiece vocabulary implies: each token from any two others, best scores first. Gemma's
    scores do not follow its merges, and its order of tokens does."""
    by_index = str(words.metadata.get("general.architecture")).startswith("gemma")
    found: list[tuple[float, int, int, str, str]] = []
    for token, index in vocabulary.items():
        if words.types[index] not in (NORMAL, USER_DEFINED):
            continue
        score = float(index) if by_index else -words.scores[index]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((score, vocabulary[left], vocabulary[right], left, right))
    found.sort(key=lambda merge: merge[:3])
    return [merge[3:] for merge in found]


def _framing(words: Vocabulary, bos_by_default: bool):
    """Returns what puts the first and last token around a text, None if there is neither."""
    from tokenizers import processors

    first = words.text("bos") if words.flag("add_bos_token", bos_by_default) else None
    last = words.text("eos") if words.flag("add_eos_token", False) else None
    if first is None and last is None:
        return None
    single: Sequence[str] = [token for token in (first, "$A", last) if token is not None]
    second = [token if token != "$A" else "$B" for token in single]
    ids = {token: i for i, token in enumerate(words.tokens) if token in (first, last)}
    return processors.TemplateProcessing(
        single=list(single),
        pair=[*single, *(f"{token}:1" for token in second)],
        special_tokens=list(ids.items()),
    )
