"""The action `verify` of the monitor's job: checks an audit trail, and finds the records of a text."""

import sys

from absl import flags

from refusal_jax.errors import UserError
from refusal_jax.files import local_path
from refusal_jax.monitor.trail.settings import TextKey
from refusal_jax.monitor.trail.texts import Search, search_text
from refusal_jax.monitor.trail.verify import CHANGED, text_of, verify_trail

KEY = flags.DEFINE_list(
    "key", None, "For `verify`: the public key, in PEM, of whoever signed the heads; several are separated by commas."
)
HEADS = flags.DEFINE_list("heads", None, "For `verify`: heads that were kept elsewhere, files or folders of them.")
TEXT = flags.DEFINE_string(
    "text",
    None,
    "For `verify`: a file with a prompt or a reply, or - for standard input, whose records are to be found.",
)
NOT_FOUND = 10  # the exit code where the trail is well, and the text is in no record


def verify(words: list[str], text_key_env: str, text_key_file: str) -> int:
    """Verifies the trail in the folder that the words name, prints what was found, and returns the exit code.

    text_key_env, text_key_file: where the secret key of the trail's texts is. Raises UserError as `verify_trail` does, and for a
    text that cannot be read.
    """
    if not words:
        raise UserError("The trail's folder is missing: refusal-jax monitor verify TRAIL --key=key.pub.")
    search = None
    if TEXT.value:
        key = TextKey.read(text_key_env, text_key_file) if text_key_env or text_key_file else None
        search = Search(_text(TEXT.value), key)
    keys = [local_path(key) for key in KEY.value or ()]
    heads = [local_path(head) for head in HEADS.value or ()]
    found = verify_trail(local_path(words[0]), keys, heads, search)
    print(text_of(found), end="")
    if search:
        print(search_text(search), end="")
        return found.exit_code if found.exit_code == CHANGED or search.matches else NOT_FOUND
    return found.exit_code


def _text(name: str) -> str:
    """Returns a text as it is, with its line ends. Raises UserError for a file that is missing or no UTF-8."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else local_path(name).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise UserError(
            f"--text={name}: the file could not be read ({error.strerror or error}). Check the path."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"--text={name}: the file is not UTF-8 text ({error}). Convert it, e.g. with iconv.") from None
