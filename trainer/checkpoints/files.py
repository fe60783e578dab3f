"""One rank's file of a checkpoint: safetensors, read by slices of parameters.

The tensor KIND/PARAMETER@START holds elements START, START + 1, ... of a flattened parameter; KIND is `weight` or the
name of an optimizer state. buffer/NAME is a buffer of this rank.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mixmae.trainer.checkpoints.manifest import DamagedError, FileRecord

_CHUNK = 16 * 2**20
_ALIGNMENT = 64


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def write(file: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Writes and fsyncs the file.

    Args:
        tensors: by name, ordered by decreasing element size, so that all are aligned.

    Raises:
        OSError: the disk is full or unreachable.
    """
    digest = xxhash.xxh3_128()
    size = 0
    with file.open("wb", buffering=0) as opened:
        for part in _parts(tensors):
            digest.update(part)
            _write_all(opened.fileno(), part)
            size += len(part)
        os.fsync(opened.fileno())
    return FileRecord(size, digest.hexdigest())


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The file's bytes, a chunk at a time."""
    yield memoryview(_header(tensors))
    for tensor in tensors.values():
        content = memoryview(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
        yield from (content[start : start + _CHUNK] for start in range(0, len(content), _CHUNK))


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """The safetensors header: dtype, shape and offsets of each tensor."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in the safetensors format."""


@dataclass
class ReadItem:
    """Elements [start, start + len(target)) of a flattened weight or optimizer state, to copy to `target`."""

    kind: str
    name: str
    start: int
    target: Tensor


def read_slices(items: Iterable[ReadItem], files: Sequence[Path]) -> None:
    """Fills the items from a checkpoint's files; opens only as many files as needed.

    Args:
        files: all files of the checkpoint, most likely ones first.

    Raises:
        DamagedError: elements that no file holds, or a file that holds what no checkpoint does.
    """
    by_name: dict[tuple[str, str], list[ReadItem]] = {}
    missing = 0
    for item in items:
        by_name.setdefault((item.kind, item.name), []).append(item)
        missing += len(item.target)
    for file in files:
        if missing == 0:
            return
        try:
            missing -= _read_from(file, by_name)
        except (SafetensorError, ValueError, IndexError, RuntimeError, OSError) as error:
            raise DamagedError(f"{file.name} holds no slices of weights ({error})") from error
    if missing:
        raise DamagedError(f"{missing} elements are in no file")


def _read_from(file: Path, items: Mapping[tuple[str, str], list[ReadItem]]) -> int:
    """Copies the elements that the file has; returns their number."""
    copied = 0
    with safe_open(file, "pt") as opened:
        for key in list(opened.keys()):
            kind, _, rest = key.partition("/")
            name, _, start = rest.rpartition("@")
            if (kind, name) not in items:
                continue
            source = opened.get_slice(key)
            first, end = int(start), int(start) + source.get_shape()[0]
            for item in items[kind, name]:
                low, high = max(first, item.start), min(end, item.start + len(item.target))
                if low < high:
                    item.target[low - item.start : high - item.start].copy_(source[low - first : high - first])
                    copied += high - low
    return copied
