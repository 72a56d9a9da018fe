"""Signs documents as DSSE envelopes with a key of the user's, and checks them, by securesystemslib, which TUF and in-toto use."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from refusal_jax.errors import UserError
from refusal_jax.files import read_bytes, to_json

PASSWORD = "REFUSAL_JAX_KEY_PASSWORD"  # the variable of the environment that holds the password of a signing key


class PrivateKey:
    """A private key (Ed25519, ECDSA or RSA) that signs. file: in PEM; its password, if it has one, is taken from the environment.

    Raises UserError for a key that cannot be used, and if the library that signs is not installed.
    """

    def __init__(self, file: pathlib.Path):
        self._dsse, signer, serialization = _library()
        self.file = file
        password = os.environ.get(PASSWORD)
        try:
            private = serialization.load_pem_private_key(read_bytes(file), password.encode() if password else None)
            self._signer = signer.CryptoSigner(private)
        except UserError:
            raise
        except Exception as error:  # of many kinds, by the kind of key
            raise self._useless(error) from None

    def signed(self, payload: bytes, payload_type: str) -> bytes:
        """Returns the envelope of a document, signed, for a file. Raises UserError for a key that cannot sign."""
        try:
            envelope = self._dsse.Envelope(payload, payload_type, {})
            envelope.sign(self._signer)
        except Exception as error:
            raise self._useless(error) from None
        return to_json(envelope.to_dict())

    def _useless(self, error: Exception) -> UserError:
        return UserError(
            f"{self.file} cannot sign ({error}). A private key in PEM is needed, which `openssl genpkey -algorithm ed25519 -out "
            f"key.pem` makes; {PASSWORD} in the environment is its password, if it has one."
        )


class PublicKey:
    """A public key, by which signatures are checked. file: in PEM. Raises UserError for a file that is none."""

    def __init__(self, file: pathlib.Path):
        _, signer, serialization = _library()
        self.file, self._signature = file, signer.Signature
        try:
            self._key = signer.SSlibKey.from_crypto(serialization.load_pem_public_key(read_bytes(file)))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{file} is no public key in PEM ({error}). `openssl pkey -in key.pem -pubout -out key.pub` writes that of a "
                "private key."
            ) from None

    def accepts(self, signature: str, signed_bytes: bytes) -> bool:
        """Returns whether a signature, in hex, is this key's. What names the key does not count: other tools write no names, or
        names of their own."""
        from securesystemslib.exceptions import UnverifiedSignatureError

        try:
            self._key.verify_signature(self._signature(self._key.keyid, signature), signed_bytes)
        except UnverifiedSignatureError:
            return False
        return True


class Envelope:
    """A DSSE envelope. payload: the document's bytes; payload_type: their kind. Raises ValueError, with the reason, for a mapping
    that is no envelope."""

    def __init__(self, data: Mapping[str, Any]):
        dsse, _, _ = _library()
        try:
            self._envelope = dsse.Envelope.from_dict(dict(data))
            self.document = json.loads(self._envelope.payload)
        except Exception as error:  # whatever a damaged file leads to
            raise ValueError(f"{type(error).__name__}: {error}") from None
        self.payload_type: str = self._envelope.payload_type

    def is_signed_by(self, key: PublicKey) -> bool:
        """Returns whether one of the signatures is the key's."""
        signed_bytes = self._envelope.pae()
        return any(key.accepts(one.signature, signed_bytes) for one in self._envelope.signatures.values())


def _library():
    """Returns the modules that sign. Raises UserError if they are not installed."""
    try:
        from cryptography.hazmat.primitives import serialization
        from securesystemslib import dsse, signer
    except ImportError:
        raise UserError(
            "Signing needs securesystemslib, which is not installed: pip install 'refusal-jax[sign]'."
        ) from None
    return dsse, signer, serialization
