"""Proposals and heads against torchvision's, with the same weights."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign, roi_align

from mixmae.models.heads.mask_rcnn import rpn as rpn_module
from mixmae.models.heads.mask_rcnn.anchors import RATIOS, SIZES
from mixmae.models.heads.mask_rcnn.box_head import BOX_WEIGHTS, BoxHead
from mixmae.models.heads.mask_rcnn.mask_head import MaskHead
from mixmae.models.heads.mask_rcnn.matching import NEITHER, OBJECT, match_boxes
from mixmae.models.heads.mask_rcnn.proposals import Proposals
from mixmae.models.heads.mask_rcnn.roi_align import level_of, pool_boxes
from mixmae.models.heads.mask_rcnn.rpn import RegionProposals
from mixmae.models.heads.mask_rcnn.targets import Objects
from tests.models.heads.mask_rcnn.scenes import CLASSES, SIDE, objects_for, random_boxes

CHANNELS = 16
IMAGES = 2


def pyramid() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(IMAGES, CHANNELS, SIDE // s, SIDE // s, generator=generator) for s in (4, 8, 16, 32, 64)]


def proposed(boxes: Tensor, there: Tensor) -> Proposals:
    return Proposals(boxes, there, torch.arange(boxes.shape[1]).expand(boxes.shape[:2]))


class Aligned(MultiScaleRoIAlign):  # type: ignore[misc]
    """torchvision's pooler with the `aligned` that it leaves out, and an adaptive number of samples."""

    def forward(self, x: Any, boxes: Any, image_shapes: Any) -> Tensor:
        maps = list(x.values())[:4]
        super().forward(x, boxes, image_shapes)
        levels = self.map_levels(boxes)
        rois = torch.cat([torch.cat([torch.full((len(b), 1), float(i)), b], 1) for i, b in enumerate(boxes)])
        found = torch.zeros(len(rois), CHANNELS, *self.output_size)
        for level, (features, scale) in enumerate(zip(maps, self.scales, strict=True)):
            found[levels == level] = roi_align(
                features, rois[levels == level], self.output_size, scale, sampling_ratio=0, aligned=True
            )
        return found


def pooler(size: int) -> Aligned:
    return Aligned(["0", "1", "2", "3"], size, 0)


def named(maps: list[Tensor]) -> "OrderedDict[str, Tensor]":
    return OrderedDict((str(number), part) for number, part in enumerate(maps))


def test_boxes_are_pooled_from_the_level_of_their_size() -> None:
    maps = pyramid()
    sides = torch.tensor([20.0, 100.0, 112.0, 223.0, 225.0, 500.0, 2000.0])
    square = torch.stack([torch.zeros(7), torch.zeros(7), sides, sides], dim=1)
    assert level_of(square).tolist() == [0, 0, 1, 1, 2, 3, 3]
    boxes = torch.stack([torch.cat([random_boxes(40, seed), square]) for seed in range(IMAGES)])
    expected = pooler(7)(named(maps), list(boxes), [(SIDE, SIDE)] * IMAGES)
    torch.testing.assert_close(pool_boxes(maps, boxes, 7), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def proposals() -> tuple[RegionProposals, RegionProposalNetwork]:
    """Ours and torchvision's."""
    torch.manual_seed(0)
    ours = RegionProposals(CHANNELS, (SIDE, SIDE)).eval()
    for layer in ours.head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.1)
    generator = AnchorGenerator(tuple((size,) for size in SIZES), (RATIOS,) * len(SIZES))
    generator.cell_anchors = [anchors[: len(RATIOS)].clone() for anchors in ours.anchors]
    limits = {"training": 1000, "testing": 1000}
    theirs = RegionProposalNetwork(generator, copy.deepcopy(ours.head), 0.7, 0.3, 10**6, 1.0, limits, limits, 0.7)
    return ours, theirs


