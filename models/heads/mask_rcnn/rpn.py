"""The region proposal network: which anchors are objects, and where exactly (Faster R-CNN, arXiv 1506.01497)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead

from mixmae.models.heads.mask_rcnn.anchors import RATIOS, anchors_of
from mixmae.models.heads.mask_rcnn.boxes import encode_boxes
from mixmae.models.heads.mask_rcnn.matching import NEITHER, OBJECT, each_image, match_boxes, sample_boxes
from mixmae.models.heads.mask_rcnn.proposals import RPN_WEIGHTS, Proposals, select_proposals
from mixmae.models.heads.mask_rcnn.targets import Objects, take

_CONVOLUTIONS = 2
_POSITIVE, _NEGATIVE = 0.7, 0.3
_SAMPLED, _SAMPLED_OBJECTS = 256, 128
_PER_LEVEL = {True: 2000, False: 1000}
"""In training, and else."""
_PROPOSALS = 1000


class RegionProposals(nn.Module):
    """Proposals from the five levels of a feature pyramid, for images of one size.

    Args:
        image: height and width in pixels.
    """

    def __init__(self, channels: int, image: tuple[int, int]) -> None:
        super().__init__()
        self.head = RPNHead(channels, len(RATIOS), conv_depth=_CONVOLUTIONS)
        for level, anchors in enumerate(anchors_of(*image)):
            self.register_buffer(f"anchors{level}", anchors, persistent=False)

    @property
    def anchors(self) -> list[Tensor]:
        return [anchors for name, anchors in self.named_buffers() if name.startswith("anchors")]

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness [B, n] and deltas [B, n, 4] of the anchors of each level, in fp32."""
        logits, deltas = self.head(list(maps))
        return [_by_anchor(x, 1)[..., 0] for x in logits], [_by_anchor(x, 4) for x in deltas]

    def propose(self, objectness: Sequence[Tensor], deltas: Sequence[Tensor], sizes: Tensor) -> Proposals:
        """The proposals [B, 1000], without gradients."""
        return select_proposals(objectness, deltas, self.anchors, sizes, _PER_LEVEL[self.training], _PROPOSALS)

    def loss(self, objectness: Sequence[Tensor], deltas: Sequence[Tensor], objects: Objects) -> tuple[Tensor, Tensor]:
        """Of objectness and of boxes, over 256 anchors an image, at most half of them objects."""
        anchors = torch.cat(self.anchors)
        numbers = torch.arange(len(anchors), device=anchors.device)

        def sample(image: int) -> tuple[Tensor, Tensor, Tensor]:
            true, there = objects.boxes[image], objects.there[image]
            matches = match_boxes(true, there, anchors, _POSITIVE, _NEGATIVE, keep_best=True)
            sampled = sample_boxes(matches.labels, numbers, _SAMPLED, _SAMPLED_OBJECTS, objects.seeds[image])
            return sampled.chosen, sampled.labels, true[matches.objects[sampled.chosen]]

        index, labels, true = each_image(sample, objects.boxes)
        found, total = labels == OBJECT, _SAMPLED * len(labels)
        logits, shifts = torch.cat(list(objectness), 1).gather(1, index), take(torch.cat(list(deltas), 1), index)
        classification = F.binary_cross_entropy_with_logits(logits, found.float(), reduction="none")
        regression = (shifts - encode_boxes(true, anchors[index], RPN_WEIGHTS)).abs()
        return (
            torch.where(labels == NEITHER, 0.0, classification).sum() / total,
            torch.where(found[..., None], regression, 0.0).sum() / total,
        )


def _by_anchor(x: Tensor, width: int) -> Tensor:
    """A head's map [B, anchors * width, h, w] as fp32 [B, h * w * anchors, width]."""
    count, _, height, columns = x.shape
    return x.view(count, -1, width, height, columns).permute(0, 3, 4, 1, 2).reshape(count, -1, width).float()
