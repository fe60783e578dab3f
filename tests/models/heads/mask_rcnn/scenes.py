"""Boxes, objects and small detectors that the tests of the heads share."""

import torch
from torch import Tensor

from mixmae.models.encoders.registry import create_encoder
from mixmae.models.heads.backbone import Backbone
from mixmae.models.heads.mask_rcnn.detector import MaskRCNN
from mixmae.models.heads.mask_rcnn.targets import pad_objects

SIDE = 128
CLASSES = 3


def random_boxes(count: int, seed: int, side: int = SIDE) -> Tensor:
    """fp32 [count, 4] inside an image, of 8 px and more."""
    generator = torch.Generator().manual_seed(seed)
    size = 8 + torch.rand(count, 2, generator=generator) * (side / 2 - 8)
    low = torch.rand(count, 2, generator=generator) * (side - size)
    return torch.cat([low, low + size], dim=1)


def packed(masks: Tensor) -> Tensor:
    """Masks bool [N, H, W] as uint8 [N, H, W / 8]."""
    weights = 2 ** torch.arange(7, -1, -1)
    return (masks.unflatten(2, (-1, 8)) * weights).sum(-1).to(torch.uint8)


def ellipses(boxes: Tensor, side: int = SIDE) -> Tensor:
    """Masks bool [N, side, side] of the ellipses inside boxes."""
    center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    pixels = torch.arange(side) + 0.5
    x, y = ((pixels - center[:, i, None]) / half[:, i, None] for i in (0, 1))
    return x[:, None, :] ** 2 + y[:, :, None] ** 2 <= 1


def objects_for(counts: list[int], seed: int = 0) -> tuple[Tensor, ...]:
    """A detector's inputs: ellipses of random classes."""
    boxes, total = random_boxes(sum(counts), seed), sum(counts)
    classes = torch.randint(0, CLASSES, (total,), generator=torch.Generator().manual_seed(seed))
    seeds = torch.randint(0, 2**32, (len(counts),), generator=torch.Generator().manual_seed(seed))
    return *pad_objects(boxes, classes, torch.tensor(counts), packed(ellipses(boxes))), seeds


def tiny_detector() -> MaskRCNN:
    """For images of 128 px, as narrow as it may be."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": (4, 4, 4, 2)}
    backbone = Backbone(create_encoder("mixmae_swin_nano", img_size=SIDE, **sizes))
    return MaskRCNN(backbone, CLASSES, (SIDE, SIDE), channels=16, rois=64)


def images_of(count: int) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
