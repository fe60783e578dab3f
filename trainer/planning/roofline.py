"""Time of a training step by a roofline: each operation takes its FLOPs or its bytes, whichever is longer.

A model, not a measurement. The recipe's model runs forward and backward on the meta device; each operation's time
follows from its shapes and a GPU's rates. What it does not know: clocks that fall under load, kernels that wait for
each other, and a host that is late, for which a measured gap stands.
"""

import math
import re
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mixmae.models.contract import Trainable
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.planning.activation_memory import on_meta
from mixmae.trainer.planning.devices import Gpu
from mixmae.trainer.planning.meta_attention import attention_of
from mixmae.trainer.planning.rates import Rates, rates
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.flops import model_flops
from mixmae.trainer.tasks.registry import task_of

ERROR = 0.15
"""The largest deviation from the steps that were measured (`tests/trainer/planning/test_roofline.py`)."""
_HOST_GAP = 0.8e-3
"""Seconds for each compiled part in which a GPU waits for its host: 18 to 39 ms a step of 33 parts, measured."""
_OPTIMIZER_BYTES = 44
"""Of a parameter's update: gradient to fp32, AdamW's reads and writes, the weight back to bf16."""
_FUSED, _FUSED_LOSS = 0.8, 0.5
"""Bytes of elementwise operations that are left where blocks, and the loss, are compiled. Assumed."""
_TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.92, (64, 256): 0.88, (128, 64): 0.8}
"""Tiles of a product, with the share of the best rate that a kernel of this tile reaches."""
_SPLIT_FROM, _SPLIT_WAVES = 4096, 0.85
"""Where the inner dimension is this long, few tiles are split along it, and fill the GPU so far."""
_LAUNCH = 2e-6
"""Seconds between two kernels."""
_UNEVEN = 2.4
"""How much longer than a copy, of eager kernels whose operands differ in shape or do not lie in one piece. Fitted."""
_BATCHED = 0.066
"""Share of the best rate of products of a whole attention matrix for each problem and head. Fitted."""
_PASSES = {"native_layer_norm_backward": 1.8, "sum": 1.4, "native_layer_norm": 1.1}
"""By operator: how much longer than a copy of the same bytes."""
_VIEWS = re.compile(
    "view|_unsafe_view|t|transpose|permute|expand|slice|select|unsqueeze|squeeze|split|split_with_sizes|unbind|alias|"
    "detach|as_strided|narrow|diagonal|unfold|flatten|_reshape_alias|lift_fresh|(new_)?empty(_like|_strided)?"
)
"""Operators that move nothing."""


@dataclass(frozen=True)
class StepModel:
    """Seconds of a step on one GPU, without communication.

    Attributes:
        kernels: of the forward and the backward pass.
        optimizer: of this rank's share.
        host: in which the GPU waits for its host.
        mfu: the model's FLOP/s over the data sheet's peak.
    """

    kernels: float
    optimizer: float
    host: float
    mfu: float

    @property
    def seconds(self) -> float:
        return self.kernels + self.optimizer + self.host


def step_model(
    recipe: Recipe, gpu: Gpu, micro_batch: int, ranks: int = 1, released: bool = False, windows: bool = False
) -> StepModel:
    """A step of the recipe on one of `ranks` GPUs.

    Args:
        released: as published code computes it, fp32 weights under autocast, in place of this project's fastest.
        windows: with the window kernel, whose rate is assumed to be that of the other one: plans leave it out until it
            was measured.
    """
    from mixmae.trainer.benchmarks.plain import make_plain

    reached = rates(gpu)
    precision = recipe.train.model_copy(update={"precision": "fp32" if released else "bf16"})
    model = on_meta(recipe.model_copy(update={"train": precision}))
    if released:
        make_plain(model)
    else:
        model.set_fused_attention(windows=windows)
    recorder = _Recorder(reached)
    if not released:
        recorder.fuse(model)
    _run(recipe, model, micro_batch, recorder, released)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer = parameters * _OPTIMIZER_BYTES / ranks / reached.memory
    parts = [*chain.from_iterable(model.block_groups().values()), *model.compiled_parts()]
    host = 0.0 if released else _HOST_GAP * len(parts)
    seconds = recorder.seconds + optimizer + host
    mfu = micro_batch * model_flops(recipe) / seconds / gpu.bf16
    return StepModel(recorder.seconds, optimizer, host, mfu)


def _run(recipe: Recipe, model: Trainable, micro_batch: int, recorder: "_Recorder", autocast: bool) -> None:
    task, meta = task_of(recipe), torch.device("meta")
    model.to(meta)
    inputs = [tensor.to(meta) for tensor in task.example_inputs(model, micro_batch)]
    pixels = torch.empty(micro_batch, *recipe.image_shape, dtype=getattr(torch, recipe.data.dtype), device=meta)
    to_device = ToDevice.of(meta, recipe.data)
    with attention_of("cuda"), recorder:
        images = to_device(pixels)
        if autocast:
            with _AutocastOnMeta():
                loss = model(images, *inputs)
        else:
            loss = model(images, *inputs)
        loss.backward()


