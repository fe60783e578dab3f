"""`mixmae bench communication`: what summing gradients over ranks in bf16 or fp32 rounds off, against fp64.

Ranks are processes of this machine over gloo. Each has gradients of its own in bf16, a common part and noise of its
own, as micro-batches give; they are divided by the number of ranks and summed as DeepSpeed does. The error is that of
the sum's norm; NCCL adds in another order, and along a ring as often as gloo.
"""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixmae.trainer.benchmarks.ranks import run_ranks
from mixmae.trainer.benchmarks.results import RESULTS, metadata, write_measurements
from mixmae.trainer.engine.distributed import Ranks

_NOISE = 4.0
"""Standard deviation of a rank's own part over that of the common one."""
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae bench communication", description=__doc__)
    parser.add_argument("--ranks", default="2,4,8,16", help="world sizes (default %(default)s)")
    parser.add_argument("--elements", type=int, default=1_000_000, help="of the gradient (default %(default)s)")
    parser.add_argument("--json", action="store_true", help=f"write the figures to {RESULTS}")
    args = parser.parse_args(argv)
    importlib.import_module("deepspeed")  # once, and not in each process that is forked
    found = []
    for world_size in map(int, args.ranks.split(",")):
        found.append({"ranks": world_size, **measure(world_size, args.elements, start_method="fork"), **metadata()})
        print(describe(found[-1]), flush=True)
    if args.json:
        write_measurements(RESULTS / "communication.json", found)
    return 0


def measure(world_size: int, elements: int, **options: Any) -> dict[str, Any]:
    """Errors by dtype, relative to the norm of the exact sum; and the share of them that does not average out.

    Args:
        options: of `run_ranks`.
    """
    found: dict[str, Any] = run_ranks(_errors, world_size, elements, **options)[0]
    return found


def _errors(ranks: Ranks, elements: int) -> dict[str, Any]:
    own = _gradient(ranks.rank, elements)
    exact = own.double()
    dist.all_reduce(exact)
    exact /= ranks.world_size
    found = {}
    for name, dtype in _DTYPES.items():
        error = _reduced(own, dtype, ranks.world_size).double() - exact
        found[name] = {
            "error": float(error.norm() / exact.norm()),
            "shrinks": float(-(error * exact).sum() / exact.square().sum()),
        }
    rounded = exact.to(torch.bfloat16).double() - exact
    return {"elements": elements, "rounded_once": float(rounded.norm() / exact.norm()), **found}


def _gradient(rank: int, elements: int) -> Tensor:
    """A rank's gradient in bf16, as its backward pass leaves it."""
    common = torch.randn(elements, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(elements, generator=torch.Generator().manual_seed(1 + rank))
    return (common + _NOISE * noise).to(torch.bfloat16)


def _reduced(own: Tensor, dtype: torch.dtype, world_size: int) -> Tensor:
    """The mean over ranks, as stages 1 to 3 form it: in the dtype that travels, divided first."""
    sent = own.to(dtype, copy=True).div_(world_size)
    dist.all_reduce(sent)
    return sent


def describe(found: dict[str, Any]) -> str:
    parts = [f"{name} {found[name]['error']:.2e} (shrinks it by {found[name]['shrinks']:.1e})" for name in _DTYPES]
    return f"{found['ranks']} ranks: {', '.join(parts)}; rounded once to bf16 {found['rounded_once']:.2e}"
