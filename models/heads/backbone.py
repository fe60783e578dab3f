"""An encoder as the backbone of a detector or segmenter: the maps of its four stages, each behind a norm of its own.

Maps are [B, C, H, W] of stride 4, 8, 16 and 32, which lie in memory channels last, as the encoder computes them.
"""

from typing import Any

from torch import Tensor, nn

from mixmae.models.contract import TrainableEncoder
from mixmae.models.encoders.contract import Encoder

_STRIDES = (4, 8, 16, 32)


class Backbone(nn.Module):
    """`backbone(images) -> [map, map, map, map]`, in the encoder's dtype.

    The encoder's final norm, which belongs to pretraining and classification, is left out: it sees one stage alone.

    Args:
        encoder: without a head, of the images' size; a checkpoint holds its weights under `encoder.`.
        out_norm: whether each map goes through a new LayerNorm over its channels, as detectron2 has it for Swin.

    Raises:
        ValueError: the encoder's stages are not of stride 4, 8, 16 and 32.
    """

    def __init__(self, encoder: Encoder, out_norm: bool = True) -> None:
        super().__init__()
        strides = tuple(facts["reduction"] for facts in encoder.feature_info)
        if strides != _STRIDES:
            raise ValueError(
                f"{type(encoder).__name__} has maps of stride {', '.join(map(str, strides))}; expected a hierarchical "
                "encoder (4, 8, 16, 32), such as mixmae_swin_base_w14"
            )
        self.channels: list[int] = [facts["num_chs"] for facts in encoder.feature_info]
        self.strides = list(strides)
        self.encoder = encoder
        self.encoder.norm = nn.Identity()
        self.norms = nn.ModuleList(nn.LayerNorm(width) if out_norm else nn.Identity() for width in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Of normalised images [B, 3, H, W]."""
        model: Any = self.encoder  # by timm's contract
        images = images.to(next(self.encoder.parameters()).dtype)
        maps = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
        return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, maps, strict=True)]


class TrainableBackbone(TrainableEncoder):
    """A module on a backbone.

    Args:
        backbone: a checkpoint holds its weights under `backbone.`.
    """

    encoder_path = "backbone.encoder"

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def encoder(self) -> Encoder:
        return self.backbone.encoder
