"""ResNets of BiT (Kolesnikov et al. 2020) for MixMAE: pre-activation, GroupNorm, standardised kernels, wide.

Convolutions, the max pooling and the norms' statistics are mixed ones (`mixmae.models.layers.mixed_conv`), so that a
position sees its own group only. Unmixed, the convolutions pad with zeros, and so does the max pooling, as BiT's.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from mixmae.models.encoders import conversion
from mixmae.models.encoders.contract import MapEdit, unchanged
from mixmae.models.encoders.conversion import Converted
from mixmae.models.encoders.registry import register_encoder
from mixmae.models.encoders.staged import NUM_STAGES, Stage, StagedEncoder
from mixmae.models.layers.mixed_cells import Mix
from mixmae.models.layers.mixed_conv import StandardisedConv2d, mixed_max_pool2d
from mixmae.models.layers.mixed_norm import MixedGroupNormReLU


class Stem(nn.Module):
    """Images to a quarter of their side."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv = StandardisedConv2d(in_chans, dim, 7, 2)

    def forward(self, x: Tensor, mix: Mix | None = None) -> Tensor:
        x = self.conv(x, mix)
        if mix is not None:
            return mixed_max_pool2d(x, 3, 2, mix)
        return F.max_pool2d(F.pad(x.permute(0, 3, 1, 2), (1, 1, 1, 1)), 3, 2).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """The shortcut of a stage's first block."""

    def __init__(self, in_dim: int, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = StandardisedConv2d(in_dim, dim, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, each behind its norm; a block of a map [B, H, W, C]."""

    def __init__(self, in_dim: int, dim: int, stride: int, norm_groups: int, drop_path: float, first: bool) -> None:
        super().__init__()
        width = dim // 4
        self.downsample = Downsample(in_dim, dim, stride) if first else None
        self.norm1 = MixedGroupNormReLU(norm_groups, in_dim)
        self.conv1 = StandardisedConv2d(in_dim, width, 1)
        self.norm2 = MixedGroupNormReLU(norm_groups, width)
        self.conv2 = StandardisedConv2d(width, width, 3, stride)
        self.norm3 = MixedGroupNormReLU(norm_groups, width)
        self.conv3 = StandardisedConv2d(width, dim, 1)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, mix: Mix | None = None) -> Tensor:
        active = self.norm1(x, mix)
        shortcut = x if self.downsample is None else self.downsample(active)
        x = self.conv2(self.norm2(self.conv1(active), mix), mix)
        return shortcut + self.drop_path(self.conv3(self.norm3(x, mix)))


class ResNetStage(Stage):
    def __init__(self, in_dim: int, dim: int, stride: int, norm_groups: int, drop_path: Sequence[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(drop_path):
            first = i == 0
            block = Bottleneck(in_dim if first else dim, dim, stride if first else 1, norm_groups, rate, first)
            self.blocks.append(block)

    def forward(
        self,
        x: Tensor,
        groups: Tensor | None = None,
        num_groups: int | None = None,
        edit: Callable[[Tensor], Tensor] = unchanged,
    ) -> Tensor:
        mix = None if groups is None else Mix.of(groups)
        x = edit(x)
        for block in self.blocks:
            x = self.run(block, x, mix)
        return x


class ResNet(StagedEncoder):
    """`encoder(images, groups=None) -> features`.

    Args:
        img_size: pixels, one side or (height, width).
        width: multiplies all channels.
        num_classes: 0 leaves the head out; with `global_pool=""` the features stay a map [B, H/32, W/32, C].

    Raises:
        ValueError: the image does not divide into 32 px cells, or channels into the norms' groups.
    """

    first_conv = "stem.conv"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        channels: Sequence[int] = (256, 512, 1024, 2048),
        depths: Sequence[int] = (3, 4, 6, 3),
        width: int = 1,
        norm_groups: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims = [dim * width for dim in channels]
        strides = [4 * 2**i for i in range(NUM_STAGES)]
        super().__init__(img_size, strides[-1], dims, strides)
        self.add_head(num_classes, global_pool, drop_rate)
        self.edit_dims = (dims[0] // 4, *dims[:-1])
        self.stem = Stem(in_chans, dims[0] // 4)
        drop_path = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.ModuleList(
            ResNetStage(dims[i - 1] if i else dims[0] // 4, dims[i], 2 if i else 1, norm_groups, drop_path[i])
            for i in range(NUM_STAGES)
        )
        self.norm = MixedGroupNormReLU(norm_groups, dims[-1])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _embed(self, images: Tensor, groups: Tensor | None = None, edit: MapEdit | None = None) -> Tensor:
        return self.stem(super()._embed(images), None if groups is None else Mix.of(groups))

    def _normalise(self, x: Tensor, groups: Tensor | None = None) -> Tensor:
        return self.norm(x, None if groups is None else Mix.of(groups))

    def convert(self, state: dict[str, Tensor]) -> Converted:
        return conversion.resnet(state)


register_encoder(
    "mixmae_resnet_nano", ResNet, img_size=128, channels=(64, 128, 256, 512), depths=(1, 1, 2, 1), norm_groups=8
)
register_encoder("mixmae_resnet_50x1", ResNet)
register_encoder("mixmae_resnet_50x3", ResNet, width=3)
register_encoder("mixmae_resnet_101x3", ResNet, depths=(3, 4, 23, 3), width=3)
