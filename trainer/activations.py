"""Activation checkpointing: recomputing blocks in the backward pass, by torch or by fairscale."""

from models import MixMAE
from models.swin import Swin
from trainer.config import ActivationCheckpointing


def checkpoint_activations(model: MixMAE, settings: ActivationCheckpointing) -> None:
    """Applies the recipe's policy to the encoder's stages and the decoder; parameters keep their names."""
    if settings.kind == "none":
        return
    encoder = model.encoder
    assert isinstance(encoder, Swin)
    if settings.kind == "torch":
        encoder.set_grad_checkpointing(stages=[stage for stage in settings.stages if stage != "decoder"])
        model.decoder.set_grad_checkpointing("decoder" in settings.stages)
        return
    from fairscale.nn import checkpoint_wrapper

    chosen = [model.decoder if stage == "decoder" else encoder.stages[stage - 1] for stage in settings.stages]
    for part in chosen:
        for block in part.blocks:
            checkpoint_wrapper(block, offload_to_cpu=settings.cpu_offload)  # changes the block in place
