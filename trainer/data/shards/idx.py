"""Images and labels in files of the IDX format, as Fashion-MNIST and MNIST come: grey, 8 bits, gzipped or not."""

import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mixmae.base.errors import UsageError
from mixmae.trainer.data.shards.source import Entry, Source

Bytes = npt.NDArray[np.uint8]
_UNSIGNED_BYTE = 8
"""The format's number for the type of its values."""


@dataclass(frozen=True)
class IdxImages:
    """Images uint8 [N, H, W] and labels uint8 [N]."""

    images: Bytes
    labels: Bytes

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1

    def balanced(self, per_class: int, seed: int) -> list[int]:
        """Numbers of `per_class` random images of each class.

        Raises:
            UsageError: a class has fewer.
        """
        random, chosen = np.random.default_rng([seed, per_class]), []
        for label in range(self.num_classes):
            members = np.flatnonzero(self.labels == label)
            if len(members) < per_class:
                raise UsageError(f"class {label} has {len(members)} images; expected {per_class} or more")
            chosen += random.permutation(members)[:per_class].tolist()
        return sorted(chosen)


def read_idx_pair(images: Path, labels: Path) -> IdxImages:
    """Images with their labels.

    Raises:
        UsageError: a file that is missing, damaged, or not of this format, or not as many labels as images.
    """
    found = IdxImages(read_idx(images, dimensions=3), read_idx(labels, dimensions=1))
    if not 0 < len(found.images) == len(found.labels):
        raise UsageError(f"{images} holds {len(found.images)} images, and {labels} {len(found.labels)} labels")
    return found


def read_idx(file: Path, dimensions: int) -> Bytes:
    """A file's array.

    Raises:
        UsageError: it is missing, damaged, or not of this format with values of 8 bits and so many dimensions.
    """
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
    except (OSError, EOFError) as error:
        raise UsageError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes([0, 0, _UNSIGNED_BYTE, dimensions]):
        raise UsageError(f"{file} is no IDX file of bytes with {dimensions} dimensions")
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).astype(int)
    if len(content) - head != shape.prod():
        raise UsageError(f"{file} holds {len(content) - head} values; its head says {' x '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


class IdxSource(Source):
    """Some of these images, as PNGs: no pixel changes."""

    def __init__(self, found: IdxImages, chosen: Sequence[int]) -> None:
        self.classes = [str(label) for label in range(found.num_classes)]
        self._images = found.images[list(chosen)]
        size = self._images[0].size  # about, in bytes: shards are planned before images are compressed
        self.entries = [Entry(f"{number:07d}", at, size, int(found.labels[number])) for at, number in enumerate(chosen)]

    def read(self, entry: Entry) -> tuple[str, bytes]:
        buffer = io.BytesIO()
        Image.fromarray(self._images[entry.reference]).save(buffer, "PNG")
        return "png", buffer.getvalue()

    def locate(self, entry: Entry) -> str:
        return f"image {entry.key}"

    def describe(self) -> str:
        return f"{len(self.entries)} images of IDX files"
