"""`mixmae bench window`: attention inside windows in this project's kernel, beside torch's, forward and backward pass.

Shapes are those of stages 1 and 2 with K = 2 groups: packed queries, keys and values go in, their packed gradients come
out, and the table's. Without a GPU, TRITON_INTERPRET=1 runs the kernel in Triton's interpreter: times mean nothing.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from mixmae.base.errors import UsageError
from mixmae.models.layers.token_order import Problems, by_window, relative_position_index, separated
from mixmae.models.layers.window_attention import WindowAttention
from mixmae.models.methods.mixing import draw_groups
from mixmae.models.ops.sdpa import pin_attention
from mixmae.trainer.benchmarks.results import RESULTS, metadata, write_result
from mixmae.trainer.recipe.arguments import at_least

_HEAD = 32
SHAPES = {
    "swin_huge stage 1": (56, 14, 11),
    "swin_huge stage 2": (28, 14, 22),
    "swin_base_w14 stage 1": (56, 14, 4),
    "swin_base stage 1": (56, 7, 4),
}
"""Side of the token grid, of the windows, heads."""
_SMALL = {"nano stage 1": (8, 4, 1), "nano stage 2": (16, 8, 1)}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae bench window", description=__doc__)
    parser.add_argument("--batch", type=at_least(1), default=64, help="images (default %(default)s)")
    parser.add_argument("--rounds", type=at_least(1), default=10, help="timed, after two that are not (default 10)")
    parser.add_argument("--json", action="store_true", help=f"write the measurements to {RESULTS}")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":  # which Triton reads when it is imported
        raise UsageError(
            "torch finds no GPU; TRITON_INTERPRET=1 mixmae bench window runs the kernel in Triton's interpreter"
        )
    pin_attention()
    shapes = SHAPES if device.type == "cuda" else _SMALL
    found = [measured(name, *shape, args.batch, args.rounds, device) for name, shape in shapes.items()]
    print(table(found))
    if args.json:
        name = torch.cuda.get_device_name(device).lower().replace(" ", "-") if device.type == "cuda" else "interpreter"
        content = {"device": name, "batch": args.batch, "shapes": found, **metadata()}
        write_result(RESULTS / f"window-{name}.json", content)
    return 0


def measured(
    name: str, side: int, window: int, heads: int, batch: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Milliseconds of the forward and of both passes, by kernel and by torch, and how far they are apart."""
    from mixmae.models.ops.window_attention import window_attention

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    attention = WindowAttention(heads * _HEAD, heads, window).to(device, dtype)
    grid = (side, side)
    groups = draw_groups(None, 2, (side // 4, side // 4), torch.Generator().manual_seed(0))
    arrangement = by_window(grid, window, relative_position_index(window).to(device))
    qkv = torch.randn(batch, side**2, 3 * heads * _HEAD, device=device).to(dtype).requires_grad_()
    result: dict[str, Any] = {"name": name, "grid": side, "window": window, "heads": heads}
    outputs = []
    for way in ("kernel", "torch"):
        attention.window_kernel = window_attention if way == "kernel" else None
        (problems,) = separated(arrangement, groups.to(device), grid, dtype, by_members=way == "kernel").problems
        outputs.append(_both(attention, qkv, problems))
        with torch.no_grad():
            result[f"{way}_forward_ms"] = _milliseconds(partial(attention.attend, qkv, problems), rounds)
        result[f"{way}_both_ms"] = _milliseconds(partial(_both, attention, qkv, problems), rounds)
    off = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(*outputs, strict=True)]
    return {**result, "off": dict(zip(("out", "grad_qkv", "grad_table"), off, strict=True))}


def _both(attention: WindowAttention, qkv: torch.Tensor, problems: Problems) -> tuple[torch.Tensor, ...]:
    out = attention.attend(qkv, problems)
    return (out, *torch.autograd.grad(out, (qkv, attention.relative_position_bias_table), torch.ones_like(out)))


def _milliseconds(call: Callable[[], object], rounds: int) -> float:
    """Of one call, of many that follow each other without waiting."""
    on_gpu = torch.cuda.is_available()
    for _ in range(2 if on_gpu else 0):
        call()
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(rounds):
        call()
    if on_gpu:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / rounds


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'shape':24}{'forward: kernel, torch (ms)':>30}{'both passes: kernel, torch (ms)':>34}{'largest error':>16}"
    ]
    for one in found:
        forward, both = ([one[f"{way}_{part}_ms"] for way in ("kernel", "torch")] for part in ("forward", "both"))
        lines.append(
            f"{one['name']:24}{forward[0]:>18.3f}, {forward[1]:>10.3f}{both[0]:>22.3f}, {both[1]:>10.3f}"
            f"{max(one['off'].values()):>16.2g}"
        )
    return "\n".join(lines)
