"""Images in Parquet files, as data sets on the Hugging Face hub have them, as a source of shards.

One column holds images, as a struct of `bytes` and `path` or as plain bytes; another may hold labels. Shards are filled
in random order, and rows of Parquet cannot be read so: the images are first copied, in order, to one file beside the
new directory.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from tqdm import tqdm

from mixmae.base.errors import UsageError
from mixmae.trainer.data.extensions import ALL_IMAGE_EXTENSIONS
from mixmae.trainer.data.faults import first_names
from mixmae.trainer.data.index import UNLABELLED
from mixmae.trainer.data.shards.labels import is_class_name
from mixmae.trainer.data.shards.sources import Entry, Source, key_of, unique

_SUFFIX = ".parquet"
_PART = re.compile(r"(?P<split>.+)-\d+-of-\d+")
"""Names of the files of a data set: `train-00000-of-00005.parquet`."""
_BINARY_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
_ROWS = 64
_MAX_IMAGE = 2**31 - 1
_SIGNATURES = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"RIFF": "webp",
    b"GIF8": "gif",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"BM": "bmp",
}


@dataclass(frozen=True)
class CopiedImages(Source):
    """Images of Parquet files; references are offset in the copy, extension, and the Parquet file and row."""

    copy: Path
    entries: list[Entry]
    classes: list[str]
    description: str

    def read(self, entry: Entry) -> tuple[str, bytes]:
        offset, extension, *_ = entry.reference
        with self.copy.open("rb") as file:
            return extension, os.pread(file.fileno(), entry.size, offset)

    def locate(self, entry: Entry) -> str:
        _, _, file, row = entry.reference
        return f"{file}: row {row}"

    def describe(self) -> str:
        return self.description


def parquet_files(location: str) -> list[Path]:
    """The Parquet files that a source names: one, those of a pattern (`data/train-*.parquet`), or of a folder.

    Raises:
        UsageError: a folder with files of several parts of a data set, such as train and validation.
    """
    path = Path(location)
    if path.suffix == _SUFFIX and path.is_file():
        return [path]
    if path.suffix == _SUFFIX and "*" in path.name:
        return sorted(path.parent.glob(path.name))
    if not path.is_dir():
        return []
    found = sorted([*path.glob(f"*{_SUFFIX}"), *path.glob(f"data/*{_SUFFIX}")])
    parts = sorted({str(file.parent / match["split"]) for file in found if (match := _PART.fullmatch(file.stem))})
    if len(parts) > 1:
        commands = " and ".join(
            f"'mixmae shards build {quote(f'{part}-*{_SUFFIX}')} OUT/{Path(part).name}'" for part in parts
        )
        raise UsageError(
            f"{location} holds {', '.join(Path(part).name for part in parts)}: parts of a data set; build each on its "
            f"own: {commands}"
        )
    return found


def open_parquet(files: Sequence[Path], copy: Path) -> CopiedImages:
    """The images and labels of Parquet files, which are copied to a file.

    Raises:
        UsageError: pyarrow is not installed; a file that cannot be read, or without one column of images; no rows; the
            copy cannot be written.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(f"{files[0]}: Parquet needs pyarrow: pip install 'mixmae[parquet]'") from error
    where = first_names([str(file) for file in files])
    try:
        readers = [pq.ParquetFile(file) for file in files]
        image, label, names = _columns(files[0], readers[0].schema_arrow)
        rows = list(_copied(files, readers, image, label, copy))
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"cannot copy the images of {where} to {copy}: {error}") from error
    if not rows:
        raise UsageError(f"{where}: no rows")
    labels, classes = _numbered(files[0], label, [row[2] for row in rows], names)
    keys = unique(key for key, *_ in rows)
    entries = [
        Entry(key, (offset, extension, file, row), size, number)
        for key, (_, size, _, offset, extension, file, row), number in zip(keys, rows, labels, strict=True)
    ]
    described = ", ".join(f"{file.resolve()} ({file.stat().st_size})" for file in files)
    return CopiedImages(copy, entries, classes, f"images of {described}")


