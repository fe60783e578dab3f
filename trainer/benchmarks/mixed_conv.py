"""`mixmae bench mixed-conv`: mixed convolutions beside plain ones, and beside a partial convolution for each group.

Forward and backward pass of single layers of ResNet-50x3 and Twins-SVT-L on random maps of 224 px images, with K = 2
and 4. Variants take turns, and the least of each one's times counts: what else the machine does only adds to them. On a
CPU they are processor time of one thread, which other processes hardly change.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmae.models.layers.mixed_cells import Mix
from mixmae.models.layers.mixed_conv import MixedConv2d, StandardisedConv2d, mixed_max_pool2d
from mixmae.models.layers.mixed_norm import MixedGroupNormReLU
from mixmae.models.methods.mixing import draw_groups, upsample_groups
from mixmae.trainer.benchmarks.profiling import peak_allocated, profiled, synchronized_time
from mixmae.trainer.benchmarks.results import RESULTS, metadata, write_result
from mixmae.trainer.engine.malloc import keep_freed_memory
from mixmae.trainer.recipe.arguments import at_least

_CELLS = (7, 7)
_NUM_IMAGES = (2, 4)
_NORM_GROUPS = 32


class MaxPool(nn.Module):
    """That of a ResNet's stem."""

    def forward(self, x: Tensor, mix: Mix | None = None) -> Tensor:
        if mix is not None:
            return mixed_max_pool2d(x, 3, 2, mix)
        return F.max_pool2d(x.permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Layer:
    """A layer that sees other positions: what makes it, and the map [B, side, side, dim] that it takes."""

    make: Callable[[], nn.Module]
    side: int
    dim: int


LAYERS = {
    "ResNet-50x3 stem, 7x7, stride 2": Layer(partial(StandardisedConv2d, 3, 192, 7, 2), 224, 3),
    "ResNet-50x3 stem, max pooling": Layer(MaxPool, 112, 192),
    "ResNet-50x3 stage 1, 3x3": Layer(partial(StandardisedConv2d, 192, 192, 3), 56, 192),
    "ResNet-50x3 stage 1, GroupNorm and ReLU": Layer(partial(MixedGroupNormReLU, _NORM_GROUPS, 192), 56, 192),
    "ResNet-50x3 stage 2, 3x3, stride 2": Layer(partial(StandardisedConv2d, 384, 384, 3, 2), 56, 384),
    "ResNet-50x3 stage 2, 3x3": Layer(partial(StandardisedConv2d, 384, 384, 3), 28, 384),
    "ResNet-50x3 stage 3, 3x3": Layer(partial(StandardisedConv2d, 768, 768, 3), 14, 768),
    "ResNet-50x3 stage 4, 3x3": Layer(partial(StandardisedConv2d, 1536, 1536, 3), 7, 1536),
    "Twins-SVT-L stage 1, 3x3 depthwise": Layer(partial(MixedConv2d, 128, 128, 3, depthwise=True), 56, 128),
    "Twins-SVT-L stage 3, 3x3 depthwise": Layer(partial(MixedConv2d, 512, 512, 3, depthwise=True), 14, 512),
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae bench mixed-conv", description=__doc__)
    parser.add_argument("--batch", type=at_least(1), default=8, help="images (default %(default)s)")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="timed, after one that is not (default 5)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32", help="(default %(default)s)")
    parser.add_argument("--json", action="store_true", help=f"write the measurements to {RESULTS}")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else metadata()["cpu"]
    result: dict[str, Any] = {"device": name, "batch": args.batch, "precision": args.precision}
    result["clock"] = "processor time of one thread" if device.type == "cpu" else "synchronized"
    result["layers"] = []
    for title, layer in LAYERS.items():
        print(f"{title} ...", flush=True)
        result["layers"].append(measure(title, layer, args.batch, args.precision, args.rounds, device))
    print(table(result))
    if args.json:
        chip = name.split("(")[0].strip().lower().replace(" ", "-")
        write_result(RESULTS / f"mixed-conv-{chip}-{args.precision}.json", result)
    return 0


def measure(name: str, layer: Layer, batch: int, precision: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds and peak bytes of each variant of a layer; bytes without those of weights and input."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    module = layer.make().to(device, dtype)
    x = torch.randn(batch, layer.side, layer.side, layer.dim, device=device, dtype=dtype, requires_grad=True)
    leaves = [x, *module.parameters()]
    works = {variant: partial(_pass, forward, leaves) for variant, forward in _variants(module, device).items()}
    now = time.process_time if device.type == "cpu" else partial(synchronized_time, device)
    times = dict.fromkeys(works, inf)
    names = list(works)
    for turn in range(rounds + 1):
        first = turn % len(names)
        for variant in [*names[first:], *names[:first]]:  # rotated, so that none always follows the same one
            started = now()
            works[variant]()
            if turn:
                times[variant] = min(times[variant], now() - started)
    return {
        "layer": name,
        **{
            variant: {"ms": round(1000 * times[variant], 3), "bytes": _peak(work, device)}
            for variant, work in works.items()
        },
    }


def _variants(module: nn.Module, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """`plain`, `mixed K`, and `partial K`, where the layer is a convolution."""
    variants: dict[str, Callable[[Tensor], Tensor]] = {"plain": module}
    for k in _NUM_IMAGES:
        groups = draw_groups(None, k, _CELLS, torch.Generator().manual_seed(0)).to(device)
        mix = Mix.of(groups)  # made once for a stage
        variants[f"mixed {k}"] = partial(module, mix=mix)
        if isinstance(module, MixedConv2d):
            variants[f"partial {k}"] = partial(partial_convolutions, module, groups=groups, num_groups=k)
    return variants


def partial_convolutions(conv: MixedConv2d, x: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """A mixed convolution by definition: a partial convolution (Liu et al. 2018) of the whole map for each group."""
    members = upsample_groups(groups, (x.shape[1], x.shape[2]))[None, None]
    kernel, stride = conv.kernel(), conv.stride[0]
    ones = torch.ones(1, 1, *conv.kernel_size, device=x.device, dtype=x.dtype)
    x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    out = torch.zeros((), device=x.device, dtype=x.dtype)
    for group in range(num_groups):
        present = (members == group).to(x.dtype)
        count = F.conv2d(present, ones, stride=stride, padding=conv.padding)
        own = present[:, :, ::stride, ::stride] * (ones.numel() / count.clamp(min=1))
        out = out + F.conv2d(x * present, kernel, None, stride, conv.padding, groups=conv.groups) * own
    out = out.permute(0, 2, 3, 1)
    return out if conv.bias is None else out + conv.bias


def _pass(forward: Callable[[Tensor], Tensor], leaves: Sequence[Tensor]) -> None:
    """Forward and backward pass of the first leaf, a map; gradients of all are dropped."""
    out = forward(leaves[0])
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def _peak(work: Callable[[], object], device: torch.device) -> int:
    if device.type == "cpu":
        return peak_allocated(profiled(work, device))
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def table(result: dict[str, Any]) -> str:
    """Times and peaks over those of the plain layer, a Markdown table."""
    columns = [f"{kind} {k}" for kind in ("mixed", "partial") for k in _NUM_IMAGES]
    heads = ["layer", "plain ms", *(f"{c}: time" for c in columns), "plain MB", *(f"{c}: memory" for c in columns)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in result["layers"]:
        cells = [row["layer"]]
        for key, unit in (("ms", 1.0), ("bytes", 1e6)):
            plain = row["plain"][key]
            cells.append(f"{plain / unit:.1f}")
            cells += [f"{row[column][key] / plain:.2f}" if column in row else "" for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
