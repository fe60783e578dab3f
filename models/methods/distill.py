"""MixMAE with a teacher: beside pixels, the encoder learns a frozen model's features of each image.

The teacher sees each image whole and unmixed, the student mixed ones. Features of a mixed input's cell, which belong to
one image, predict the teacher's features of that image there: what is behind the whole image is to be told from the
cells that are left of it. Masked distillation of this kind: arXiv 2208.10442, 2303.16058 (targets of visible patches).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch.nn.functional as F
from torch import Tensor, nn

from mixmae.models.encoders.contract import Encoder
from mixmae.models.layers.blocks import init_weights
from mixmae.models.methods.mixing import mix_images
from mixmae.models.methods.mixmae import MixMAE
from mixmae.models.methods.registry import register_method
from mixmae.models.methods.teacher import Teacher, open_teacher


@register_method("mixmae_distill")
class MixMAEDistill(MixMAE):
    """`MixMAEDistill(images, groups, partners) -> loss`: MixMAE's, and the squared error of the teacher's features.

    Args:
        teacher: timm's name of the model, also `local-dir:DIRECTORY` or `hf-hub:REPOSITORY`.
        teacher_weights: file of its weights; None for those that timm has for the name.
        teacher_img_size: pixels for which the teacher is made; None for its own. Images are resized to them.
        teacher_weight: of its loss beside that of pixels, which is 1; both are about 1 before training.
        num_images, group_map, norm_pix_loss, decoder_dim, decoder_depth, decoder_num_heads: as of MixMAE.

    Raises:
        ValueError: as of MixMAE, a teacher that cannot be opened, or a weight that is not above 0.
    """

    def __init__(
        self,
        encoder: Encoder,
        teacher: str,
        teacher_weights: str | None = None,
        teacher_img_size: int | None = None,
        teacher_weight: float = 1.0,
        num_images: int = 4,
        group_map: Literal["micro_batch", "sample"] = "micro_batch",
        norm_pix_loss: bool = True,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_num_heads: int | None = None,
    ) -> None:
        if encoder.in_chans != 3:
            raise ValueError(
                f"the teacher sees RGB images, and the encoder's have {encoder.in_chans} channels; set "
                "data.channels=3, or take method.name=mixmae"
            )
        super().__init__(
            encoder,
            num_images,
            group_map,
            norm_pix_loss=norm_pix_loss,
            decoder_dim=decoder_dim,
            decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
        )
        if teacher_weight <= 0:
            raise ValueError(f"teacher_weight is {teacher_weight}; expected a number above 0")
        self.teacher_weight = teacher_weight
        self.teacher = Teacher(open_teacher(teacher, teacher_weights, teacher_img_size), encoder.grid)
        self.teacher_head = nn.Linear(encoder.num_features, self.teacher.dim).apply(init_weights)

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.teacher.set_normalisation(mean, std)

    def forward(  # type: ignore[override]
        self, images: Tensor, groups: Tensor, partners: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """The loss, an fp32 scalar, for normalised fp32 images [B, 3, H, W]."""
        features, visible = self._encode(images, groups, partners), self._visible(groups)
        pixels: Tensor = self.loss(self.decoder(features.flatten(1, 2), visible), images, partners, visible, valid)
        if not self.teacher_weight:
            return pixels
        # A cell of one value: what mixes images by their cells mixes features.
        targets = mix_images(self.teacher(images), groups, partners).permute(0, 2, 3, 1)
        error = F.mse_loss(self.teacher_head(features).float(), targets, reduction="none").mean(-1)
        if valid is None:
            return pixels + self.teacher_weight * error.mean()
        counted = mix_images(F.adaptive_avg_pool2d(valid[:, None].float(), self.grid), groups, partners)[:, 0]
        return pixels + self.teacher_weight * (error * counted).sum() / counted.sum().clamp(min=1)

    def frozen_models(self) -> Sequence[nn.Module]:
        return [self.teacher.model]

    def as_counted(self) -> Self:
        """Without the teacher, which has no backward pass."""
        self.teacher_weight = 0.0
        return super().as_counted()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The teacher goes where the method goes, and has its dtype."""
        self.teacher.model._apply(fn)
        module: Any = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return module
