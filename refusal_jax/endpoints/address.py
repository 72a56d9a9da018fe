"""Addresses and keys: where requests go, and what may be said of it. An address is written into results, so it holds no secret;
a key is only ever named by its environment variable."""

import dataclasses
import ipaddress
import os
import re
import urllib.parse

from refusal_jax.endpoints.endpoint import EndpointSettings
from refusal_jax.errors import UserError

KEY_SHOWN = "[key]"
LEAST_SECRET = 16  # characters of a key that is surely one; "EMPTY" and "none" are what servers without keys ask for
LOCAL_NAMES = ("localhost", "host.docker.internal")
OPENAI = "api.openai.com"


@dataclasses.dataclass(frozen=True, repr=False)
class Address:
    """Tells where a server is. url: the base of its API, such as http://localhost:8000/v1. host: without its port. key: the API
    key, or "" where none is sent. variable: the name of the environment variable of the key, or ""."""

    url: str
    host: str
    key: str
    variable: str

    def __repr__(self) -> str:
        return f"Address({self.url!r}, variable={self.variable!r})"

    @classmethod
    def of(cls, settings: EndpointSettings) -> "Address":
        """Returns the address that settings name. Raises UserError for one that is none, that holds a secret, or whose key is not
        in the environment."""
        parts = _parts(settings.url)
        host = parts.hostname or ""
        path = re.sub(r"/(chat/completions|completions|models)/?$", "", parts.path).rstrip("/") or "/v1"
        url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        return cls(url, host, _key(settings.api_key_env, host), settings.api_key_env)

    @property
    def of_openai(self) -> bool:
        """Returns whether the server is OpenAI's own."""
        return self.host == OPENAI

    @property
    def local(self) -> bool:
        """Returns whether the server is on this machine."""
        if self.host in LOCAL_NAMES or self.host.endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def concern(self) -> str:
        """Returns what to say of an unencrypted way to another machine; "" if there is nothing to say."""
        if self.local or self.url.startswith("https:"):
            return ""
        sent = f"The key in {self.variable} and all texts go" if self.key else "All texts go"
        return f"{sent} to {self.host} without encryption, so others on the way can read and change them. Use https."

    def without_key(self, text: str) -> str:
        """Returns a text of the server with the key, wherever it stands, left out."""
        if not self.key:
            return text
        for form in {self.key, urllib.parse.quote(self.key, safe="")}:
            text = text.replace(form, KEY_SHOWN)
        return text

    def reply_without_key(self, text: str) -> str:
        """Returns a reply with the key left out. Short keys are words such as "EMPTY", which a reply may hold by chance."""
        return self.without_key(text) if len(self.key) >= LEAST_SECRET else text


def _parts(url: str) -> urllib.parse.SplitResult:
    expected = "Expected an address such as http://localhost:8000 or https://api.openai.com/v1."
    text = url.strip()
    if not text:
        raise UserError(f"The endpoint has no url. {expected}")
    if "://" not in text and not re.match(r"\w+:(?!\d)", text):  # else it is a scheme of its own, such as unix:
        name = text.partition("/")[0].rpartition(":")[0] or text.partition("/")[0]
        text = f"{'http' if name in ('localhost', '127.0.0.1', '[::1]') else 'https'}://{text}"
    try:
        parts = urllib.parse.urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an impossible port or IPv6 address
        valid, parts = False, urllib.parse.urlsplit("")
    if not valid:
        shown = re.sub(r"//.*@", "//…@", url.partition("?")[0])
        raise UserError(f"The endpoint's url {shown!r} is not the address of a server. {expected}")
    if parts.username is not None or parts.query or parts.fragment:
        raise UserError(
            f"The endpoint's url for {parts.hostname} holds {'a user name' if parts.username is not None else 'a query'}, and "
            "addresses are written into results. Give the plain address, put a key into an environment variable and its name "
            "into api_key_env; other headers go into OPENAI_CUSTOM_HEADERS."
        )
    return parts


def _key(variable: str, host: str) -> str:
    if not variable:
        if host == OPENAI:
            raise UserError(
                f"{OPENAI} needs an API key, and the endpoint's api_key_env is empty. Put the key into an environment variable, "
                "and its name there, such as OPENAI_API_KEY."
            )
        return ""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise UserError(
            "The endpoint's api_key_env is not the name of an environment variable. Put the key itself into a variable, and the "
            "variable's name, such as OPENAI_API_KEY, into api_key_env."
        )
    if variable not in os.environ:
        raise UserError(
            f"The environment variable {variable}, which the endpoint's api_key_env names, is not set. Set it to the API key, or "
            "leave api_key_env empty for a server that needs none."
        )
    key = os.environ[variable].strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"The environment variable {variable} holds no API key: it is empty, or has spaces or signs that no key has. Set it "
            "anew."
        )
    return key
