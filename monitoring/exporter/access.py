"""How a reader reaches exporters: over TLS, with a password, or plainly, as the reader says and no run directory."""

import base64
import http.client
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

TIMEOUT = 1.5
"""Seconds until an endpoint counts as silent."""
_LARGEST = 64 * 2**20
"""Bytes of an answer: more than the largest node has to say."""
UNREACHABLE = (OSError, http.client.HTTPException, ValueError)
"""Exceptions of a failed fetch: no connection, no HTTP, or an invalid response."""
_LONGEST_REASON = 120


class AccessError(ValueError):
    """A file that the reader gave cannot be used."""


@dataclass(frozen=True)
class Access:
    """The reader's own files, as given on the command line."""

    certfile: Path | None = None
    """PEM certificates of exporters: these very ones are trusted, on whatever node, and no others."""
    auth_file: Path | None = None
    """One line, `user:password`."""

    def check(self) -> None:
        """Raises AccessError if a file cannot be used."""
        _ = self.credentials
        if self.certfile is not None:
            self._tls()

    @property
    def credentials(self) -> tuple[str, str] | None:
        """User and password.

        Raises:
            AccessError: the file cannot be read, or is no such line.
        """
        if self.auth_file is None:
            return None
        try:
            user, colon, password = self.auth_file.read_text().strip().partition(":")
        except OSError as error:
            raise AccessError(f"--auth-file {self.auth_file} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise AccessError(f"--auth-file {self.auth_file} is not UTF-8 text") from error
        if not colon or "\n" in password:
            raise AccessError(f"--auth-file {self.auth_file}: expected one line, user:password")
        return user, password

    @property
    def of_named(self) -> "Access":
        """For addresses that a run directory names: a password goes only where the certificate is proven."""
        return self if self.certfile is not None else PLAIN

    def fetch(self, url: str) -> bytes:
        """Fetches a page of an exporter, past the environment's proxies, which do not know a cluster's nodes.

        Raises:
            OSError, http.client.HTTPException, ValueError: no answer, an error, or a redirection.
        """
        secure = url.startswith("https://")
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if secure:
            if self.certfile is None:
                raise ValueError("it speaks TLS: give its certificate with --certfile")
            handlers.append(urllib.request.HTTPSHandler(context=self._tls()))
        headers = {}
        if (credentials := self.credentials) is not None and (secure or self.certfile is None):
            headers["Authorization"] = "Basic " + base64.b64encode(":".join(credentials).encode()).decode()
        return fetch(url, handlers, headers)

    def _tls(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        try:
            context.load_verify_locations(self.certfile)
        except OSError as error:  # ssl.SSLError is one
            raise AccessError(f"--certfile {self.certfile} cannot be used: {error}") from error
        return context


PLAIN = Access()
"""Plain HTTP, without a password."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would take a password along to wherever an answer points."""

    def redirect_request(self, *_: Any) -> None:
        return None


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
    if parts.scheme == "http":
        # urllib would read all of the system's certificates for each page, and in threads at once Python 3.12 crashes.
        handlers = [*handlers, urllib.request.HTTPSHandler(context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))]
    request = urllib.request.Request(url, headers=dict(headers))
    with urllib.request.build_opener(_NoRedirects, *handlers).open(request, timeout=TIMEOUT) as response:
        content: bytes = response.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"the answer is larger than {_LARGEST >> 20} MiB")
    return content


def describe_error(error: Exception) -> str:
    """A short description of an error of `fetch`."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {str(error.reason)[:_LONGEST_REASON]}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"no response within {TIMEOUT:g} s"
    words = (isinstance(reason, OSError) and reason.strerror) or str(reason) or type(reason).__name__
    return str(words)[:_LONGEST_REASON]
