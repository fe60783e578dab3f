"""From the location of shards in a recipe to the store that reads them."""

from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from mixmae.trainer.data.stores.pipe import PipeStore
from mixmae.trainer.data.stores.remote import RemoteStore
from mixmae.trainer.data.stores.store import LocalStore, Store
from mixmae.trainer.recipe.sections.data import Cache, Network

_NETWORK, _CACHE = Network(), Cache()


def open_store(location: str | Path, network: Network = _NETWORK, cache: Cache = _CACHE) -> Store:
    """The store of a path, a URL (`s3://bucket/photos`) or a command (`pipe:aws s3 cp s3://bucket/photos/{} -`).

    Raises:
        UsageError: an unknown kind of URL, one whose package is missing, a command that is not allowed or names no
            file, a cache that cannot be made or is too small.
    """
    text = str(location)
    scheme, separator, _ = text.partition("://")
    if text.startswith("pipe:"):
        return PipeStore(text, network, cache)
    if isinstance(location, Path) or not separator:
        return LocalStore(Path(location))
    if scheme.lower() in ("file", "local"):
        return LocalStore(Path(LocalFileSystem._strip_protocol(text)))
    return RemoteStore(text, network, cache)
