"""How a rank's metrics reach its node's exporter: one small file of doubles per rank in shared memory.

Writing is a store to memory: nothing waits for a reader, and nothing is lost to one that never comes.
"""

import bisect
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from prometheus_client.mmap_dict import MmapedDict

from mixmae.base.files import replacing
from mixmae.monitoring.metrics import BY_NAME, STEP_BUCKETS, Kind, Source

_BYTES = 2**16
"""A file's size: several times what a rank's series take. Reserved at once, so that full memory is found then."""
_SUM = "sum"


class Value(NamedTuple):
    """One number of one rank."""

    metric: str
    labels: tuple[str, ...]
    """Values of `Metric.label_names`, without rank."""
    part: str
    """Of a histogram: `sum`, or the number of a bucket; else empty."""
    value: float


class Recorder:
    """A rank's metrics. Counters start at 0 with the process, as Prometheus expects of a restart."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Opens the rank's file.

        Raises:
            OSError: no room in shared memory.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(_file(folder, rank)) as partial:  # under its name it is whole: it may be read from then on
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, _BYTES)  # a page that is missing later would be a bus error
            finally:
                os.close(descriptor)
            self._values = MmapedDict(str(partial))
        self._keys: dict[tuple[str, tuple[str, ...], str], str] = {}

    def set(self, name: str, value: float, *labels: str) -> None:
        """Sets a gauge, or a counter that is counted elsewhere; of a metric with states, the number of the present."""
        self._write(name, labels, "", value)

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Raises a counter."""
        assert amount >= 0, (name, amount)
        self._write(name, labels, "", self._read(name, labels, "") + amount)

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        """Adds an observation to a histogram."""
        bucket = str(bisect.bisect_left(STEP_BUCKETS, seconds))
        self._write(name, labels, bucket, self._read(name, labels, bucket) + 1)
        self._write(name, labels, _SUM, self._read(name, labels, _SUM) + seconds)

    def close(self) -> None:
        self._values.close()

    def _read(self, name: str, labels: tuple[str, ...], part: str) -> float:
        value: float = self._values.read_value(self._key(name, labels, part))[0]
        return value

    def _write(self, name: str, labels: tuple[str, ...], part: str, value: float) -> None:
        self._values.write_value(self._key(name, labels, part), value, 0.0)

    def _key(self, name: str, labels: tuple[str, ...], part: str) -> str:
        found = self._keys.get((name, labels, part))
        if found is None:
            expected = () if BY_NAME[name].states else BY_NAME[name].labels
            assert len(labels) == len(expected), (name, labels)
            found = self._keys[name, labels, part] = json.dumps([name, labels, part])
        return found


class NullRecorder:
    """In place of a recorder where nothing is exported."""

    def set(self, name: str, value: float, *labels: str) -> None: ...

    def add(self, name: str, amount: float, *labels: str) -> None: ...

    def observe(self, name: str, seconds: float, *labels: str) -> None: ...

    def close(self) -> None: ...


def read_ranks(folder: Path) -> Iterator[tuple[int, list[Value]]]:
    """The metrics of a node's ranks as they are now, by rank."""
    for file in sorted(folder.glob("rank-*.numbers")):
        try:
            rows = list(MmapedDict.read_all_values_from_file(str(file)))
        except (FileNotFoundError, RuntimeError):
            continue  # a rank that just ends, or adds a series
        yield int(file.stem.removeprefix("rank-")), [_value(key, number) for key, number, _, _ in rows]


def _value(key: str, number: float) -> Value:
    return Value(*_parts_of(key), number)


@functools.cache  # the same few hundred keys in every file, at every scrape
def _parts_of(key: str) -> tuple[str, tuple[str, ...], str]:
    name, labels, part = json.loads(key)
    return name, tuple(labels), part


def cumulative(counts: dict[str, float]) -> list[tuple[str, float]]:
    """A histogram's buckets as Prometheus wants them: upper bounds, and how many observations were not above them."""
    total, buckets = 0.0, []
    for number, bound in enumerate([*map(str, STEP_BUCKETS), "+Inf"]):
        total += counts.get(str(number), 0.0)
        buckets.append((bound, total))
    return buckets


def is_known(value: Value) -> bool:
    """Whether a value belongs to the list of metrics, which another version's file may not."""
    metric = BY_NAME.get(value.metric)
    return (
        metric is not None and metric.source is not Source.NODE and (metric.kind is Kind.HISTOGRAM) == bool(value.part)
    )


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.numbers"
