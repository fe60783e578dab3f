"""What a recipe leaves to the hardware that it runs on: `auto` of its `train:` section. No torch."""

from typing import Literal

from mixmae.trainer.recipe.schema import Recipe

Device = Literal["cuda", "cpu"]
_OF_ONE_SHAPE = ("pretrain", "finetune", "linear")
"""Tasks whose images are all of one size: each other one would be compiled anew."""


def fit_hardware(recipe: Recipe, device: Device, ranks: int, with_triton: bool = True) -> Recipe:
    """The recipe with each `auto` chosen; what it says itself stays.

    On GPUs: blocks are compiled, but not where torch.compile gains nothing (ZeRO 3, whose hooks break every graph;
    images of several sizes) or computes something else (fairscale); attention is fused in bf16 (in fp32 the kernels'
    registers spill kilobytes); ZeRO 2 and overlap where there is something to send.
    On CPUs, where none of them gains: ZeRO 1 alone.

    Args:
        with_triton: whether kernels can be compiled there.
    """
    train = recipe.train
    on_gpus, several = device == "cuda", ranks > 1
    stage = train.zero_stage if train.zero_stage != "auto" else 2 if on_gpus and several else 1
    static = recipe.task in _OF_ONE_SHAPE and train.activation_checkpointing.kind != "fairscale"
    compiles = on_gpus and with_triton and static and stage != 3
    fuses = on_gpus and with_triton and train.precision == "bf16"
    chosen = {
        "zero_stage": stage,
        "compile": compiles if train.compile == "auto" else train.compile,
        "fused_attention": fuses if train.fused_attention == "auto" else train.fused_attention,
        "overlap_comm": on_gpus and several and stage >= 2 if train.overlap_comm == "auto" else train.overlap_comm,
    }
    return recipe.model_copy(update={"train": train.model_copy(update=chosen)})
