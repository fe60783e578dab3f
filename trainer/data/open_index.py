"""Opening shards by their index, which is checked before anything is read by it."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mixmae.base.errors import UsageError
from mixmae.base.files import what_is
from mixmae.trainer.data.annotations import ANNOTATION, ANNOTATIONS, Annotations
from mixmae.trainer.data.faults import ARRAY, JPEG, PILLOW, Reason, has_control_characters
from mixmae.trainer.data.index import (
    ANNOTATED_FORMAT,
    FORMAT,
    INDEX,
    INVALID_LABEL,
    LOCATION,
    SAMPLE,
    SAMPLES,
    Shard,
    ShardIndex,
    Table,
    fingerprint_of,
)
from mixmae.trainer.data.joined_index import join, select_shards
from mixmae.trainer.data.no_shards import why_no_shards
from mixmae.trainer.data.stores.open_store import open_store
from mixmae.trainer.data.stores.store import Store, is_plain
from mixmae.trainer.recipe.sections.data import Cache, Network
from mixmae.trainer.recipe.sections.places import WeightedShards, places_of

_ROWS = 2**20
"""Rows that are checked at once: a table may be larger than memory."""
_STATES = np.array([JPEG, PILLOW, ARRAY, *Reason])
_MAPPED = 64 * 2**20
"""Bytes of a sample table from which on the processes of a node share its pages. A smaller one is read into memory,
where another program that truncates the file does not reach it."""


def open_index(
    location: str | Path | Sequence[WeightedShards], network: Network | None = None, cache: Cache | None = None
) -> ShardIndex:
    """Reads the index of a directory or URL, of the shards that a brace pattern names, or of a list of such places.

    Raises:
        UsageError: no directory, no index, a damaged one, no samples; a pattern of shards that it does not list.
    """
    places = places_of(location)
    indices = [open_directory(place.location, network, cache) for place in places]
    chosen = [
        index if place.names is None else select_shards(index, place.names)
        for place, index in zip(places, indices, strict=True)
    ]
    return join(places, chosen)


def open_directory(location: str, network: Network | None = None, cache: Cache | None = None) -> ShardIndex:
    """Reads the index of one directory or URL; errors as `open_index`."""
    store = open_store(location, network or Network(), cache or Cache())
    if store.directory is not None and not store.directory.is_dir():
        raise UsageError(
            f"shard directory {location} {what_is(store.directory)}; make one with 'mixmae shards build SRC {location}'"
            f" or 'mixmae shards synth {location}'"
        )
    local = store.directory is not None
    again = f"run 'mixmae shards index {location}'" if local else "index it where it is local, and upload it"
    try:
        content = json.loads(store.read_whole(INDEX))
        if (format_ := dict(content).get("format")) not in (FORMAT, ANNOTATED_FORMAT):
            expected = f"{FORMAT} or, with annotations, {ANNOTATED_FORMAT}"
            raise UsageError(f"{INDEX} of {location} has format {format_!r}, expected {expected}; {again}")
        samples = _read_table(store, SAMPLES, SAMPLE)
        annotations = _read_annotations(store, content["annotations"]) if format_ == ANNOTATED_FORMAT else None
        if LOCATION in content:
            store = _store_of_shards(location, content[LOCATION], network or Network(), cache or Cache())
        shards = tuple(Shard(**shard) for shard in content["shards"])
        classes, fingerprint = tuple(content["classes"]), content["fingerprint"]
        _require_types(shards, classes)
    except FileNotFoundError as error:
        folder = store.directory
        hint = again if folder is None or any(folder.glob("*.tar")) else why_no_shards(folder)
        raise UsageError(f"{location} has no {Path(str(error.filename or INDEX)).name}: {hint}") from error
    except UsageError:
        raise
    except Exception as error:  # JSON and NumPy raise many kinds of errors of what is damaged on purpose
        raise UsageError(f"the index of {location} is damaged or out of reach ({error}); {again}") from error
    if not len(samples):
        raise UsageError(f"the shards in {location} hold no images")
    if len(samples) != sum(shard.samples for shard in shards):
        raise UsageError(
            f"{SAMPLES} of {location} lists {len(samples)} images, {INDEX} {sum(s.samples for s in shards)}; {again}"
        )
    tables = f"{SAMPLES} and {ANNOTATIONS}" if annotations else SAMPLES
    if fingerprint_of(shards, classes, samples, annotations) != fingerprint:
        raise UsageError(f"{INDEX} and {tables} of {location} do not belong together; {again}")
    wrong = _contradiction(shards, samples) or (annotations and annotations.contradiction(samples, _sizes(shards)))
    if wrong is not None:
        raise UsageError(f"the index of {location} contradicts itself ({wrong}); {again}")
    return ShardIndex(store, shards, classes, samples, fingerprint, *(annotations or ()))


def _store_of_shards(index: str, location: Any, network: Network, cache: Cache) -> Store:
    """The store of the shards that an index apart from them names. Raises UsageError where they are not there."""
    if not isinstance(location, str) or not location:
        raise ValueError(f"the location of its shards is {location!r}")
    store = open_store(location, network, cache)
    if store.directory is not None and not store.directory.is_dir():
        raise UsageError(
            f"the index in {index} is of shards in {location}, which {what_is(store.directory)}; mount it, or run "
            f"'mixmae shards index DIR --output {index}' where they are now"
        )
    return store


def _require_types(shards: Sequence[Shard], classes: Sequence[str]) -> None:
    """Raises ValueError for values that JSON can hold and an index cannot."""
    for shard in shards:
        numbers = (shard.samples, shard.bytes)
        if not isinstance(shard.name, str) or has_control_characters(shard.name) or not is_plain(shard.name):
            raise ValueError(f"a shard is called {shard.name!r}; expected a name without folders")
        if not isinstance(shard.sha256, str):
            raise ValueError(f"{shard.name} has the checksum {shard.sha256!r}")
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"{shard.name} has {shard.samples} samples and {shard.bytes} bytes")
    if not all(isinstance(name, str) for name in classes):
        raise ValueError("class names that are no text")


def _contradiction(shards: Sequence[Shard], samples: Table) -> str | None:
    """What makes a table unusable although its fingerprint fits; None if nothing does."""
    ends = np.cumsum([shard.samples for shard in shards])
    sizes = _sizes(shards)
    for first in range(0, len(samples), _ROWS):
        rows = samples[first : first + _ROWS]
        shard = np.searchsorted(ends, np.arange(first, first + len(rows)), side="right")
        for wrong, what in (
            (rows["shard"] != shard, f"is not in the shard that {INDEX} says"),
            (rows["offset"] < 0, "starts before its shard"),
            (rows["size"] < 0, "has a negative size"),
            (rows["offset"] > sizes[shard] - rows["size"], "ends behind its shard"),
            (~np.isin(rows["state"], _STATES), "has a state that is unknown here"),
            (rows["label"] < INVALID_LABEL, "has a negative label"),
        ):
            if wrong.any():
                return f"sample {first + int(np.flatnonzero(wrong)[0])} {what}"
    return None


def _sizes(shards: Sequence[Shard]) -> npt.NDArray[np.int64]:
    return np.array([shard.bytes for shard in shards], dtype=np.int64)


def _read_annotations(store: Store, described: dict[str, Any]) -> Annotations:
    return Annotations.read(described, _read_table(store, ANNOTATIONS, ANNOTATION))


def _read_table(store: Store, name: str, dtype: np.dtype[Any]) -> Table:
    """A table of `dtype` rows. Raises ValueError for what is none."""
    if store.directory is not None and store.size(name) > _MAPPED:
        table: Table = np.load(store.directory / name, mmap_mode="r")
    else:
        table = np.load(io.BytesIO(store.read_whole(name)))
    if not isinstance(table, np.ndarray) or table.dtype != dtype or table.ndim != 1:
        raise ValueError(f"{name} is no table of samples")
    return table
