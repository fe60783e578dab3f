"""One rank's file: safetensors, written from one stretch of host memory or as it is, read by stretches of parameters.

A tensor's name is KIND/PARAMETER@START: elements START, START + 1, ... of the flattened parameter.
"""

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from mixmae.trainer.checkpoints.layout import Written
from mixmae.trainer.checkpoints.pieces import KINDS, Pieces

_CHUNK = 16 * 2**20
_ALIGNMENT = 64


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def buffer_name(name: str) -> str:
    return f"buffer/{name}"


def contents(pieces: Pieces, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a rank saves, by its name in the file: its pieces, and the model's buffers where they are given."""
    found = {
        f"{kind}/{piece.name}@{piece.start}": pieces.values(piece, kind)
        for piece in pieces.to_write()
        for kind in KINDS
    } | {buffer_name(name): value for name, value in buffers.items()}
    return dict(sorted(found.items(), key=lambda entry: -entry[1].element_size()))  # so that all are aligned


class HostMemory:
    """Memory of this host for copies of what a rank saves: the same from save to save, pinned where there is a GPU."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes room for copies of these tensors, where there is none yet; nothing is left to allocate for `copy`.

        Each page is written to, because the system gives memory only then, and takes several times a copy's time for
        it. By numpy: in one thread, beside which the interpreter and the cores that train go on.
        """
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._memory.numel() != size:
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=_on_gpu(tensors))
            self._memory.numpy()[:: mmap.PAGESIZE] = 0

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors' copies in this memory, until the next ones; returns when they are copied."""
        self.reserve(tensors)
        copies = {}
        end = 0
        for name, tensor in tensors.items():
            start, end = end, end + tensor.nbytes
            copies[name] = self._memory[start:end].view(tensor.dtype).view(tensor.shape)
            copies[name].copy_(tensor, non_blocking=True)
        if _on_gpu(tensors):
            torch.cuda.current_stream().synchronize()
        return copies


def _on_gpu(tensors: Mapping[str, Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors.values())


def write(file: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Writes the file and returns when it is on disk.

    Raises:
        OSError: the disk is full, or out of reach.
    """
    digest = xxhash.xxh3_128()
    size = 0
    with file.open("wb", buffering=0) as opened:
        for part in _parts(tensors):
            digest.update(part)
            _write_all(opened.fileno(), part)
            size += len(part)
        os.fsync(opened.fileno())
    return Written(size, digest.hexdigest())


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
    """The file's first bytes, which say where behind them each tensor is."""
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
"""As the safetensors format names them."""


@dataclass
class Wanted:
    """Elements [start, start + len(target)) of a flattened parameter's weight or moment, to be copied into `target`."""

    kind: str
    name: str
    start: int
    target: Tensor


def fill(wanted: Iterable[Wanted], files: Sequence[Path]) -> None:
    """Copies from a checkpoint's files what is wanted; opens no more of them than that takes.

    Args:
        files: all of the checkpoint's, those first that are likely to hold most.
    """
    by_name: dict[tuple[str, str], list[Wanted]] = {}
    missing = 0
    for stretch in wanted:
        by_name.setdefault((stretch.kind, stretch.name), []).append(stretch)
        missing += len(stretch.target)
    for file in files:
        if missing == 0:
            return
        missing -= _fill_from(file, by_name)
    assert missing == 0, f"{missing} elements are in no file"


def _fill_from(file: Path, wanted: Mapping[tuple[str, str], list[Wanted]]) -> int:
    copied = 0
    with safe_open(file, "pt") as opened:
        for key in list(opened.keys()):
            kind, _, place = key.partition("/")
            name, _, start = place.rpartition("@")
            if (kind, name) not in wanted:
                continue
            source = opened.get_slice(key)
            first, end = int(start), int(start) + source.get_shape()[0]
            for stretch in wanted[kind, name]:
                low, high = max(first, stretch.start), min(end, stretch.start + len(stretch.target))
                if low < high:
                    target = stretch.target[low - stretch.start : high - stretch.start]
                    target.copy_(source[low - first : high - first])
                    copied += high - low
    return copied


def read_buffers(file: Path) -> dict[str, Tensor]:
    """The model's buffers by name, from the main rank's file."""
    with safe_open(file, "pt") as opened:
        names = [key for key in list(opened.keys()) if key.startswith(buffer_name(""))]
        return {key.removeprefix(buffer_name("")): opened.get_tensor(key) for key in names}
