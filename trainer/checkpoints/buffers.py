"""Buffers of the model, such as BatchNorm's running statistics, which differ by rank.

Each rank saves its own. At the same world size each rank restores its own; at another, all ranks get the mean over the
ranks that saved them, or the maximum for integers (such as BatchNorm's count of batches) and booleans. Buffers that are
registered as not persistent are functions of the recipe, and not saved.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

_PREFIX = "buffer/"


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """A model's persistent buffers, by name."""
    transient = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name not in transient}


def buffers_to_write(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a rank saves, by key in its file."""
    return {f"{_PREFIX}{name}": buffer for name, buffer in persistent_buffers(model).items()}


def restore_buffers(model: nn.Module, files: Sequence[Path], rank: int, world_size: int) -> None:
    """Fills the model's buffers from a checkpoint.

    Args:
        files: all files of the checkpoint, by rank.
    """
    buffers = persistent_buffers(model)
    if not buffers:
        return
    saved = read_buffers(files[rank]) if len(files) == world_size else {}
    if not saved:  # in format 1 only the main rank saved buffers
        saved = mean_buffers(files)
    for name, buffer in buffers.items():
        buffer.copy_(saved[name])


def mean_buffers(files: Iterable[Path]) -> dict[str, Tensor]:
    """The buffers of a checkpoint by name: mean over ranks, maximum for integers and booleans."""
    first: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    for count, buffers in enumerate(filter(None, map(read_buffers, files)), 1):
        first = first or buffers
        for name, value in buffers.items():
            if not value.is_floating_point():
                means[name] = means.get(name, value).maximum(value)
            else:
                mean = means.get(name, value.double())
                means[name] = mean.where(mean == value, mean + (value - mean) / count)  # exact where all are equal
    return {name: means[name].to(value.dtype) for name, value in first.items()}


def read_buffers(file: Path) -> dict[str, Tensor]:
    """The buffers that a rank saved, by name."""
    with safe_open(file, "pt") as opened:
        names = [key for key in list(opened.keys()) if key.startswith(_PREFIX)]
        return {key.removeprefix(_PREFIX): opened.get_tensor(key) for key in names}
