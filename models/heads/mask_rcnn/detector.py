"""Mask R-CNN around a hierarchical encoder."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from mixmae.models.heads.backbone import Backbone, TrainableBackbone
from mixmae.models.heads.mask_rcnn.box_head import DETECTIONS, BoxHead
from mixmae.models.heads.mask_rcnn.mask_head import MaskHead
from mixmae.models.heads.mask_rcnn.proposals import fill_slots
from mixmae.models.heads.mask_rcnn.recompute import Head
from mixmae.models.heads.mask_rcnn.rpn import RegionProposals
from mixmae.models.heads.mask_rcnn.targets import Objects


class Detections(NamedTuple):
    """What a detector finds in images, best first, in 100 slots for each."""

    boxes: Tensor
    """fp32 [B, 100, 4], corners in pixels."""
    scores: Tensor
    """fp32 [B, 100]; 0 in empty slots."""
    classes: Tensor
    """int64 [B, 100]."""
    masks: Tensor
    """fp32 [B, 100, 28, 28]: probabilities inside the box."""

    def of_image(self, number: int) -> "Detections":
        """Without the empty slots, and without the dimension B."""
        count = int((self.scores[number] > 0).sum())
        return Detections(*(part[number, :count] for part in self))

    def above(self, score: float) -> "Detections":
        """Those of one image that have this score or a better one."""
        count = int((self.scores >= score).sum())
        return Detections(*(part[:count] for part in self))


class MaskRCNN(TrainableBackbone):
    """`detector(images, boxes, classes, counts, masks, seeds) -> loss`; with nothing, or sizes, beside images what it
    finds in them (`Detections`).

    Heads of ViTDet's recipes (arXiv 2203.16527): a pyramid of 256 channels, 2 convolutions for proposals, 4 and a layer
    of 1024 for boxes, 4 for masks, LayerNorm in all but the proposals' head. Losses are detectron2's: L1 for boxes,
    means over the boxes sampled. The backbone and the heads compute in the weights' dtype; boxes, RoIAlign and losses
    in fp32.

    Args:
        backbone: a checkpoint holds its weights under `backbone.`.
        image: height and width of all images.
        channels: of the pyramid and the heads' convolutions.
        rois: boxes of an image that a step of the box head learns from; the mask head sees a quarter of them.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, image: tuple[int, int], channels: int = 256, rois: int = 512
    ) -> None:
        super().__init__(backbone)
        self.num_classes = num_classes
        self.pyramid = FeaturePyramidNetwork(
            list(backbone.channels), channels, extra_blocks=LastLevelMaxPool(), norm_layer=LayerNorm2d
        )
        self.proposals = RegionProposals(channels, image)
        self.box_head = BoxHead(channels, num_classes, rois)
        self.mask_head = MaskHead(channels, num_classes)

    def forward(self, images: Tensor, *inputs: Tensor) -> Any:
        """The loss of normalised images [B, 3, H, W], or their `Detections`.

        Args:
            inputs: those of `pad_objects` and seeds, int64 [B], to learn; none, or the sizes, int64 [B, 2], of images
                that do not fill all of H and W, to detect.
        """
        maps = self.maps(images)
        if len(inputs) > 1:
            return torch.stack(self.losses(maps, self._sizes(images), Objects.of(*inputs))).sum()
        return self.detections(maps, inputs[0] if inputs else self._sizes(images))

    def maps(self, images: Tensor) -> list[Tensor]:
        """The pyramid's five levels, [B, 256, h, w], from stride 4 to 64."""
        stages = self.backbone(images.to(next(self.backbone.parameters()).dtype))
        return list(self.pyramid({str(number): stage for number, stage in enumerate(stages)}).values())

    def losses(self, maps: Sequence[Tensor], sizes: Tensor, objects: Objects) -> list[Tensor]:
        """Objectness and boxes of proposals, classes and boxes of regions, masks: fp32 scalars."""
        objectness, deltas = self.proposals(maps)
        proposals = self.proposals.propose(objectness, deltas, sizes)
        regions = self.box_head.sample(proposals, objects)
        logits, box_deltas = self.box_head(maps, regions.boxes)
        return [
            *self.proposals.loss(objectness, deltas, objects),
            *self.box_head.loss(logits, box_deltas, regions, objects),
            self.mask_head.loss(maps, regions, objects),
        ]

    def detections(self, maps: Sequence[Tensor], sizes: Tensor) -> Detections:
        objectness, box_deltas = self.proposals(maps)
        proposals = self.proposals.propose(objectness, box_deltas, sizes)
        logits, deltas = self.box_head(maps, proposals.boxes)
        found = self.box_head.detect(logits, deltas, proposals, sizes)
        rows = torch.stack([fill_slots(part, DETECTIONS) for part in found])
        classes = rows[..., 5].long()
        masks = self.mask_head(maps, rows[..., :4]).sigmoid()
        index = classes[..., None, None, None].expand(*classes.shape, 1, *masks.shape[3:])
        return Detections(rows[..., :4], rows[..., 4], classes, masks.gather(2, index)[:, :, 0])

    @property
    def _heads(self) -> Mapping[str, Head]:
        return {"box_head": self.box_head, "mask_head": self.mask_head}

    def block_groups(self) -> Mapping[str, Sequence[nn.Module]]:
        return {**super().block_groups(), **{name: [head.layers] for name, head in self._heads.items()}}

    def set_grad_checkpointing(self, groups: Collection[str]) -> None:
        super().set_grad_checkpointing(groups)
        for name, head in self._heads.items():
            head.grad_checkpointing = name in groups

    @staticmethod
    def _sizes(images: Tensor) -> Tensor:
        """int64 [B, 2], of images that are all there."""
        height, width = (torch.full((len(images),), side, device=images.device) for side in images.shape[2:])
        return torch.stack([height, width], dim=1)
