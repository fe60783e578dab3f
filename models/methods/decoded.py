"""What methods share that predict patches by a small Transformer behind the encoder: MixMAE, MAE."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from mixmae.models.encoders.contract import Encoder
from mixmae.models.methods.contract import Method
from mixmae.models.methods.decoder import Decoder, fit_decoder
from mixmae.models.methods.reconstruction_loss import ReconstructionLoss


class DecodedMethod(Method):
    """A method with a `decoder`, which stays behind when the encoder is exported, and the loss of its patches."""

    decoder: Decoder
    loss: ReconstructionLoss

    def mask_invalid_pixels(self) -> None:
        self.masks_invalid = True

    @classmethod
    def fitted(cls, settings: Mapping[str, Any], encoder: Encoder) -> dict[str, Any]:
        return fit_decoder(settings, encoder)

    def block_groups(self) -> Mapping[str, Sequence[nn.Module]]:
        return {**super().block_groups(), "decoder": list(self.decoder.blocks)}

    def compiled_parts(self) -> Sequence[nn.Module]:
        return [self.loss]

    def set_grad_checkpointing(self, groups: Collection[str]) -> None:
        super().set_grad_checkpointing(groups)
        self.decoder.set_grad_checkpointing("decoder" in groups)

    def no_weight_decay(self) -> Collection[str]:
        return {*super().no_weight_decay(), "decoder.mask_token"}
