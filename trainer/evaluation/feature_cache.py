"""Features of all images of a shard directory, computed once by all ranks and mapped into their memory from files."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from mixmae.base.files import atomic_write, replacing
from mixmae.base.json_text import parse_json
from mixmae.trainer.engine.distributed import Ranks, all_gather

_IDENTITY = "identity.json"


class FeatureCache:
    """A folder of complete features; image i is in file i % files, row i // files.

    Args:
        folder: of the run, which all ranks share.
    """

    def __init__(self, folder: Path, files: int) -> None:
        self._parts = [np.load(_file(folder, number, files), mmap_mode="r") for number in range(files)]

    def rows(self, samples: Iterable[int]) -> Tensor:
        """fp32 [n, C]."""
        parts = self._parts
        return torch.from_numpy(np.stack([parts[i % len(parts)][i // len(parts)] for i in samples]))


def open_cache(folder: Path, identity: dict[str, Any], compute: Callable[[], Tensor], ranks: Ranks) -> FeatureCache:
    """The features of `identity`, which are computed and written unless the folder holds them; on all ranks together.

    Args:
        identity: whatever the features depend on, as JSON holds it.
        compute: gives this rank's share, as `held_out_batches` deals images, fp32 [n, C].
    """
    files = _complete(folder, identity)
    if _agreed(files is None, ranks):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _IDENTITY).unlink(missing_ok=True)
        with replacing(_file(folder, ranks.rank, ranks.world_size)) as partial, partial.open("wb") as file:
            np.save(file, compute().cpu().numpy())
        _barrier(ranks)
        files = ranks.world_size
        if ranks.is_main:
            atomic_write(folder / _IDENTITY, json.dumps({"files": files, **identity}) + "\n")
        _barrier(ranks)
    assert files is not None
    return FeatureCache(folder, files)


def weights_id(module: nn.Module) -> str:
    """Equal for equal weights."""
    digest = xxhash.xxh3_128()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def _complete(folder: Path, identity: dict[str, Any]) -> int | None:
    try:
        found = parse_json((folder / _IDENTITY).read_text())
    except (OSError, ValueError):
        return None
    files: int = found.pop("files", 0)
    there = files > 0 and all(_file(folder, number, files).is_file() for number in range(files))
    return files if there and found == identity else None


def _file(folder: Path, number: int, files: int) -> Path:
    return folder / f"{number:05d}-of-{files:05d}.npy"


def _agreed(wanted: bool, ranks: Ranks) -> bool:
    """Whether any rank wants it."""
    return wanted if ranks.world_size == 1 else any(all_gather(wanted))


def _barrier(ranks: Ranks) -> None:
    if ranks.world_size > 1:
        dist.barrier()
