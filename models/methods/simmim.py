"""SimMIM: an encoder sees a mask token in place of masked patches, and one linear layer predicts their pixels
(Xie et al. 2021).

Shapes: a mask is bool [B, Mh, Mw], one entry for each square of `mask_patch_size` pixels.
"""

from collections.abc import Collection, Sequence
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from mixmae.models.encoders.contract import Encoder
from mixmae.models.layers.blocks import init_weights
from mixmae.models.methods.contract import Column, Method
from mixmae.models.methods.masking import blank, check_ratio, draw_order, first_of, replace_tokens
from mixmae.models.methods.mixing import upsample_groups
from mixmae.models.methods.registry import register_method


class MaskedPixelLoss(nn.Module):
    """Mean absolute error of masked pixels, an fp32 scalar; targets are the images as they are, not per patch."""

    def forward(self, predictions: Tensor, images: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
        """Predictions and images [B, 3, H, W].

        Args:
            valid: bool [B, H, W], pixels that count; None: all do, and where all are True the numbers are the same.
        """
        masked = upsample_groups(mask, (images.shape[2], images.shape[3]))[:, None].float()
        count = masked.sum()
        if valid is not None:
            masked = masked * valid[:, None]
            count = masked.sum().clamp(min=1)  # none at all make a loss of 0
        return ((predictions.float() - images).abs() * masked).sum() / (count * images.shape[1])


@register_method("simmim")
class SimMIM(Method):
    """`SimMIM(images, mask) -> loss`.

    The mask token takes the place of the first stage's tokens, before positions are added. An encoder whose first
    convolutions overlap, such as a ResNet, sees masked pixels as zeros, so that none shows beside a masked square.

    Args:
        mask_ratio: share of masked squares, rounded up.
        mask_patch_size: pixels along a masked square's side.

    Raises:
        ValueError: squares do not divide the image or the encoder's first map, a ratio that masks none or all, or an
            encoder that takes no mask token.
    """

    def __init__(self, encoder: Encoder, mask_ratio: float = 0.6, mask_patch_size: int = 32) -> None:
        super().__init__(encoder)
        if not encoder.edit_dims:
            raise ValueError(
                f"simmim puts mask tokens into an encoder's first map, and {type(encoder).__name__} takes none"
            )
        height, width = (side * encoder.stride for side in encoder.grid)
        token = encoder.feature_info[0]["reduction"]
        if height % mask_patch_size or width % mask_patch_size or mask_patch_size % token:
            raise ValueError(
                f"mask_patch_size {mask_patch_size}: expected a multiple of the encoder's {token} px tokens that "
                f"divides images of {height}x{width} px"
            )
        self.mask_grid = (height // mask_patch_size, width // mask_patch_size)
        self.num_masked = ceil(mask_ratio * self.mask_grid[0] * self.mask_grid[1])
        check_ratio(mask_ratio, self.num_masked, self.mask_grid[0] * self.mask_grid[1])
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.edit_dims[0]))
        trunc_normal_(self.mask_token, std=0.02)
        self.decoder = nn.Linear(encoder.num_features, encoder.in_chans * encoder.stride**2)
        self.decoder.apply(init_weights)
        self.loss = MaskedPixelLoss()

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor]:
        order = draw_order(batch, self.mask_grid[0] * self.mask_grid[1], generator)
        return (first_of(order, self.num_masked).view(batch, *self.mask_grid),)

    def mask_invalid_pixels(self) -> None:
        self.masks_invalid = True

    def forward(  # type: ignore[override]
        self, images: Tensor, mask: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """The loss, an fp32 scalar, for normalised fp32 images [B, 3, H, W]."""
        loss: Tensor = self.loss(self._predict(images, mask), images, mask, valid)
        return loss

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predicted images, fp32 [B, 3, H, W]."""
        return self._predict(images, mask).float()

    def reconstruct(  # type: ignore[override]
        self, images: Tensor, mask: Tensor, valid: Tensor | None = None, rows: int = 4
    ) -> list[Column]:
        """The masked input, the image, and the image with masked squares as predicted."""
        images, mask = images[:rows], mask[:rows]
        masked = upsample_groups(mask, (images.shape[2], images.shape[3]))[:, None]
        painted = torch.where(masked, self.predict(images, mask), images)
        return [Column("masked input", blank(images, mask)), Column("image", images), Column("reconstructed", painted)]

    def compiled_parts(self) -> Sequence[nn.Module]:
        return [self.loss]

    def no_weight_decay(self) -> Collection[str]:
        return {*super().no_weight_decay(), "mask_token"}

    def _predict(self, images: Tensor, mask: Tensor) -> Tensor:
        def put_mask_tokens(stage: int, x: Tensor) -> Tensor:
            return replace_tokens(x, mask, self.mask_token) if stage == 1 else x

        visible = blank(images, mask).to(self.mask_token.dtype)
        cells = self.decoder(self.encoder(visible, edit=put_mask_tokens))
        return F.pixel_shuffle(cells.permute(0, 3, 1, 2), self.encoder.stride)
