"""One rank's file: safetensors, written from one stretch of host memory, read by stretches of parameters.

A tensor's name is KIND/PARAMETER@START: elements START, START + 1, ... of the flattened parameter.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from trainer.checkpoints.layout import Written
from trainer.checkpoints.pieces import KINDS, Pieces

_CHUNK = 16 * 2**20
_ALIGNMENT = 64
_STATE_BYTES = len(KINDS) * torch.float32.itemsize


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def buffer_name(name: str) -> str:
    return f"buffer/{name}"


class Snapshot:
    """A copy in host memory of what a rank saves; the memory is kept from save to save, pinned where there is a GPU.

    It is made in a thread from the start on: the first save then stops training for no longer than the others.
    """

    def __init__(self, pieces: Pieces, buffers: Mapping[str, Tensor]) -> None:
        held = pieces.to_write()
        size = _STATE_BYTES * sum(piece.numel for piece in held) + sum(buffer.nbytes for buffer in buffers.values())
        self.header = b""
        maker = ThreadPoolExecutor(1, "snapshot")
        self._made = maker.submit(_host_memory, size, pinned=any(piece.home.is_cuda for piece in held))
        maker.shutdown(wait=False)

    @property
    def is_ready(self) -> bool:
        """Whether the memory was made."""
        return self._made.done()

    @property
    def _memory(self) -> Tensor:
        return self._made.result()

    def take(self, pieces: Pieces, buffers: Mapping[str, Tensor]) -> None:
        """Copies what it was made for, as it is now; returns when all is copied."""
        sources = {
            f"{kind}/{piece.name}@{piece.start}": pieces.values(piece, kind)
            for piece in pieces.to_write()
            for kind in KINDS
        } | {buffer_name(name): value for name, value in buffers.items()}
        sources = dict(sorted(sources.items(), key=lambda entry: -entry[1].element_size()))  # so that all are aligned
        self.header, places = _header(sources)
        for (start, end), source in zip(places, sources.values(), strict=True):
            target = self._memory[start:end].view(source.dtype).view(source.shape)
            target.copy_(source, non_blocking=True)
        if self._memory.is_pinned():
            torch.cuda.current_stream().synchronize()

    @property
    def bytes(self) -> int:
        return len(self.header) + self._memory.numel()

    def write(self, file: Path) -> Written:
        """Writes the file and returns when it is on disk.

        Raises:
            OSError: the disk is full, or out of reach.
        """
        digest = xxhash.xxh3_128()
        content = memoryview(self._memory.numpy().data)
        with file.open("wb", buffering=0) as opened:
            for part in (memoryview(self.header), *(content[i : i + _CHUNK] for i in range(0, len(content), _CHUNK))):
                digest.update(part)
                _write_all(opened.fileno(), part)
            os.fsync(opened.fileno())
        return Written(self.bytes, digest.hexdigest())


def _host_memory(size: int, pinned: bool) -> Tensor:
    """Written to once: only then has it pages."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned).zero_()


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _header(sources: Mapping[str, Tensor]) -> tuple[bytes, list[tuple[int, int]]]:
    """The file's first bytes, and where each tensor goes behind them."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places = []
    end = 0
    for name, source in sources.items():
        start, end = end, end + source.numel() * source.element_size()
        places.append((start, end))
        entries[name] = {"dtype": _DTYPES[source.dtype], "shape": list(source.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, places


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
    with ExitStack() as stack:
        opened = stack.enter_context(safe_open(file, "pt"))
        names = [key for key in list(opened.keys()) if key.startswith(buffer_name(""))]
        return {key.removeprefix(buffer_name("")): opened.get_tensor(key) for key in names}
