"""The settings of an audit trail."""

import dataclasses
import hashlib
import hmac
import os

from refusal_jax.errors import UserError, did_you_mean, field, setting
from refusal_jax.files import local_path, read_bytes
from refusal_jax.settings import Settings, option

TEXTS = ("omit", "hmac", "keep")
FSYNC = ("always", "heads", "never")
SHORTEST_KEY = 16  # bytes: a shorter key could be guessed


@dataclasses.dataclass
class TrailSettings(Settings, path="trail"):
    """The settings of an audit trail: records of what was asked and judged, which cannot be changed unnoticed."""

    folder: str = option("", "Folder of the audit trail; '' keeps none")
    key: str = option("", "Private key, in PEM, that signs the trail's heads; '' leaves them unsigned")
    texts: str = option(
        "omit",
        "What a record holds of a text: 'omit' only its sha256, 'hmac' its HMAC with a secret key, or 'keep' the text",
    )
    text_key_env: str = option("", "Name of the environment variable that holds the secret key of 'hmac'")
    text_key_file: str = option("", "File that holds the secret key of 'hmac', in place of an environment variable")
    heads_to: str = option(
        "", "Folder, on another machine if possible, where a copy of every head is kept; '' for none"
    )
    head_records: int = option(10_000, "Number of records after which a head is written")
    head_seconds: float = option(60.0, "Seconds after which a head is written, if there are new records")
    file_mb: float = option(
        64.0, "Size, in MB, at which a file of the trail is followed by the next; each day has its own, too"
    )
    keep_days: int = option(0, "Days for which files are kept; 0 keeps all")
    fsync: str = option(
        "always",
        "When records are forced to the disk: 'always' after each batch, 'heads' with each head, or 'never'",
    )

    def check(self) -> None:
        """Raises UserError for values that cannot be."""
        for name, words in (("texts", TEXTS), ("fsync", FSYNC)):
            if self[name] not in words:
                raise UserError(
                    f"{field(self._below(name))}={self[name]}: expected one of {', '.join(words)}."
                    f"{did_you_mean(self[name], words)}"
                )
        for name, least in (("head_records", 1), ("head_seconds", 0.0), ("file_mb", 0.001), ("keep_days", 0)):
            if not self[name] >= least:
                raise UserError(f"{field(self._below(name))}={self[name]}: expected at least {least}.")
        if self.fsync == "never" and self.key:
            raise UserError(
                f"{field(self._below('fsync'))}=never: a signed head could then be on the disk before its records, which looks "
                "like a cut trail after a power failure. Choose heads or always."
            )


@dataclasses.dataclass(frozen=True)
class TextKey:
    """The secret key by which texts are hashed. id: names the key in records, and tells nothing of it."""

    secret: bytes
    id: str

    @classmethod
    def of(cls, secret: bytes, source: str) -> "TextKey":
        """Returns the key of a secret. source: where it is from, for the error. Raises UserError if it is too short."""
        secret = secret.strip()
        if len(secret) < SHORTEST_KEY:
            raise UserError(
                f"{source} holds a key of {len(secret)} bytes, expected at least {SHORTEST_KEY}, as a shorter one can be "
                "guessed. `openssl rand -hex 32` makes one."
            )
        return cls(secret, hmac.digest(secret, b"refusal_jax name of the key", "sha256").hex()[:16])

    @classmethod
    def read(cls, variable: str, file: str) -> "TextKey":
        """Returns the key in an environment variable or, if that has no name, in a file. Raises UserError if there is none."""
        if variable:
            if variable not in os.environ:
                raise UserError(
                    f"The environment has no variable {variable}, which should hold the secret key of the trail's texts."
                )
            return cls.of(os.environ[variable].encode("utf-8", "surrogateescape"), f"The variable {variable}")
        if file:
            return cls.of(read_bytes(local_path(file)), file)
        raise UserError(
            "The secret key of the trail's texts is missing: name the environment variable that holds it with "
            f"{setting('trail.text_key_env')}, or a file with {setting('trail.text_key_file')}."
        )

    def mark(self, text: str) -> str:
        """Returns the HMAC-SHA256 of a text in UTF-8, in hex."""
        return hmac.digest(self.secret, in_bytes(text), "sha256").hex()


def sha256(text: str) -> str:
    """Returns the sha256 of a text in UTF-8, in hex."""
    return hashlib.sha256(in_bytes(text)).hexdigest()


def in_bytes(text: str) -> bytes:
    """Returns a text as the bytes that are hashed: UTF-8, where half a surrogate pair, as in broken logs, stays itself."""
    return text.encode("utf-8", "surrogatepass")