def test_proposals_are_torchvisions(proposals: tuple[RegionProposals, RegionProposalNetwork]) -> None:
    ours, theirs = proposals
    sizes = [(SIDE, SIDE), (100, 90)]
    expected, _ = theirs.eval()(ImageList(torch.zeros(IMAGES, 3, SIDE, SIDE), sizes), named(pyramid()))
    objectness, deltas = ours(pyramid())
    found = ours.propose(objectness, deltas, torch.tensor(sizes))
    assert found.boxes.shape == (IMAGES, 1000, 4)
    for boxes, there, right in zip(found.boxes, found.there, expected, strict=True):
        assert 50 < there.sum() == len(right)
        torch.testing.assert_close(boxes[there], right, rtol=1e-5, atol=1e-3)
        assert not boxes[~there].any()


def test_objectness_learns_what_torchvisions_does(
    proposals: tuple[RegionProposals, RegionProposalNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every anchor sampled; torchvision divides by their number, we by the number asked for."""
    ours, theirs = proposals
    objects = Objects.of(*objects_for([3, 0]))
    monkeypatch.setattr(rpn_module, "_SAMPLED", 10**6)
    monkeypatch.setattr(rpn_module, "_SAMPLED_OBJECTS", 10**6)
    objectness, deltas = ours(pyramid())
    classification, _ = ours.loss(objectness, deltas, objects)
    targets = [{"boxes": boxes[there]} for boxes, there in zip(objects.boxes, objects.there, strict=True)]
    _, losses = theirs.train()(
        ImageList(torch.zeros(IMAGES, 3, SIDE, SIDE), [(SIDE, SIDE)] * 2), named(pyramid()), targets
    )
    anchors = torch.cat(ours.anchors)
    labels = [
        match_boxes(boxes, there, anchors, 0.7, 0.3, True).labels
        for boxes, there in zip(objects.boxes, objects.there, strict=True)
    ]
    used = sum(int((label != NEITHER).sum()) for label in labels)
    assert any((label == OBJECT).any() for label in labels)
    torch.testing.assert_close(classification * 10**6 * IMAGES / used, losses["loss_objectness"], rtol=1e-4, atol=1e-5)


def background_first(head: BoxHead) -> FastRCNNPredictor:
    """torchvision's predictor of the same classes, with deltas for background too."""
    predictor = FastRCNNPredictor(1024, CLASSES + 1)
    nn.init.zeros_(predictor.bbox_pred.weight)
    with torch.no_grad():
        predictor.cls_score.weight.copy_(head.score.weight.roll(1, 0))
        predictor.cls_score.bias.copy_(head.score.bias.roll(1, 0))
        predictor.bbox_pred.weight[4:].copy_(head.delta.weight)
        predictor.bbox_pred.bias[4:].copy_(head.delta.bias)
    return predictor


@pytest.fixture(scope="module")
def heads() -> tuple[BoxHead, MaskHead, RoIHeads]:
    torch.manual_seed(1)
    box_head, mask_head = BoxHead(CHANNELS, CLASSES, rois=512).eval(), MaskHead(CHANNELS, CLASSES).eval()
    nn.init.normal_(box_head.score.weight, std=0.2)
    nn.init.normal_(box_head.delta.weight, std=0.2)
    nn.init.normal_(mask_head.predictor.mask_fcn_logits.weight, std=0.2)
    predictor = copy.deepcopy(mask_head.predictor)
    with torch.no_grad():  # a mask of background, which nobody looks at
        last = nn.Conv2d(CHANNELS, CLASSES + 1, 1)
        last.weight[1:].copy_(mask_head.predictor.mask_fcn_logits.weight)
        assert last.bias is not None
        last.bias[1:].copy_(mask_head.predictor.mask_fcn_logits.bias)
        predictor.mask_fcn_logits = last
    theirs = RoIHeads(
        pooler(7),
        copy.deepcopy(box_head.layers),
        background_first(box_head),
        0.5,
        0.5,
        10**6,
        1.0,
        BOX_WEIGHTS,
        0.05,
        0.5,
        100,
        pooler(14),
        copy.deepcopy(mask_head.layers),
        predictor,
    )
    return box_head, mask_head, theirs.eval()


def test_detections_are_torchvisions(heads: tuple[BoxHead, MaskHead, RoIHeads]) -> None:
    box_head, mask_head, theirs = heads
    maps, sizes = pyramid(), [(SIDE, SIDE), (110, 120)]
    boxes = torch.stack([random_boxes(60, seed) for seed in range(IMAGES)])
    there = torch.tensor([[True] * 60, [True] * 40 + [False] * 20])
    expected, _ = theirs(named(maps), [own[some] for own, some in zip(boxes, there, strict=True)], sizes)
    logits, deltas = box_head(maps, boxes)
    found = box_head.detect(logits, deltas, proposed(boxes, there), torch.tensor(sizes))
    for image, (rows, right) in enumerate(zip(found, expected, strict=True)):
        assert 10 < len(rows) == len(right["boxes"])
        torch.testing.assert_close(rows[:, :4], right["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(rows[:, 4], right["scores"], rtol=1e-4, atol=1e-5)
        assert torch.equal(rows[:, 5].long(), right["labels"] - 1)
        padded = torch.zeros(IMAGES, len(rows), 4)
        padded[image] = rows[:, :4]
        logits = mask_head(maps, padded)[image]
        (masks,) = maskrcnn_inference(logits, [rows[:, 5].long()])
        torch.testing.assert_close(masks, right["masks"], rtol=1e-3, atol=1e-4)


def test_heads_learn_what_torchvisions_do(heads: tuple[BoxHead, MaskHead, RoIHeads]) -> None:
    box_head, mask_head, theirs = heads
    maps, objects = pyramid(), Objects.of(*objects_for([3, 2]))
    near = objects.boxes[:, :, None] + 2 * torch.randn(IMAGES, 3, 20, 4, generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([near.flatten(1, 2).clamp(0, SIDE), torch.stack([random_boxes(60, s) for s in (5, 6)])], dim=1)
    boxes[1, 40:60] = random_boxes(20, 7)  # beside the slot that is empty
    regions = box_head.sample(proposed(boxes, torch.ones(boxes.shape[:2], dtype=torch.bool)), objects)
    logits, deltas = box_head(maps, regions.boxes)
    losses = box_head.loss(logits, deltas, regions, objects)

    # The same boxes for torchvision, matched by itself. It takes all, and boxes by a loss of its own.
    used = regions.classes >= 0
    own = [region[some] for region, some in zip(regions.boxes, used, strict=True)]
    true = [part[there] for part, there in zip(objects.boxes, objects.there, strict=True)]
    classes = [part[there] + 1 for part, there in zip(objects.classes, objects.there, strict=True)]
    matched, labels = theirs.assign_targets_to_proposals(own, true, classes)
    rolled = [(label - 1) % (CLASSES + 1) for label in labels]
    assert all(torch.equal(a, b[some]) for a, b, some in zip(rolled, regions.classes, used, strict=True))
    pooled = theirs.box_head(theirs.box_roi_pool(named(maps), own, [(SIDE, SIDE)] * 2))
    logits, deltas = theirs.box_predictor(pooled)
    torch.testing.assert_close(losses[0], nn.functional.cross_entropy(logits, torch.cat(labels)), rtol=1e-4, atol=1e-4)
    targets = theirs.box_coder.encode([b[m] for b, m in zip(true, matched, strict=True)], own)
    found = torch.cat(labels) > 0
    chosen = deltas.view(len(deltas), -1, 4)[found, torch.cat(labels)[found]]
    expected = (chosen - torch.cat(targets)[found]).abs().sum() / len(deltas)
    assert found.sum() > 50
    torch.testing.assert_close(losses[1], expected, rtol=1e-4, atol=1e-4)
    assert mask_head.loss(maps, regions, objects) > 0
