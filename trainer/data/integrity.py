"""Checks of a run's shards before it starts: are they all there, and are enough of their samples usable?"""

from collections import Counter

import numpy as np

from mixmae.base.errors import UsageError
from mixmae.trainer.data.annotations import ANNOTATED, AnnotationKind
from mixmae.trainer.data.decode import open_encoded, upright_size
from mixmae.trainer.data.dense.label_maps import highest_label, parse_label_map
from mixmae.trainer.data.faults import ARRAY, Reason, UnusableError, describe, first_names, is_usable
from mixmae.trainer.data.index import INVALID_LABEL, ShardIndex
from mixmae.trainer.recipe.sections.data import Data


def require_usable(index: ShardIndex, max_corrupt_fraction: float) -> str | None:
    """Accepts a directory with at most the allowed fraction of unusable samples.

    The sizes of shards on a file system are checked too; of remote shards only reading tells.

    Returns:
        a sentence about what will be replaced, if anything.

    Raises:
        UsageError: too many samples are unusable, or in shards that are missing or cut short.
    """
    rows = index.samples
    unusable = ~is_usable(rows["state"])
    sizes, parts = index.shard_sizes(), []
    missing = rows["offset"] + rows["size"] > sizes[rows["shard"]]
    for number in np.unique(rows["shard"][missing]):
        shard, size = index.shards[number], sizes[number]
        parts.append(f"{shard.name} ({'missing' if size < 0 else f'{size} bytes, {shard.bytes} when indexed'})")
    total = int((unusable | missing).sum())
    if not total:
        return None
    states, counts = np.unique(rows["state"][unusable], return_counts=True)
    if len(states):
        reasons = Counter({Reason(state): int(count) for state, count in zip(states, counts, strict=True)})
        parts.append(f"{describe(reasons)} when indexed")
    found = f"{total} of {len(index)} samples in {index.store.location} cannot be used: {first_names(parts)}"
    if total > max_corrupt_fraction * len(index):
        raise UsageError(
            f"{found}; more than data.max_corrupt_fraction={max_corrupt_fraction} allows: see 'mixmae shards check "
            f"{index.store.location}', restore the shards, or raise that limit"
        )
    return f"{found}; they will be replaced by other samples"


def require_pixels(index: ShardIndex, data: Data) -> None:
    """Looks at the first usable image, if nothing but its content says which channels it has.

    Raises:
        UsageError: it has others than the recipe says; so have all, most likely.
    """
    states = index.samples["state"]
    usable = np.flatnonzero(is_usable(states))
    if not len(usable) or (data.pixels.is_rgb and states[usable[0]] != ARRAY):
        return
    first = int(usable[0])
    try:
        open_encoded(index.read(first), int(states[first]), data.decoder, data.max_pixels, data.pixels)
    except UnusableError as error:
        if error.reason is Reason.OTHER_PIXELS:
            raise UsageError(f"{index.name_of(first)} in {index.store.location}: {error}") from error


def require_labels(index: ShardIndex, purpose: str) -> int:
    """The number of classes of a directory in which every usable sample is labelled.

    Args:
        purpose: what needs the labels, for the message: `finetuning`.

    Raises:
        UsageError: samples are unlabelled, or their labels are no class.
    """
    rows = index.samples
    usable = is_usable(rows["state"])
    wanting = np.flatnonzero(usable & (rows["label"] < 0))
    if len(wanting):
        invalid = int((rows["label"][wanting] == INVALID_LABEL).sum())
        kinds = [f"{len(wanting) - invalid} unlabelled"] if invalid < len(wanting) else []
        kinds += [f"{invalid} with a label that is no class"] if invalid else []
        names = first_names([index.name_of(int(sample)) for sample in wanting[:3]], count=len(wanting))
        raise UsageError(
            f"{purpose} needs a label for every image, but of {int(usable.sum())} usable ones in "
            f"{index.store.location} {' and '.join(kinds)}: {names}; label them and index the shards again, or build "
            "shards without them"
        )
    return len(index.classes) or int(rows["label"].max()) + 1


def require_annotations(index: ShardIndex, kind: AnnotationKind, purpose: str) -> None:
    """Accepts a directory whose usable images have annotations of a kind.

    Args:
        purpose: what needs them, for the message: `detection`.

    Raises:
        UsageError: there are none, or of another kind, or not all can be used.
    """
    where, option = index.store.location, {"objects": "--coco FILE", "segments": "--label-maps DIR"}[kind]
    if index.annotations != kind or index.annotation_table is None:
        has = f"have {index.annotations}" if index.annotations else "have no annotations"
        raise UsageError(
            f"{purpose} needs shards with {kind}, but those in {where} {has}; build them with 'mixmae shards build "
            f"IMAGES OUT {option}'"
        )
    states = index.annotation_table["state"]
    wanting = np.flatnonzero(is_usable(index.samples["state"]) & (states != ANNOTATED))
    if len(wanting):
        reasons = Counter(Reason(state) for state in states[wanting])
        names = first_names([index.name_of(int(sample)) for sample in wanting[:3]], count=len(wanting))
        raise UsageError(
            f"{purpose} needs an annotation for every image, but {len(wanting)} of {len(index)} in {where} cannot be "
            f"used ({describe(reasons)}): {names}; fix them and index the shards again, or build shards without them"
        )


def require_judged_pixels(index: ShardIndex, purpose: str) -> None:
    """Reads label maps up to the first that has a pixel which is not ignored: without one no figure can be told.

    Raises:
        UsageError: there is none, or a label map before it cannot be read.
    """
    for sample in range(len(index)):
        try:
            labels = parse_label_map(index.read_annotation(sample), *upright_size(index.read(sample)))
        except UnusableError as error:
            raise index.refusal(sample, error) from error
        if highest_label(labels) >= 0:
            return
    raise UsageError(
        f"{purpose}={index.store.location}: every pixel of its {len(index)} label maps is ignored (255), so that none "
        "can be right or wrong; build the shards from label maps with classes, of which --reduce-zero-label ignores 0"
    )
