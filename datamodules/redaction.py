"""Masks secrets in everything that a run writes or prints: records, configs, reports, cards, logs and messages.

Three properties mark a secret: the name of its key (``secret``, ``access_key``, ``--hub_token``), its place or form in
a text (the user part of a URL, a header, a private key), and its value, if a config, the command line or an environment
variable had it under such a name. Text of findings is data, which is kept as it is.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

MASK = "***"  #: replaces a secret
MIN_KNOWN_LENGTH = 6  #: shorter values are too likely to be a part of another text
_SECRET_WORDS = frozenset(
    {"apikey", "auth", "authorization", "cookie", "credential", "credentials", "passphrase", "passwd", "password",
     "pwd", "sas", "secret", "secrets", "sig", "signature"}
)  # fmt: skip
#: a name that ends with one of these words is a secret too; ``token_cache`` and ``max_new_tokens`` are not
_SECRET_ENDINGS = frozenset({"key", "token", "pat"})
_ENVIRONMENT_ENDINGS = frozenset({"key", "token", "password", "secret", "passwd", "credentials", "auth"})
#: values that are a choice and not a secret, for example ``token: anon`` of Google Cloud Storage
_CHOICES = frozenset({"", MASK, "anon", "browser", "cache", "cloud", "false", "google_default", "none", "null", "true"})
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

_URL_USER = re.compile(r"(?<=://)[^/\s'\"?#<>]*@")
_AUTHORIZATION = re.compile(
    r"""(?i)\b((?:proxy-)?authorization|x-[\w-]*(?:key|token)|(?:set-)?cookie)(["']?\s*[:=]\s*["']?)"""
    r"""((?:bearer|basic|token|digest|negotiate)\s+)?[^\s"',}]+"""
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+(?=\S*[\d=+/._-])[\w.~+/=-]{8,}")
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
#: forms of access tokens with a published prefix: Hugging Face, AWS, GitHub, GitLab, Slack, OpenAI, JSON Web Token
_TOKEN = re.compile(
    r"\b(?:hf_\w{16,}|A[KS]IA[0-9A-Z]{16}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}"
    r"|sk-[\w-]{20,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+)"
)
_ASSIGNMENT = re.compile(r"""(?<![\w.-])(-{0,2}[A-Za-z][\w.-]*)(["']?\s?[=:]\s?)("[^"]*"|'[^']*'|[^\s"',;&}\])]+)""")
_OPTION = re.compile(r"(?<!\S)(--?[A-Za-z][\w.-]*)(\s+)(\"[^\"]*\"|'[^']*'|[^\s-]\S*)")
_MASKED = re.compile(
    r"\A\*\*\*\Z|://\*\*\*@|[=\s]\*\*\*(?![\w/*])"
)  #: a place that was masked; "data/***/a.json" is none
_known: set[str] = set()  #: values that a config or the command line has under the name of a secret


def is_secret_name(name: str) -> bool:
    """Returns whether a key, an option or a parameter of a URL with this name holds a secret."""
    words = [word.lower() for word in _WORDS.findall(name.rpartition(".")[2])]
    return bool(words) and (words[-1] in _SECRET_ENDINGS or not _SECRET_WORDS.isdisjoint(words))


def redact(value: Any) -> Any:
    """Returns a copy of JSON-like data without secrets.

    Args:
        value: mappings, lists, tuples, texts and plain values. Each text and number under the name of a secret becomes
            :data:`MASK`; other texts are redacted by :func:`redact_text`.
    """
    if isinstance(value, Mapping):
        return {key: _masked(item) if is_secret_name(str(key)) else redact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Returns a text without secrets.

    Masked are the user part of URLs, parameters of URLs, options and assignments with the name of a secret, headers of
    authorization, private keys, access tokens of a known form, and the values that :func:`remember_secrets` and the
    environment know.
    """
    for secret in sorted(_known | set(_environment_secrets()), key=len, reverse=True):
        text = text.replace(secret, MASK)
    text = _PRIVATE_KEY.sub(MASK, text)
    text = _URL_USER.sub(f"{MASK}@", text)
    text = _AUTHORIZATION.sub(rf"\1\2\3{MASK}", text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    text = _TOKEN.sub(MASK, text)
    text = _ASSIGNMENT.sub(_mask_assignment, text)
    return _OPTION.sub(_mask_assignment, text)


def redact_command(words: Sequence[str]) -> str:
    """Returns a command line without secrets, quoted for a shell.

    Args:
        words: the program and its arguments. A value that is a mapping or a list in YAML is redacted by its keys.
    """
    redacted: list[str] = []
    name = ""
    for word in words:
        option, equals, value = word.partition("=")
        if word.startswith("-") and not equals:
            name = word
            redacted.append(redact_text(word))
        elif word.startswith("-"):
            name = ""
            redacted.append(f"{option}={_redact_value(option, value)}")
        else:
            redacted.append(_redact_value(name, word))
            name = ""
    return shlex.join(redacted)


def remember_secrets(value: Any) -> None:
    """Remembers the secrets of JSON-like data, so that they are masked in any text, such as an error of a library.

    Args:
        value: the data, for example a merged config.
    """
    _known.update(secret for secret in _secrets(value) if len(secret) >= MIN_KNOWN_LENGTH)


def masked_places(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yields the dotted key and the text of each part of a config in which a secret is masked.

    Args:
        value: a config that was written by :func:`redact`.
        place: key of ``value``.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from masked_places(item, f"{place}.{key}".removeprefix("."))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from masked_places(item, f"{place}.{index}")
    elif isinstance(value, str) and _MASKED.search(value):
        yield place, value


def _masked(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _masked(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_masked(item) for item in value]
    if value is None or isinstance(value, bool) or str(value).lower() in _CHOICES:
        return value
    return MASK


def _redact_value(name: str, value: str) -> str:
    """Redacts the value of an option; a mapping or a list is written as JSON if it held a secret."""
    if is_secret_name(name):
        return str(_masked(value))
    if value.lstrip().startswith(("{", "[")):
        try:
            content = yaml.safe_load(value)
        except yaml.YAMLError:
            return redact_text(value)
        if (clean := redact(content)) != content:
            return json.dumps(clean, default=str)
        return value
    return redact_text(value)


def _mask_assignment(match: re.Match[str]) -> str:
    name, between, value = match.groups()
    # "key: ..." and "token: ..." are frequent in prose, so that a single such word needs "=" or two dashes
    alone = name.lower() in _SECRET_ENDINGS and "=" not in between
    if alone or value.strip("\"'").lower() in _CHOICES or not is_secret_name(name):
        return f"{name}{between}{_ASSIGNMENT.sub(_mask_assignment, value)}"  # a parameter of a URL, for example
    return f"{name}{between}{MASK}"


def _environment_secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        words = name.lower().split("_")
        if words[-1] in _ENVIRONMENT_ENDINGS and len(value) >= 2 * MIN_KNOWN_LENGTH and not Path(value).exists():
            yield value


def _secrets(value: Any, secret: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secrets(item, secret or is_secret_name(str(key)))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _secrets(item, secret)
    elif secret and not isinstance(value, bool) and value is not None and str(value).lower() not in _CHOICES:
        yield str(value)
    elif isinstance(value, str):
        for user in _URL_USER.findall(value):
            yield from filter(None, (user[:-1], user[:-1].partition(":")[2]))
