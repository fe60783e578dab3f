"""What a step waits for: of the device, only for what an optimizer has to know."""

import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mixmae.models.methods.mixing import draw_mix
from mixmae.trainer.engine.deepspeed_engine import build_engine, deepspeed_config
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.engine.non_finite import refuse_non_finite
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.registry import build_model
from tests.helpers import run_ranks, tiny_recipe

UPDATE_READS = {0: 1, 1: 1, 2: 2, 3: 1}
"""Values that an optimizer reads at most in a step, by ZeRO stage: the norm by which a step is skipped."""
KINDS = [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


def recipe_for(stage: int, precision: str) -> Recipe:
    sizes = {"train.zero_stage": stage, "train.precision": precision, "train.global_batch": 4, "train.micro_batch": 4}
    return tiny_recipe(**sizes)


class HostReads(TorchDispatchMode):
    """Counts what a GPU would be waited for: values that the host reads, and shapes that depend on values."""

    _WAITING = re.compile(
        "aten::(_local_scalar_dense|nonzero|masked_select|is_nonzero|equal|_unique.*|repeat_interleave)"
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += self._WAITING.fullmatch(func._schema.name) is not None
        return func(*args, **(kwargs or {}))


class HostCopies(TorchFunctionMode):
    """Counts copies of whole tensors to the host, which on a CPU are no operations.

    Not those of integers: a mix's groups are counted on CPUs alone.
    """

    _WAITING = (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self._WAITING and args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


def waits(ranks: Ranks, stage: int, precision: str) -> tuple[int, int, int]:
    """How often DeepSpeed waits for the device, or copies from it, in some steps, and the host reads a value, in passes
    and in updates.

    On a GPU torch refuses any other waiting in passes.
    """
    from deepspeed.accelerator import get_accelerator

    engine = build_engine(build_model(recipe_for(stage, precision)), recipe_for(stage, precision), ranks)
    accelerator, counted = get_accelerator(), 0

    def synchronize(*given: Any) -> None:
        nonlocal counted
        counted += 1

    images = torch.randn(4, 3, 64, 64, device=ranks.device)
    mix = draw_mix(4, 2, engine.module.grid, torch.Generator().manual_seed(0)).to(ranks.device)
    on_gpu = ranks.device.type == "cuda"
    in_passes, in_updates, copies = HostReads(), HostReads(), HostCopies()
    for step in range(6):
        watched = step >= 3
        if step == 3:
            accelerator.synchronize = synchronize
        if on_gpu and watched:
            torch.cuda.set_sync_debug_mode("error")
        with in_passes if watched and not on_gpu else nullcontext(), copies if watched else nullcontext():
            engine.backward(refuse_non_finite(engine(images, *mix)))
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        with in_updates if watched and not on_gpu else nullcontext(), copies if watched else nullcontext():
            engine.step()
    return counted + copies.count, in_passes.count, in_updates.count


@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_passes_wait_for_nothing_and_updates_for_the_norm(stage: int, precision: str) -> None:
    """DeepSpeed's throughput timer, on by default, synchronises twice in each micro-step."""
    synchronised, in_passes, in_updates = run_ranks(waits, 1, stage, precision)[0]
    assert (synchronised, in_passes) == (0, 0)
    assert in_updates <= 3 * UPDATE_READS[stage]


@pytest.mark.gpu
@pytest.mark.parametrize(("stage", "precision"), KINDS[:3])
def test_neither_forward_nor_backward_waits_for_a_gpu(stage: int, precision: str) -> None:
    assert run_ranks(waits, 1, stage, precision)[0][0] == 0


def test_deepspeed_times_nothing() -> None:
    assert deepspeed_config(recipe_for(2, "bf16"), 1)["timers"] == {"throughput": {"enabled": False}}