class _AutocastOnMeta(TorchFunctionMode):
    """torch.autocast's rules for bf16, which torch does not apply on the meta device."""

    _NARROW = frozenset({F.linear, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm})
    _WIDE = frozenset({F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.mse_loss})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to = torch.bfloat16 if func in self._NARROW else torch.float32 if func in self._WIDE else None
        if to is not None:
            args = [arg.to(to) if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
            kwargs = {
                name: arg.to(to) if isinstance(arg, Tensor) and arg.is_floating_point() else arg
                for name, arg in kwargs.items()
            }
        return func(*args, **kwargs)


class _Recorder(TorchDispatchMode):
    """Adds up the time of all operations."""

    def __init__(self, reached: Rates) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rates = reached
        self.seconds = 0.0
        self._left = 1.0
        """Of the bytes of elementwise operations, where they are compiled."""

    def fuse(self, model: Trainable) -> None:
        """Counts what is compiled as fused."""
        for block in chain.from_iterable(model.block_groups().values()):
            self._watch(block, _FUSED)
        for part in model.compiled_parts():
            self._watch(part, _FUSED_LOSS)

    def _watch(self, module: nn.Module, left: float) -> None:
        def enter(*_: Any) -> None:
            self._left = left

        def leave(*_: Any) -> None:
            self._left = 1.0

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        module.register_full_backward_pre_hook(enter)
        module.register_full_backward_hook(leave)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if outputs and not _VIEWS.fullmatch(name):
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            moved = sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
            self.seconds += self._seconds(name, func, args, kwargs, result, moved)
        return result

    def _seconds(self, name: str, func: Any, args: Any, kwargs: Any, result: Any, moved: float) -> float:
        memory = self.rates.memory
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            return product_seconds(left.shape[0], right.shape[1], left.shape[1], moved, self.rates) + _LAUNCH
        if "attention" in name:
            flops, rate, more = self._attention(name, args)
            return max(flops / rate, (moved + more) / memory) + 2 * _LAUNCH
        if name in ("bmm", "convolution", "convolution_backward"):
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
            rate = self.rates.product * (_BATCHED if name == "bmm" else 0.1)
            return max(flops / rate, moved / memory) + 2 * _LAUNCH
        uneven = _UNEVEN if self._left == 1.0 and _is_uneven((args, kwargs, result)) else 1.0
        return moved * self._left * uneven * _PASSES.get(name, 1.08) / memory + _LAUNCH

    def _attention(self, name: str, args: Any) -> tuple[float, float, float]:
        """FLOPs with tiles filled up, their rate, and bytes beside the operands."""
        backward = "backward" in name
        times = 2.5 if backward else 1.0
        if name.startswith("grouped_attention"):
            qkv, bias = args[1:3] if backward else args[:2]
            num, heads, size, _ = bias.shape
            block = max(16, 1 << (size - 1).bit_length())
            width = qkv.shape[2] // 3 // heads
            return 4 * len(qkv) * num * heads * block * block * width * times, self.rates.grouped, 0.0
        if name.startswith("window_attention"):
            qkv, table = args[1:3] if backward else args[:2]
            return _window_products(qkv, table, backward), self.rates.grouped, 0.0
        query = args[1] if backward else args[0]
        key = args[2] if backward else args[1]
        problems, heads, length, width = query.shape
        rows, columns = _filled(length), _filled(key.shape[2])
        flops = 4 * problems * heads * rows * columns * width * times
        if "efficient" not in name:
            return flops, self.rates.flash * (0.7 if backward else 1.0), 0.0
        more = 0.0
        if backward and args[4] is not None:  # the bias' gradient is written for each problem, queries' kept in fp32
            more = problems * heads * (2.0 * length * math.ceil(length / 16) * 16 + 4.0 * rows * width)
        return flops, self.rates.efficient * (0.9 if backward else 1.0), more


def _window_products(qkv: Tensor, table: Tensor, backward: bool) -> float:
    """FLOPs of the window kernels, with tiles filled up."""
    from mixmae.models.ops.attention_kernels import tiling

    rows, heads = table.shape
    size = ((math.isqrt(rows) + 1) // 2) ** 2
    tile, step, _ = tiling(size)
    side, other = math.ceil(size / tile) * tile, math.ceil(size / step) * step
    # Tiled, the backward pass makes the matrices anew for queries, for keys and, in square tiles, for the bias.
    area = 2 * side * other if not backward else 5 * side * other if size <= tile else (7 * other + 2 * side) * side
    return 2.0 * area * qkv.shape[0] * (qkv.shape[1] // size) * heads * (qkv.shape[2] // 3 // heads)


def product_seconds(rows: int, columns: int, inner: int, moved: float, reached: Rates) -> float:
    """Of a matrix product, by the best of some tiles: tiles stick out at the edges, and the last wave is not full."""
    best = max(_use(rows, columns, inner, tile, reached) * share for tile, share in _TILES.items())
    return max(2.0 * rows * columns * inner / (reached.product * best), moved / reached.memory)


def _use(rows: int, columns: int, inner: int, tile: tuple[int, int], reached: Rates) -> float:
    """The share of multiprocessors' time that goes into results."""
    down, across = math.ceil(rows / tile[0]), math.ceil(columns / tile[1])
    inside = rows * columns / (down * tile[0] * across * tile[1])
    if reached.processors is None:
        return inside
    waves = down * across / reached.processors
    full = waves / math.ceil(waves)
    return inside * (max(full, _SPLIT_WAVES) if inner >= _SPLIT_FROM and waves < 2 else full)


def _is_uneven(operands: Any) -> bool:
    tensors = [leaf for leaf in tree_leaves(operands) if isinstance(leaf, Tensor)]
    shapes = {tensor.shape for tensor in tensors if tensor.dim() > 1}
    return len(shapes) > 1 or not all(tensor.is_contiguous() for tensor in tensors)


def _filled(length: int) -> int:
    return math.ceil(length / 64) * 64


def _bytes(tensor: Tensor) -> float:
    """Of the elements that are there: an expanded dimension is read once."""
    return (
        math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        * tensor.element_size()
    )
