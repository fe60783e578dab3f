"""Activation checkpointing: recomputing blocks in the backward pass, by torch or by fairscale."""

from models import MixMAE
from trainer.config import ActivationCheckpointing


def checkpoint_activations(model: MixMAE, settings: ActivationCheckpointing) -> None:
    """Applies the recipe's policy to the encoder's stages and the decoder; parameters keep their names."""
    if settings.kind == "none":
        return
    stages = [stage for stage in settings.stages if stage != "decoder"]
    if settings.kind == "torch":
        model.encoder.set_grad_checkpointing(stages=stages)
        model.decoder.set_grad_checkpointing("decoder" in settings.stages)
        return
    from fairscale.nn import checkpoint_wrapper

    blocks = [block for stage in stages for block in model.encoder.stage_blocks(stage)]
    if "decoder" in settings.stages:
        blocks += model.decoder.blocks
    for block in blocks:
        checkpoint_wrapper(block, offload_to_cpu=settings.cpu_offload)  # changes the block in place
