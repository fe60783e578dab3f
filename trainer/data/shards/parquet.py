"""Images in Parquet files, as data sets on the Hugging Face hub have them, as a source of shards.

One column holds images, as a struct of `bytes` and `path` or as plain bytes; another may hold labels, and the names
of all others are told. Shards are filled in random order, and rows of Parquet cannot be read so: the images are first
copied, in order, to one file beside the new directory.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from tqdm import tqdm

from mixmae.base.errors import UsageError
from mixmae.trainer.data.extensions import ALL_IMAGE_EXTENSIONS
from mixmae.trainer.data.faults import Reason, UnusableError, first_names
from mixmae.trainer.data.shards.parquet_columns import Columns, find_columns, number_labels
from mixmae.trainer.data.shards.source import Entry, Source, key_of, unique
from mixmae.trainer.data.shards.unused import Unused
from mixmae.trainer.data.splits import is_split

_SUFFIX = ".parquet"
_PART = re.compile(r"(?P<split>.+)-\d+-of-\d+")
"""Names of the files of a data set: `train-00000-of-00005.parquet`."""
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
    """Images of Parquet files.

    References are offset in the copy, None where the file holds no image, extension, and the Parquet file and row.
    """

    copy: Path
    entries: list[Entry]
    classes: list[str]
    description: str

    def read(self, entry: Entry) -> tuple[str, bytes]:
        offset, extension, *_ = entry.reference
        if offset is None:
            raise UnusableError(Reason.MISSING, "found among the file's rows")
        with self.copy.open("rb") as file:
            return extension, os.pread(file.fileno(), entry.size, offset)

    def locate(self, entry: Entry) -> str:
        _, _, file, row = entry.reference
        return f"{file}: row {row}"

    def describe(self) -> str:
        return self.description


def parquet_files(location: str) -> list[Path]:
    """The Parquet files that a source names: one, those of a pattern (`data/train-*.parquet`), or of a folder.

    Says on standard error what else the folder holds.

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
    parts = dict(sorted(part for part in map(_part_of, found) if part is not None))
    if len(parts) > 1:
        commands = " and ".join(
            f"'mixmae shards build {quote(pattern)} OUT/{Path(part).name}'" for part, pattern in parts.items()
        )
        raise UsageError(
            f"{location} holds {', '.join(Path(part).name for part in parts)}: parts of a data set; build each on its "
            f"own: {commands}"
        )
    if found:
        _unused_in(path, found).report()
    return found


def _part_of(file: Path) -> tuple[str, str] | None:
    """The part of a data set that a file holds by its name, such as `data/train`, and the files of that part."""
    if match := _PART.fullmatch(file.stem):
        part = file.parent / match["split"]
        return str(part), f"{part}-*{_SUFFIX}"
    return (str(file.with_suffix("")), str(file)) if is_split(file.stem) else None


def _unused_in(folder: Path, found: Sequence[Path]) -> Unused:
    """What stands beside Parquet files."""
    unused, folders = Unused(), {folder, *(file.parent for file in found)}
    for entry in sorted(entry for one in folders for entry in one.iterdir()):
        if entry in found or entry in folders or entry.name.startswith("."):
            continue
        kind = "subdirectories" if entry.is_dir() else f"{entry.suffix or 'other'} files"
        unused.add(f"{kind} beside Parquet files", entry.name)
    return unused


def open_parquet(files: Sequence[Path], copy: Path, label: str | None = None) -> CopiedImages:
    """The images and labels of Parquet files, which are copied to a file. Says on standard error what it does not use.

    Args:
        label: column of the labels; None: `label`, or the only ClassLabel.

    Raises:
        UsageError: pyarrow is not installed; a file that cannot be read, without one column of images, or with other
            columns than the first; several columns of labels, or none called `label`; no rows; the copy cannot be
            written.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(f"{files[0]}: Parquet needs pyarrow: pip install 'mixmae[parquet]'") from error
    where = first_names([str(file) for file in files])
    try:
        readers = [pq.ParquetFile(file) for file in files]
        columns = find_columns(files[0], readers[0].schema_arrow, label)
        for file, reader in zip(files, readers, strict=True):
            if (found := find_columns(file, reader.schema_arrow, label)) != columns:
                raise UsageError(f"{file} has {found}, {files[0]} has {columns}; build each on its own")
        rows = list(_copied(files, readers, columns, copy))
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"cannot copy the images of {where} to {copy}: {error}") from error
    if not rows:
        raise UsageError(f"{where}: no rows")
    if columns.unused:
        print(f"not used: columns of {files[0]}: {', '.join(columns.unused)}", file=sys.stderr)
    labels, classes = number_labels(files[0], columns, [row[2] for row in rows])
    keys = unique(key for key, *_ in rows)
    entries = [
        Entry(key, (offset, extension, file, row), size, number)
        for key, (_, size, _, offset, extension, file, row), number in zip(keys, rows, labels, strict=True)
    ]
    described = ", ".join(f"{file.resolve()} ({file.stat().st_size})" for file in files)
    return CopiedImages(copy, entries, classes, f"images of {described} with {columns}")


_Row = tuple[str, int, Any, int | None, str, str, int]
"""Key, size, label, offset in the copy, extension, file and row."""


def _copied(files: Sequence[Path], readers: Sequence[Any], columns: Columns, copy: Path) -> Iterator[_Row]:
    image, label, *_ = columns
    read = [image] if label is None else [image, label]
    total, offset = sum(reader.metadata.num_rows for reader in readers), 0
    with copy.open("wb") as out, tqdm(total=total, unit="image", desc="copy", disable=None) as bar:
        for file, reader in zip(files, readers, strict=True):
            row = 0
            for batch in reader.iter_batches(batch_size=_ROWS, columns=read):
                labels = batch.column(label).to_pylist() if label is not None else [None] * len(batch)
                for cell, found in zip(batch.column(image).to_pylist(), labels, strict=True):
                    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
                    at = None if content is None else offset
                    content = (content or b"")[:_MAX_IMAGE]
                    out.write(content)
                    key = key_of(path) if path else f"{file.stem}/{row:08d}"
                    yield key, len(content), found, at, _extension(content, path), str(file), row
                    offset, row = offset + len(content), row + 1
                bar.update(len(batch))


def _extension(content: bytes, path: str | None) -> str:
    """By the image's first bytes, else by its name; a file of neither kind is found to be no image later."""
    by_content = next((kind for start, kind in _SIGNATURES.items() if content.startswith(start)), None)
    by_name = Path(path or "").suffix.lower().removeprefix(".")
    return by_content or (by_name if by_name in ALL_IMAGE_EXTENSIONS else "jpg")