def _columns(file: Path, schema: Any) -> tuple[str, str | None, list[str] | None]:
    """The column of images, that of labels, and the names of the labels 0, 1, ..."""
    import pyarrow as pa

    features = _features(schema)

    def holds_images(field: Any) -> bool:
        if features.get(field.name, {}).get("_type") == "Image":
            return True
        if pa.types.is_struct(field.type):
            return "bytes" in [inner.name for inner in field.type]
        return pa.types.is_binary(field.type) and field.name.lower() in _BINARY_NAMES

    images = [field.name for field in schema if holds_images(field)]
    if len(images) != 1:
        raise UsageError(
            f"{file} has {len(images)} columns of images among {', '.join(schema.names)}; expected one, a struct of "
            "bytes and path"
        )
    classes = {name: one.get("names") for name, one in features.items() if one.get("_type") == "ClassLabel"}
    label = "label" if "label" in schema.names else next(iter(classes)) if len(classes) == 1 else None
    return images[0], label, classes.get(label) if label is not None else None


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What the `datasets` library says of the columns; nothing where it did not write the file."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: one for name, one in features.items() if isinstance(one, dict)}
    except (TypeError, KeyError, ValueError, AttributeError):
        return {}


_Row = tuple[str, int, Any, int, str, str, int]
"""Key, size, label, offset in the copy, extension, file and row."""


def _copied(files: Sequence[Path], readers: Sequence[Any], image: str, label: str | None, copy: Path) -> Iterator[_Row]:
    columns = [image] if label is None else [image, label]
    total, offset = sum(reader.metadata.num_rows for reader in readers), 0
    with copy.open("wb") as out, tqdm(total=total, unit="image", desc="copy", disable=None) as bar:
        for file, reader in zip(files, readers, strict=True):
            row = 0
            for batch in reader.iter_batches(batch_size=_ROWS, columns=columns):
                labels = batch.column(label).to_pylist() if label is not None else [None] * len(batch)
                for cell, found in zip(batch.column(image).to_pylist(), labels, strict=True):
                    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
                    content = (content or b"")[:_MAX_IMAGE]
                    out.write(content)
                    key = key_of(path) if path else f"{file.stem}/{row:08d}"
                    yield key, len(content), found, offset, _extension(content, path), str(file), row
                    offset, row = offset + len(content), row + 1
                bar.update(len(batch))


def _extension(content: bytes, path: str | None) -> str:
    """By the image's first bytes, else by its name; a file of neither kind is found to be no image later."""
    by_content = next((kind for start, kind in _SIGNATURES.items() if content.startswith(start)), None)
    by_name = Path(path or "").suffix.lower().removeprefix(".")
    return by_content or (by_name if by_name in ALL_IMAGE_EXTENSIONS else "jpg")


def _numbered(
    file: Path, column: str | None, labels: list[Any], names: list[str] | None
) -> tuple[list[int], list[str]]:
    """Labels as numbers, and the names of the numbers."""
    kinds = {type(label) for label in labels if label is not None}
    if kinds <= {str} and kinds:
        classes = sorted(set(labels) - {None})
        if bad := [name for name in classes if not is_class_name(name)]:
            raise UsageError(f"{file}: {column} is {bad[0][:80]!r}; expected at most 200 printable characters")
        numbers = {name: number for number, name in enumerate(classes)}
        return [UNLABELLED if label is None else numbers[label] for label in labels], classes
    if not kinds <= {int}:
        raise UsageError(
            f"{file}: {column} holds values of the kind {', '.join(sorted(kind.__name__ for kind in kinds))}; expected "
            "whole numbers or names"
        )
    found = np.array([UNLABELLED if label is None else label for label in labels], dtype=np.int64)
    bound = len(names) if names else 2**31
    if len(found) and not UNLABELLED <= found.min() <= found.max() < bound:
        raise UsageError(f"{file}: {column} has values from {found.min()} to {found.max()}; expected 0 to {bound - 1}")
    return found.tolist(), list(names or [])
