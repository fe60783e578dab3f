"""The fp32 weights of a checkpoint, put together from all ranks' shards without any rank running."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import UsageError


def master_weights(checkpoint: Path) -> dict[str, Tensor]:
    """fp32 weights by parameter name, at any ZeRO stage.

    Raises:
        UsageError: the checkpoint has neither model states nor shards in it.
    """
    shards = sorted(checkpoint.glob("*zero_pp_rank_*_optim_states.pt"))
    if shards and "zero_stage" not in _load(shards[0])["optimizer_state_dict"]:
        return _bf16_stage_1(checkpoint)
    if shards:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        gathered: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name
        )
        return gathered
    module: dict[str, Tensor] = _load(checkpoint / "mp_rank_00_model_states.pt")["module"]
    return module


def _bf16_stage_1(checkpoint: Path) -> dict[str, Tensor]:
    """DeepSpeed's optimizer for bf16 at stage 1 writes shards that its own consolidation does not read.

    Each rank holds one flat slice per parameter group, and says which stretch of it belongs to which parameter; ranks
    in order give a parameter's stretches in order.
    """
    shapes = {
        name: shape
        for group in _load(checkpoint / "mp_rank_00_model_states.pt")["param_shapes"]
        for name, shape in group.items()
    }
    stretches: dict[str, list[Tensor]] = defaultdict(list)
    ranks = len(list(checkpoint.glob("bf16_zero_pp_rank_*_optim_states.pt")))
    for rank in range(ranks):
        shard = _load(checkpoint / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
        for flat, places in zip(shard["single_partition_of_fp32_groups"], shard["param_slice_mappings"], strict=True):
            for name, place in places.items():
                stretches[name].append(flat[place.start : place.start + place.numel])
    return {name: torch.cat(stretches[name]).view(shape) for name, shape in shapes.items()}


def _load(file: Path) -> Any:
    if not file.is_file():
        raise UsageError(f"{file} is missing; the checkpoint is not complete")
    # Not weights_only: DeepSpeed keeps objects of its own in these files, which this project's run wrote.
    return torch.load(file, map_location="cpu", weights_only=False, mmap=True)
