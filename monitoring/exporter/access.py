"""How to reach a run's exporters, as its recipe says: over TLS, with authentication, or plainly."""

import base64
import ssl
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

TIMEOUT = 1.5
"""Seconds until an endpoint counts as silent."""


@dataclass(frozen=True)
class Access:
    """TLS and authentication of a run's exporters, from its recipe's section `monitoring`."""

    certfile: Path | None = None
    auth_file: Path | None = None
    """One line, `user:password`."""

    @property
    def credentials(self) -> tuple[str, str] | None:
        """User and password.

        Raises:
            OSError: the file cannot be read.
        """
        if self.auth_file is None:
            return None
        user, _, password = self.auth_file.read_text().strip().partition(":")
        return user, password

    @property
    def scheme(self) -> str:
        return "https" if self.certfile is not None else "http"

    def fetch(self, url: str) -> bytes:
        """Fetches a page of an exporter, past the environment's proxies, which do not know a cluster's nodes."""
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if self.certfile is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False  # this very certificate is trusted, on whatever node, and no other
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            context.load_verify_locations(self.certfile)
            handlers.append(urllib.request.HTTPSHandler(context=context))
        headers = {}
        if self.auth_file is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(self.auth_file.read_bytes().strip()).decode()
        return fetch(url, handlers, headers)


def read_recipe(file: Path) -> dict[str, Any]:
    """The sections of a run's recipe; empty where it is missing or damaged."""
    try:
        content = yaml.safe_load(file.read_text())
    except (FileNotFoundError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    complete = isinstance(content, dict) and all(isinstance(content.get(part), dict) for part in ("encoder", "train"))
    return content if complete else {}


def access_of(recipe: Mapping[str, Any]) -> Access:
    """What a recipe's sections say."""
    settings = recipe.get("monitoring") or {}
    paths = (settings.get(name) for name in ("certfile", "auth_file"))
    return Access(*(Path(path) if path else None for path in paths))


def fetch(
    url: str, handlers: Sequence[urllib.request.BaseHandler] = (), headers: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """What is behind a URL.

    Raises:
        OSError, http.client.HTTPException, ValueError: see UNREACHABLE.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url} is no http:// or https:// address")
    request = urllib.request.Request(url, headers=dict(headers))
    with urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT) as response:
        content: bytes = response.read()
    return content
