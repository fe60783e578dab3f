"""UperNet (Xiao et al. 2018, arXiv 1807.10221) on a hierarchical encoder, with an auxiliary head on stage 3.

Sizes and losses are those of BEiT's recipes for ADE20K, which MixMAE takes (section 4.3): mmsegmentation's UPerHead and
FCNHead. Maps are [B, C, H, W]; convolutions compute in the weights' dtype, norms' statistics and losses in fp32.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmae.models.heads.backbone import Backbone, TrainableBackbone
from mixmae.models.layers.sync_batch_norm import SyncBatchNorm2d

IGNORED = 255
"""The label of pixels that teach nothing and are not judged."""
_POOLS = (1, 2, 3, 6)
_DROPOUT = 0.1
_AUXILIARY_STAGE, _AUXILIARY_WIDTH, _AUXILIARY_WEIGHT = 3, 256, 0.4


class ConvNorm(nn.Sequential):
    """A convolution without bias, synchronised BatchNorm, ReLU."""

    def __init__(self, in_width: int, width: int, kernel: int) -> None:
        conv = nn.Conv2d(in_width, width, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(conv, SyncBatchNorm2d(width), nn.ReLU())


class PixelClassifier(nn.Sequential):
    """Dropout of whole channels, and a linear layer of each position."""

    def __init__(self, width: int, num_classes: int) -> None:
        linear = nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(linear.weight, std=0.01)
        assert linear.bias is not None
        nn.init.zeros_(linear.bias)
        super().__init__(nn.Dropout2d(_DROPOUT), linear)


class GridMean(nn.Module):
    """`nn.AdaptiveAvgPool2d`, as two products with matrices: its gradient has a fixed order on GPUs, where torch's adds
    by atomics."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, side, side]."""
        rows, columns = (_cell_means(length, self.side, x.device) for length in x.shape[2:])
        return (rows @ x.float() @ columns.t()).to(x.dtype)


def _cell_means(length: int, cells: int, device: torch.device) -> Tensor:
    """fp32 [cells, length]; cell i reaches from floor(i * length / cells) to ceil((i + 1) * length / cells)."""
    positions, cell = torch.arange(length, device=device), torch.arange(cells, device=device)[:, None]
    first, end = cell * length // cells, -(-(cell + 1) * length // cells)
    return ((positions >= first) & (positions < end)) / (end - first)


class PyramidPooling(nn.Module):
    """The last stage's map, beside means of it over grids of 1, 2, 3 and 6 cells a side (PSPNet, arXiv 1612.01105)."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(GridMean(side), ConvNorm(in_width, width, 1)) for side in _POOLS)
        self.bottleneck = ConvNorm(in_width + len(_POOLS) * width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(torch.cat([x, *(resize(branch(x), x) for branch in self.branches)], dim=1))


class UperNetHead(nn.Module):
    """Maps of stride 4, 8, 16 and 32 to logits of stride 4: pyramid pooling, a feature pyramid, all levels fused."""

    def __init__(self, in_widths: Sequence[int], width: int, num_classes: int) -> None:
        super().__init__()
        *lower, last = in_widths
        self.pyramid_pooling = PyramidPooling(last, width)
        self.lateral = nn.ModuleList(ConvNorm(in_width, width, 1) for in_width in lower)
        self.smooth = nn.ModuleList(ConvNorm(width, width, 3) for _ in lower)
        self.fuse = ConvNorm(len(in_widths) * width, width, 3)
        self.classify = PixelClassifier(width, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *lower, last = maps
        top = self.pyramid_pooling(last)
        levels = [top]
        for lateral, smooth, x in reversed(list(zip(self.lateral, self.smooth, lower, strict=True))):
            side = lateral(x)
            top = side + resize(top, side)
            levels.append(smooth(top))
        *coarse, finest = levels
        fused = [finest, *(resize(level, finest) for level in reversed(coarse))]
        return self.classify(self.fuse(torch.cat(fused, dim=1)))


class Segmenter(TrainableBackbone):
    """`segmenter(images, segmentation) -> loss`; without labels the logits fp32 [B, classes, H, W].

    The loss is the mean over all pixels of their cross entropy, 0 where they are ignored, so that it does not depend on
    how images are shared among micro-batches; the auxiliary head's counts 0.4 times.

    Args:
        width: of UperNet's maps; 512 gives the paper's 122 M and 236 M parameters.
    """

    min_batch = 2
    """Pyramid pooling has one position an image, whose statistics are of several images."""

    def __init__(self, backbone: Backbone, num_classes: int, width: int = 512) -> None:
        super().__init__(backbone)
        self.num_classes = num_classes
        self.head = UperNetHead(backbone.channels, width, num_classes)
        self.auxiliary = nn.Sequential(
            ConvNorm(backbone.channels[_AUXILIARY_STAGE - 1], _AUXILIARY_WIDTH, 3),
            PixelClassifier(_AUXILIARY_WIDTH, num_classes),
        )

    def forward(self, images: Tensor, *inputs: Tensor) -> Tensor:
        """
        Args:
            images: normalised, [B, 3, H, W].
            inputs: classes of pixels, an integer type [B, H, W], 255 where they are ignored.
        """
        maps = self.backbone(images)
        logits = self.head(maps)
        if not inputs:
            return resize(logits.float(), images)
        labels = inputs[0].long()
        auxiliary = self.auxiliary(maps[_AUXILIARY_STAGE - 1])
        return pixel_loss(logits, labels) + _AUXILIARY_WEIGHT * pixel_loss(auxiliary, labels)


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits [B, classes, h, w], resized to labels int64 [B, H, W], over the number of all pixels."""
    full = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=False)
    # Reduced by the loss itself, GPUs add pixels in no fixed order, and torch refuses it where one is asked for.
    return F.cross_entropy(full, labels, ignore_index=IGNORED, reduction="none").sum() / labels.numel()


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to another map's height and width."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)
