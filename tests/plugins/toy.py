"""A user's own encoder and method, outside the package: a linear patch embedding that learns mean colours."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mixmae.models.encoders.contract import Encoder, MapEdit, edit_of
from mixmae.models.encoders.registry import register_encoder
from mixmae.models.methods.contract import Column, Method
from mixmae.models.methods.reconstruction_loss import patchify, unpatchify
from mixmae.models.methods.registry import register_method


class ToyEncoder(Encoder):
    """One stage: 32 px patches through a linear layer and a block of an MLP. Groups never meet, so it needs no mask."""

    num_stages = 1
    first_conv = "embed"

    def __init__(
        self,
        img_size: int = 64,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 16,
    ) -> None:
        super().__init__()
        self.num_classes, self.global_pool = num_classes, global_pool
        self.num_features = self.head_hidden_size = embed_dim
        self.feature_info = [{"num_chs": embed_dim, "reduction": 32, "module": "block"}]
        self.grid, self.edit_dims = (img_size // 32, img_size // 32), (embed_dim,)
        self.embed = nn.Conv2d(in_chans, embed_dim, 32, 32)
        self.block = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.GELU(), nn.Linear(embed_dim, embed_dim))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

    def forward(
        self,
        images: Tensor,
        groups: Tensor | None = None,
        num_groups: int | None = None,
        edit: MapEdit | None = None,
    ) -> Tensor:
        x = self.norm(self.block(edit_of(edit, 1)(self.embed(images).permute(0, 2, 3, 1))))
        return self.head(x.mean((1, 2)) if self.global_pool else x)

    def stage_blocks(self, stage: int) -> Sequence[nn.Module]:
        return [self.block]

    def set_grad_checkpointing(self, enable: bool = True, stages: Sequence[int] | None = None) -> None:
        assert not enable

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        return {"stem": r"^embed", "blocks": r"^block"}

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid = (height // 32, width // 32)


@register_method("toy_colour")
class ToyMethod(Method):
    """Predicts the mean colour of each patch of images with noise.

    Args:
        noise: its standard deviation.
    """

    def __init__(self, encoder: Encoder, noise: float = 0.1) -> None:
        super().__init__(encoder)
        self.noise = noise
        self.pred = nn.Linear(encoder.num_features, 3)

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        side = self.encoder.stride
        size = (batch, 3, self.encoder.grid[0] * side, self.encoder.grid[1] * side)
        return (self.noise * torch.randn(size, generator=generator),)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:  # type: ignore[override]
        features = self.encoder((images + noise).to(self.pred.weight.dtype))
        target = patchify(images, 32).unflatten(-1, (-1, 3)).mean(-2)
        return (self.pred(features).flatten(1, 2).float() - target).square().mean()

    def reconstruct(self, images: Tensor, noise: Tensor, rows: int = 4) -> list[Column]:  # type: ignore[override]
        features = self.encoder((images + noise).to(self.pred.weight.dtype))
        colours = self.pred(features).float().flatten(1, 2).repeat(1, 1, 32 * 32)
        return [Column("image", images[:rows]), Column("colours", unpatchify(colours, self.encoder.grid)[:rows])]

    def block_groups(self) -> Mapping[str, Sequence[nn.Module]]:
        return {**super().block_groups(), "pred": [self.pred]}


register_encoder("toy_patches", ToyEncoder, img_size=64)
