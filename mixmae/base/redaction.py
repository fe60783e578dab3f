"""Credentials are left out of whatever is shown: messages, logs, records, metrics, copies of the recipe.

One place says what a credential looks like: user and password in a URL, its query and fragment (signatures, tokens),
values of keys such as `password=` and `token:`, and what follows `Authorization:`.
"""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_URL = re.compile(
    r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)"
    r"(?:[^\s/@'\"<>]*:(?!\d+(?:[/?#]|$))[^\s'\"<>]*@|[^\s/'\"<>]*@)?"  # a password may hold a slash, a port may not
    r"(?P<path>[^\s?#'\"<>]*)"
    r"(?P<query>[?#][^\s'\"<>]*)?"
)
_KEY = (
    r"(?:[\w-]*[_-])?(?:pass(?:word|wd|phrase)|secret|(?<!cls_)(?<!mask_)token|signature|credentials?|api[_-]?key|"
    r"access[_-]?key(?:[_-]?id)?|auth)"
)
_VALUE = re.compile(rf"(?i)(?<![\w-])({_KEY}(?:\s?=\s?[\"']?|[\"']\s?:\s?[\"']))[^\s\"'&,;)}}\]]+")
_NAME = re.compile(f"(?i){_KEY}")
_HEADER = re.compile(r"(?i)(authorization[\"']?\s?[=:]\s?[\"']?)(?:(?:basic|bearer|digest|token)\s+)?[^\s\"',;]+")
_OPTION = re.compile(r"(?<!\S)(-u|--user|--proxy-user)([ =])[^\s:]+:\S+")
"""Of curl."""
_LIKELY = re.compile(r"(?i)://|pass|secret|token|signature|credential|key|auth| -u|--")


def redact(text: str) -> str:
    """A text without credentials; `***` stands where they were. What holds none is returned as it is."""
    if not _LIKELY.search(text):
        return text
    text = _HEADER.sub(rf"\1{HIDDEN}", _URL.sub(_without_credentials, text))
    return _OPTION.sub(rf"\1\2{HIDDEN}", _VALUE.sub(rf"\1{HIDDEN}", text))


def redact_all(value: Any) -> Any:
    """The same for every text in nested mappings and lists, and for what keys such as `password` hold."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: HIDDEN if _is_secret(key, entry) else redact_all(entry) for key, entry in value.items()}
    return [redact_all(entry) for entry in value] if isinstance(value, list | tuple) else value


def _is_secret(key: Any, value: Any) -> bool:
    return isinstance(value, str) and bool(value) and _NAME.fullmatch(str(key)) is not None


def _without_credentials(url: re.Match[str]) -> str:
    whole, scheme, path = url[0], url["scheme"], url["path"]
    user = whole[len(scheme) :].removesuffix(url["query"] or "").removesuffix(path)
    query = f"{url['query'][0]}{HIDDEN}" if url["query"] else ""
    return f"{scheme}{HIDDEN + '@' if user else ''}{path}{query}"
