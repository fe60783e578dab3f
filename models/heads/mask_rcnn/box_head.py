"""The box head: what is in each proposal, and where exactly (Fast R-CNN, arXiv 1504.08083)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.ops import batched_nms

from mixmae.models.heads.mask_rcnn.boxes import Weights, clip_boxes, decode_boxes, encode_boxes, usable
from mixmae.models.heads.mask_rcnn.matching import BACKGROUND, NEITHER, OBJECT, each_image, match_boxes, sample_boxes
from mixmae.models.heads.mask_rcnn.proposals import Proposals
from mixmae.models.heads.mask_rcnn.recompute import Head
from mixmae.models.heads.mask_rcnn.roi_align import pool_boxes
from mixmae.models.heads.mask_rcnn.targets import Objects, take

BOX_WEIGHTS: Weights = (10.0, 10.0, 5.0, 5.0)
_POOLED, _CONVOLUTIONS, _WIDTH = 7, 4, 1024
_IOU = 0.5
OBJECT_SHARE = 4
"""At most one of so many of the boxes that a step learns from is an object."""
_MIN_SCORE, _NMS_IOU = 0.05, 0.5
DETECTIONS = 100
_IGNORED = -100
_OF_PROPOSALS, _OF_OBJECTS = 2**24, 2**25
"""Behind the numbers by which anchors are chosen."""


class Regions(NamedTuple):
    """The boxes of a step that the heads learn from, objects first."""

    boxes: Tensor
    """fp32 [B, R, 4]."""
    classes: Tensor
    """int64 [B, R]: the object's, the number of classes for background, -100 for an empty slot."""
    objects: Tensor
    """int64 [B, R], the object of each box, of meaning for objects alone."""


class BoxHead(Head):
    """4 convolutions with LayerNorm, one layer of 1024, then classes (background last) and a box for each class.

    Args:
        rois: boxes of an image that a step learns from.
    """

    def __init__(self, channels: int, num_classes: int, rois: int) -> None:
        super().__init__()
        self.num_classes, self.rois = num_classes, rois
        shape, widths = (channels, _POOLED, _POOLED), [channels] * _CONVOLUTIONS
        layers = FastRCNNConvFCHead(shape, widths, [_WIDTH], norm_layer=LayerNorm2d)
        layers[-1].inplace = False  # selective checkpointing may keep the product that it would write over
        self.layers = layers
        self.score, self.delta = nn.Linear(_WIDTH, num_classes + 1), nn.Linear(_WIDTH, 4 * num_classes)
        for layer, std in ((self.score, 0.01), (self.delta, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, R, classes + 1] and deltas [B, R, classes, 4] of boxes [B, R, 4], in fp32."""
        x = self.run_layers(pool_boxes(maps, boxes, _POOLED))
        count, slots = boxes.shape[:2]
        return self.score(x).float().view(count, slots, -1), self.delta(x).float().view(count, slots, -1, 4)

    def sample(self, proposals: Proposals, objects: Objects) -> Regions:
        """Of the proposals and objects of each image: [B, rois], at most a quarter of them objects."""
        boxes = torch.cat([proposals.boxes, objects.boxes], dim=1)
        there = torch.cat([proposals.there, objects.there], dim=1)
        slots = torch.arange(objects.boxes.shape[1], device=boxes.device).expand(len(boxes), -1)
        numbers = torch.cat([_OF_PROPOSALS + proposals.anchors, _OF_OBJECTS + slots], dim=1)

        def sample(image: int) -> tuple[Tensor, Tensor, Tensor]:
            matches = match_boxes(objects.boxes[image], objects.there[image], boxes[image], _IOU, _IOU)
            labels = torch.where(there[image], matches.labels, NEITHER)
            most = self.rois // OBJECT_SHARE
            sampled = sample_boxes(labels, numbers[image], self.rois, most, objects.seeds[image])
            index = matches.objects[sampled.chosen]
            classes = torch.where(sampled.labels == BACKGROUND, self.num_classes, _IGNORED)
            classes = torch.where(sampled.labels == OBJECT, objects.classes[image, index], classes)
            return boxes[image, sampled.chosen], classes, index

        return Regions(*each_image(sample, boxes))

    def loss(self, logits: Tensor, deltas: Tensor, regions: Regions, objects: Objects) -> tuple[Tensor, Tensor]:
        """Of classes and of boxes, over the boxes sampled."""
        used, found = regions.classes != _IGNORED, is_object(regions, self.num_classes)
        total = used.sum().clamp(min=1)
        classification = F.cross_entropy(logits.flatten(0, 1), regions.classes.flatten(), reduction="sum") / total
        true = take(objects.boxes, regions.objects)
        distance = of_class(deltas, regions, found) - encode_boxes(true, regions.boxes, BOX_WEIGHTS)
        regression = torch.where(found[..., None], distance.abs(), 0.0).sum() / total
        return classification, regression

    def detect(self, logits: Tensor, deltas: Tensor, proposals: Proposals, sizes: Tensor) -> list[Tensor]:
        """Of each image's boxes those of score 0.05 and more that no better one of their class lies on, at most 100.

        Returns:
            For each image fp32 [n, 6]: box, score, class; best first.
        """
        scores = torch.where(proposals.there[..., None], logits.softmax(-1)[..., :-1], 0.0)
        boxes = clip_boxes(decode_boxes(deltas, proposals.boxes[:, :, None], BOX_WEIGHTS), sizes)
        found = []
        for own, score in zip(boxes, scores, strict=True):
            box, kind = ((score > _MIN_SCORE) & usable(own)).nonzero(as_tuple=True)
            rows = torch.cat([own[box, kind], score[box, kind, None], kind[:, None].float()], dim=1)
            found.append(rows[batched_nms(rows[:, :4], rows[:, 4], kind, _NMS_IOU)[:DETECTIONS]])
        return found


def is_object(regions: Regions, num_classes: int) -> Tensor:
    """bool [B, R]."""
    return (regions.classes >= 0) & (regions.classes < num_classes)


def of_class(values: Tensor, regions: Regions, found: Tensor) -> Tensor:
    """Of values [B, R, classes, ...] those of each object's class, [B, R, ...]; of no meaning elsewhere."""
    index = torch.where(found, regions.classes, 0)
    shape = (*index.shape, 1, *values.shape[3:])
    return values.gather(2, index.view(*index.shape, *[1] * (values.dim() - 2)).expand(shape)).squeeze(2)
