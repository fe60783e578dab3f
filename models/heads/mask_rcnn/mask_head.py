"""The mask head: which pixels of a box are the object's (Mask R-CNN, arXiv 1703.06870)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from mixmae.models.heads.mask_rcnn.box_head import OBJECT_SHARE, Regions, is_object, of_class
from mixmae.models.heads.mask_rcnn.masks import masks_in_boxes
from mixmae.models.heads.mask_rcnn.recompute import Head
from mixmae.models.heads.mask_rcnn.roi_align import pool_boxes
from mixmae.models.heads.mask_rcnn.targets import Objects, take

_POOLED, _CONVOLUTIONS = 14, 4
MASK_SIZE = 2 * _POOLED


class MaskHead(Head):
    """4 convolutions with LayerNorm, then a mask of 28x28 for each class."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layers = MaskRCNNHeads(channels, [channels] * _CONVOLUTIONS, 1, norm_layer=LayerNorm2d)
        self.predictor = MaskRCNNPredictor(channels, channels, num_classes)
        nn.init.normal_(self.predictor.mask_fcn_logits.weight, std=0.001)
        for layer in (self.predictor.conv5_mask, self.predictor.mask_fcn_logits):
            nn.init.zeros_(layer.bias)

    def forward(self, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Logits [B, R, classes, 28, 28] of boxes [B, R, 4], in fp32."""
        logits: Tensor = self.predictor(self.run_layers(pool_boxes(maps, boxes, _POOLED)))
        return logits.float().unflatten(0, boxes.shape[:2])

    def loss(self, maps: Sequence[Tensor], regions: Regions, objects: Objects) -> Tensor:
        """The mean over objects of their pixels' binary cross entropy, in the masks of their classes."""
        most = regions.classes.shape[1] // OBJECT_SHARE
        regions = Regions(*(part[:, :most] for part in regions))
        found = is_object(regions, self.num_classes)
        logits = of_class(self(maps, regions.boxes), regions, found)
        rows = take(objects.rows, regions.objects)
        true = masks_in_boxes(objects.masks, rows.flatten(), regions.boxes.flatten(0, 1), MASK_SIZE)
        each = F.binary_cross_entropy_with_logits(logits, true.view_as(logits), reduction="none").mean((2, 3))
        return torch.where(found, each, 0.0).sum() / found.sum().clamp(min=1)
