"""Activation checkpointing: recomputing in the backward pass what the forward pass need not keep.

`torch` and `fairscale` keep a block's input alone, and compute the block twice. `selective` keeps products of matrices
and attention, and computes again only what is cheap and large: norms, GELU, residual sums.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from timm.layers import DropPath
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mixmae.base.errors import UsageError
from mixmae.models.contract import Trainable
from mixmae.trainer.recipe.sections.train import ActivationCheckpointing

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
_FUSED = ("mixmae::grouped_attention", "mixmae::window_attention")


def checkpoint_activations(model: Trainable, settings: ActivationCheckpointing) -> None:
    """Applies the recipe's policy to the model's groups of blocks; parameters keep their names.

    Raises:
        UsageError: the recipe names a group that the model does not have.
    """
    if settings.kind == "none":
        return
    groups = model.block_groups()
    chosen = tuple(groups) if settings.stages is None else settings.stages
    if unknown := [name for name in chosen if name not in groups]:
        raise UsageError(
            f"train.activation_checkpointing.stages: {unknown[0]!r} is no group of blocks of this model; it has "
            f"{', '.join(groups)}"
        )
    if settings.kind == "torch":
        model.set_grad_checkpointing(chosen)
        return
    change = _keep_products if settings.kind == "selective" else _keep_inputs(settings.cpu_offload)
    for block in chain.from_iterable(groups[name] for name in chosen):
        change(block)


def _keep_inputs(cpu_offload: bool) -> Callable[[nn.Module], object]:
    from fairscale.nn import checkpoint_wrapper

    return partial(checkpoint_wrapper, offload_to_cpu=cpu_offload)  # changes a block in place


def _keep_products(block: nn.Module) -> None:
    forward, contexts = block.forward, partial(create_selective_checkpoint_contexts, _policy(block))

    def recomputing(*inputs: Any) -> Any:  # a function, which torch.compile follows; a partial it does not
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)

    block.forward = recomputing


def _policy(block: nn.Module) -> Callable[..., CheckpointPolicy]:
    """What of a block is kept. The MLP's last product need not be: recomputing stops at its input, unless a mask of
    drop path behind it must come again."""
    ends_with_product = not any(isinstance(module, DropPath) for module in block.modules())

    def choose(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in _PRODUCTS:
            rows, columns = args[-1].shape
            kept = not ends_with_product or columns >= rows
        else:
            kept = operator in _ATTENTION or operator.name() in _FUSED
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return choose
