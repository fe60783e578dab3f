"""Shards behind a URL that fsspec opens: http(s), s3 and others."""

import gc
import os
import re
from typing import Any
from urllib.parse import quote

from fsspec import AbstractFileSystem, get_filesystem_class

from mixmae.base.errors import UsageError
from mixmae.base.redaction import redact
from mixmae.trainer.data.stores.blocks import CachedStore, FinalError
from mixmae.trainer.data.stores.store import plain_name
from mixmae.trainer.recipe.sections.data import Cache, Network

BLOCK = 8 * 2**20
"""Bytes that cross the network at once."""
_FILESYSTEMS: dict[tuple[int, str], AbstractFileSystem] = {}
"""fsspec's file systems by process and location. A parent's stay here, unused: a child that collected one would close
connections that its parent reads from."""


class RemoteStore(CachedStore):
    """A URL that fsspec opens."""

    def __init__(
        self, location: str, network: Network, cache: Cache, block_bytes: int = BLOCK, first_delay: float = 0.5
    ) -> None:
        """Opens a store, without contacting the server yet. Arguments as `CachedStore`'s, errors as `open_store`'s."""
        if cache.max_bytes < block_bytes:
            raise UsageError(
                f"data.cache.max_bytes={cache.max_bytes}, expected room for a block of {block_bytes} bytes"
            )
        self._scheme = location.partition("://")[0].lower()
        self._class = _filesystem_class(self._scheme)
        super().__init__(location.rstrip("/"), network, cache, block_bytes, first_delay)

    def read_whole(self, name: str) -> bytes:
        end = self.size(name)
        return b"".join(self._fetch(name, number, length) for number, _, length in self._blocks(0, end))

    def size(self, name: str) -> int:
        return self._with_retries(lambda: self._request_size(name))

    def close(self) -> None:
        if _FILESYSTEMS.pop((os.getpid(), self.location), None) is not None:
            gc.collect()  # fsspec closes connections when a file system, which refers to itself, is collected
        super().close()

    def _load(self, name: str, number: int, least: int) -> bytes:
        begin = number * self._block_bytes
        try:
            block: bytes = self._request("cat_file", name, start=begin, end=begin + self._block_bytes)
        except _PastEndError:
            block = b""
        if len(block) > self._block_bytes:
            raise FinalError(
                f"{self._shown(name)}: the server ignores ranges: {self._block_bytes} bytes were asked for and "
                f"{len(block)} came; use one that answers range requests (python -m http.server does not)"
            )
        if len(block) < least:
            if (end := self._request_size(name)) < begin + least:
                raise FinalError(f"{self._shown(name)} ends at {end}, expected {begin + least}")
            raise OSError(f"{self._shown(name)}: {len(block)} bytes came, expected {least} or more")
        return block

    def _request_size(self, name: str) -> int:
        size: int | None = self._request("info", name)["size"]
        if size is None:
            raise FinalError(f"{self._shown(name)}: the server does not tell its size")
        return size

    def _request(self, method: str, name: str, **arguments: int | float) -> Any:
        """Calls a method of fsspec's file system, once. Every error is an OSError that names the file."""
        filesystem = self._filesystem()
        if filesystem.async_impl:
            arguments["timeout"] = self._network.timeout  # others have none, or their own
        try:
            return getattr(filesystem, method)(filesystem._strip_protocol(self._url(name)), **arguments)
        except Exception as error:  # each of fsspec's packages has its own kinds
            raise self._describe_error(error, name) from error

    def _describe_error(self, error: BaseException, name: str) -> OSError:
        shown = self._shown(name)
        if isinstance(error, FileNotFoundError) and self._scheme in ("http", "https"):
            error = error.__cause__ or error  # fsspec calls whatever a HEAD or its GET met FileNotFoundError
        status = getattr(error, "status", None)
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            return FileNotFoundError(f"{shown} does not exist")
        if isinstance(error, PermissionError) or status in (401, 403):
            return PermissionError(
                f"{shown}: access denied{f' (HTTP {status})' if status else f': {redact(str(error))}'}"
            )
        if isinstance(error, TimeoutError):
            return TimeoutError(f"{shown}: no answer within {self._network.timeout:g} s")
        if status == 416 or "InvalidRange" in str(error.__cause__):
            return _PastEndError(f"{shown}: nothing there")
        said = f"HTTP {status}" if status else f"{type(error).__name__}: {redact(str(error))}"
        return OSError(f"{shown}: {said}")

    def _filesystem(self) -> AbstractFileSystem:
        key = (os.getpid(), self.location)
        if key not in _FILESYSTEMS:
            options = self._class._get_kwargs_from_urls(self.location)
            if self._scheme in ("http", "https"):
                # Proxies as curl finds them (s3fs does so by itself); bytes as they are stored, and never unpacked.
                headers = {"Accept-Encoding": "identity"}
                options["client_kwargs"] = {"trust_env": True, "auto_decompress": False, "headers": headers}
            _FILESYSTEMS[key] = self._class(**options, skip_instance_cache=True)
        return _FILESYSTEMS[key]

    def _url(self, name: str) -> str:
        if self._scheme not in ("http", "https"):
            return f"{self.location}/{plain_name(name)}"
        folder, mark, query = self.location.partition("?")
        return f"{folder.rstrip('/')}/{quote(plain_name(name))}{mark}{query}"

    def _shown(self, name: str) -> str:
        """The URL of a file without passwords and signatures."""
        return re.sub("//[^/@]*@", "//", self._url(name).partition("?")[0])


class _PastEndError(OSError):
    """A range that starts at a file's end or behind it."""


def _filesystem_class(scheme: str) -> type[AbstractFileSystem]:
    try:
        return get_filesystem_class(scheme)
    except ValueError as error:
        raise UsageError(f"shards: unknown kind of URL {scheme!r}://; expected http, https, s3, ...") from error
    except ImportError as error:
        extra = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3"}.get(scheme)
        remedy = f"pip install 'mixmae[{extra}]'" if extra else str(error)
        raise UsageError(f"shards: {scheme}:// needs a package that is not installed: {remedy}") from error
