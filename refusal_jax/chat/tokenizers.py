"""Loads tokenizers of checkpoints, finds the tokens that end a reply, and explains why a tokenizer cannot be used."""

import contextlib
import functools
import importlib.util
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from refusal_jax.chat.qwen_tokenizer import RANKS, QwenTokenizer
from refusal_jax.chat.templates import MARKS
from refusal_jax.errors import UserError
from refusal_jax.files import check_file, damaged, read_bytes, read_json
from refusal_jax.models.decoding import CONFIG, end_ids

LOG = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SENTENCEPIECE = "tokenizer.model"
PLAIN = ("TokenizersBackend", "PreTrainedTokenizerFast")  # names of the class that only reads tokenizer.json
TRUSTED_TYPES = ("llama",)  # of models; for some others transformers takes another class than the one that is named
PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # that transformers reads such a file with


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a tokenizer that this package uses: transformers' tokenizers have it, and so has `QwenTokenizer`."""

    name_or_path: str
    chat_template: Any
    eos_token_id: Any
    pad_token_id: Any

    def __len__(self) -> int: ...

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def apply_chat_template(self, messages: list, **settings) -> Any: ...


def load_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """Loads the tokenizer of a checkpoint, whose code is never run.

    Raises UserError if its files are missing or damaged, or need a package that is not installed.
    """
    if (folder / RANKS).is_file() and not os.path.lexists(folder / TOKENIZER_FILES[0]):
        return QwenTokenizer.load(folder)
    if not any(os.path.lexists(folder / name) for name in (*TOKENIZER_FILES[:2], SENTENCEPIECE)):
        raise UserError(
            f"{folder} has no tokenizer files (tokenizer.json, tokenizer_config.json). Copy them from the "
            "original checkpoint."
        )
    if not os.path.lexists(folder / TOKENIZER_FILES[0]) and os.path.lexists(folder / SENTENCEPIECE):
        _check_sentencepiece(folder / SENTENCEPIECE)
    for name in (*TOKENIZER_FILES, "chat_template.jinja", "generation_config.json"):
        if os.path.lexists(folder / name):
            check_file(folder / name)  # transformers takes such a file for a missing one
    # Imported late: this takes seconds, and weight-only jobs need none of it. AutoTokenizer, which finds the class where that is
    # not known, imports all architectures, and PyTorch where it is installed.
    if is_plain(folder):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def is_plain(folder: pathlib.Path) -> bool:
    """Returns whether transformers is known to load a tokenizer as what its tokenizer.json says, as those of Llama 3 are."""
    files = [folder / name for name in (*TOKENIZER_FILES[:2], CONFIG)]
    if not all(map(os.path.lexists, files)):
        return False
    settings, config = (read_json(path) for path in files[1:])
    return (
        settings.get("tokenizer_class") in PLAIN
        and "auto_map" not in settings
        and config.get("model_type") in TRUSTED_TYPES
    )


def _check_sentencepiece(path: pathlib.Path) -> None:
    """Raises UserError for a tokenizer.model that is neither SentencePiece's nor tiktoken's, or that needs a package."""
    data = read_bytes(path)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", data):  # tiktoken's ranks
        return
    if not data.startswith(b"\n"):  # the tag of the first piece, in every file of SentencePiece
        raise damaged(path, "is neither a SentencePiece model nor a list of tiktoken's ranks")
    missing = [name for name, module in PACKAGES.items() if not _installed(module)]
    if missing:
        raise UserError(
            f"{path.parent} has no tokenizer.json, and its {SENTENCEPIECE} is read with {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed. Run: pip install {' '.join(missing)}. Or copy a "
            "tokenizer.json of the same model into the folder."
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


@contextlib.contextmanager
def explained(folder: pathlib.Path) -> Iterator[None]:
    """Turns what a tokenizer raises into a UserError that names the file, if one of its files is found to be damaged."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # many types occur, and panics of Rust code are not an Exception
        there = [folder / name for name in TOKENIZER_FILES if os.path.lexists(folder / name)]
        for path in there:
            read_json(path)
        if there[:1] != [folder / TOKENIZER_FILES[0]] and (folder / SENTENCEPIECE).is_file():
            raise damaged(
                folder / SENTENCEPIECE, "could not be read as a SentencePiece model or tiktoken's ranks"
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The tokenizer of {folder} could not be loaded ({reason[:300]}). {_tokenizer_advice(folder, error)}"
        ) from None


def _tokenizer_advice(folder: pathlib.Path, error: BaseException) -> str:
    """Returns what to do about a tokenizer whose files are whole, as far as their formats tell."""
    if isinstance(error, ImportError):
        return "Install the package that it asks for."
    if "trust_remote_code" in str(error):
        return "It is code of the checkpoint's own, which is never run: use a checkpoint with a tokenizer.json."
    import tokenizers
    import transformers

    return (
        f"A file was edited or is incomplete: copy {', '.join(TOKENIZER_FILES[:2])} from the original checkpoint. If they "
        f"are whole, they may need newer packages than transformers {transformers.__version__} and tokenizers "
        f"{tokenizers.__version__}: pip install -U transformers tokenizers."
    )


def reply_ends(folder: pathlib.Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids that end a reply: those that the checkpoint names, the tokenizer's own, and the ends of turns, which some
    checkpoints do not name. Of the last two, only tokens beside the ordinary ones count. Raises UserError as `end_ids` does."""
    named, added = end_ids(folder), tokenizer.get_added_vocab()
    turns = [added.get(end_of_turn) for _, end_of_turn in MARKS.values()]
    more = [i for i in (tokenizer.eos_token_id, *turns) if i is not None and i not in named]
    if more and (folder / TOKENIZER_FILES[0]).is_file():  # which may not hold what transformers was told is special
        special = {entry["id"] for entry in read_json(folder / TOKENIZER_FILES[0]).get("added_tokens", [])}
        settings = folder / TOKENIZER_FILES[1]
        declared = read_json(settings).get("added_tokens_decoder", {}) if settings.is_file() else {}
        more = [i for i in more if i in special or str(i) in declared]
    special = {*added.values(), *getattr(tokenizer, "all_special_ids", ())}
    for i in named:
        if i not in special and i < len(tokenizer):
            _say_ordinary_end(str(folder), i, tokenizer.decode([i]))
    return tuple(dict.fromkeys([*named, *more]))


@functools.cache
def _say_ordinary_end(folder: str, token: int, text: str) -> None:
    """Warns, once for each checkpoint, that its replies end at a token of ordinary text."""
    LOG.warning(
        f"{folder} names token {token}, {text!r}, as one that ends replies, which is a token of ordinary text: where "
        "replies stop in mid-sentence, correct eos_token_id in its generation_config.json or config.json."
    )
