"""The files of several shard directories, by names that begin with their directory's."""

from collections.abc import Mapping

from mixmae.trainer.data.stores.store import CacheCounts, Store


class JoinedStore(Store):
    """Stores under one roof."""

    def __init__(self, stores: Mapping[str, Store], files: Mapping[str, tuple[str, str]]) -> None:
        """
        Args:
            stores: by location.
            files: location and own name of each file, by its name here.
        """
        super().__init__(", ".join(stores))
        self._stores, self._files = stores, files

    @property
    def retried(self) -> int:
        return sum(store.retried for store in self._stores.values())

    @property
    def cache_counts(self) -> CacheCounts:
        total = CacheCounts()
        for store in self._stores.values():
            total = total.plus(store.cache_counts)
        return total

    def read(self, name: str, offset: int, size: int) -> bytes:
        store, own = self._file(name)
        return store.read(own, offset, size)

    def read_whole(self, name: str) -> bytes:
        store, own = self._file(name)
        return store.read_whole(own)

    def size(self, name: str) -> int:
        store, own = self._file(name)
        return store.size(own)

    def is_local(self, name: str) -> bool:
        store, own = self._file(name)
        return store.is_local(own)

    def will_need(self, name: str, offset: int, size: int) -> None:
        store, own = self._file(name)
        store.will_need(own, offset, size)

    def forget(self, name: str, offset: int, size: int) -> None:
        store, own = self._file(name)
        store.forget(own, offset, size)

    def close(self) -> None:
        for store in self._stores.values():
            store.close()

    def _file(self, name: str) -> tuple[Store, str]:
        location, own = self._files[name]
        return self._stores[location], own
