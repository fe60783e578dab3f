"""One index of several shard directories, each with its share of every epoch."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from mixmae.base.errors import UsageError
from mixmae.base.redaction import redact
from mixmae.trainer.data.annotations import ANNOTATION, AnnotationKind, Annotations
from mixmae.trainer.data.faults import Reason, first_names
from mixmae.trainer.data.index import INVALID_LABEL, ShardIndex, Table, fingerprint_of
from mixmae.trainer.data.order import Quota, apportion
from mixmae.trainer.data.stores.joined import JoinedStore
from mixmae.trainer.recipe.sections.places import Place


def select_shards(index: ShardIndex, names: Sequence[str]) -> ShardIndex:
    """The index of some shards of a directory, in the order of its own.

    Raises:
        UsageError: the directory's index does not list all of them, or they hold no images.
    """
    known, where = [shard.name for shard in index.shards], index.store.location
    if missing := [name for name in names if name not in set(known)]:
        raise UsageError(
            f"{where}: its index lists no {first_names(missing)}, but {len(known)} shards, {known[0]} to {known[-1]}"
        )
    numbers = np.flatnonzero(np.isin(known, names))
    if len(numbers) == len(known):
        return index
    chosen = np.isin(index.samples["shard"], numbers)
    samples = index.samples[chosen]
    samples["shard"] = np.searchsorted(numbers, samples["shard"])
    if not len(samples):
        raise UsageError(f"{where}: {first_names(names)} hold no images")
    shards = tuple(index.shards[number] for number in numbers)
    beside = None
    if index.annotations is not None and index.annotation_table is not None:
        beside = Annotations(index.annotations, index.annotation_table[chosen], index.category_ids)
    fingerprint = fingerprint_of(shards, index.classes, samples, beside)
    return ShardIndex(index.store, shards, index.classes, samples, fingerprint, *(beside or ()))


def join(places: Sequence[Place], indices: Sequence[ShardIndex]) -> ShardIndex:
    """One index of several directories. Classes of one name are one class, whatever their numbers.

    Raises:
        UsageError: objects or label maps whose classes differ.
    """
    if len(indices) == 1:
        return indices[0]
    files, shards = {}, []
    for index in indices:
        for shard in index.shards:
            name = f"{redact(index.store.location)}/{shard.name}"
            files[name] = (index.store.location, shard.name)
            shards.append(shard._replace(name=name))
    classes = _classes(indices)
    kind = _kind(indices)
    sizes = [len(index) for index in indices]
    weights = [size if place.weight is None else place.weight for place, size in zip(places, sizes, strict=True)]
    parts = apportion(sum(sizes), weights)
    quotas = tuple(Quota(len(index.shards), part) for index, part in zip(indices, parts, strict=True))
    identity = [[index.fingerprint for index in indices], parts]
    return ShardIndex(
        JoinedStore({index.store.location: index.store for index in indices}, files),
        tuple(shards),
        classes,
        _samples(indices, classes),
        hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        kind,
        None if kind is None else np.concatenate([_annotations_of(index) for index in indices]),
        next((index.category_ids for index in indices if index.category_ids), ()) if kind == "objects" else (),
        quotas,
    )


def _classes(indices: Sequence[ShardIndex]) -> tuple[str, ...]:
    """Those of the first place that names some, and behind them the new ones of the others."""
    return tuple(dict.fromkeys(name for index in indices for name in index.classes))


def _kind(indices: Sequence[ShardIndex]) -> AnnotationKind | None:
    """That of all annotations; None where places have different ones, of which pretraining reads none."""
    kinds = {index.annotations for index in indices if index.annotations is not None}
    if len(kinds) != 1:
        return None
    named = [index for index in indices if index.annotations is not None]
    for index in named[1:]:
        if (index.classes, index.category_ids) != (named[0].classes, named[0].category_ids):
            raise UsageError(
                f"the {index.annotations} in {index.store.location} have other classes than those in "
                f"{named[0].store.location}; their annotations hold the numbers of classes: build both with the same"
            )
    return kinds.pop()


def _samples(indices: Sequence[ShardIndex], classes: tuple[str, ...]) -> Table:
    """The rows of all places, with shards and classes as they are numbered together."""
    numbers, before, tables = {name: number for number, name in enumerate(classes)}, 0, []
    for index in indices:
        table = np.array(index.samples)
        table["shard"] += before
        before += len(index.shards)
        labels = table["label"]
        labelled = labels >= 0
        if index.classes:
            labels[labelled] = np.array([numbers[name] for name in index.classes], dtype="<i4")[labels[labelled]]
        elif classes:
            labels[labelled] = INVALID_LABEL  # numbers, where other places have names
        tables.append(table)
    return np.concatenate(tables)


def _annotations_of(index: ShardIndex) -> Any:
    if index.annotation_table is not None:
        return index.annotation_table
    missing = np.zeros(len(index), ANNOTATION)
    missing["state"] = Reason.MISSING_ANNOTATION
    return missing


def describe_shares(index: ShardIndex) -> list[str]:
    """A line for each place of several: its share of an epoch, and how often that visits each image."""
    lines, ends = [], np.cumsum([quota.shards for quota in index.quotas])
    for quota, end in zip(index.quotas, ends, strict=True):
        shards = index.shards[end - quota.shards : end]
        images = sum(shard.samples for shard in shards)
        where = shards[0].name.rpartition("/")[0]
        share = quota.samples / len(index)
        often = quota.samples / images
        each = "each once" if quota.samples == images else f"each {often:.3g} times"
        lines.append(f"{where}: {share:.1%} of an epoch, {images} images, {each}")
    return lines
