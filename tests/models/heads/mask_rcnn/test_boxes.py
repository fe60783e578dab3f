"""Coding of boxes and anchors against torchvision's."""

import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from mixmae.models.heads.mask_rcnn.anchors import RATIOS, SIZES, STRIDES, anchors_of
from mixmae.models.heads.mask_rcnn.box_head import BOX_WEIGHTS
from mixmae.models.heads.mask_rcnn.boxes import clip_boxes, decode_boxes, encode_boxes, usable
from tests.models.heads.mask_rcnn.scenes import random_boxes


def test_boxes_are_coded_as_torchvision_codes_them() -> None:
    boxes, targets = random_boxes(100, 0), random_boxes(100, 1)
    coder = BoxCoder(BOX_WEIGHTS)
    deltas = encode_boxes(targets, boxes, BOX_WEIGHTS)
    torch.testing.assert_close(deltas, coder.encode_single(targets, boxes))
    torch.testing.assert_close(decode_boxes(deltas, boxes, BOX_WEIGHTS), targets, rtol=1e-4, atol=1e-3)
    wild = 30 * torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        decode_boxes(wild, boxes, BOX_WEIGHTS), coder.decode_single(wild, boxes), rtol=1e-5, atol=1e-3
    )


def test_empty_boxes_are_coded_to_finite_numbers_and_not_usable() -> None:
    empty = torch.tensor([[5.0, 5, 5, 5], [0, 0, 0, 0], [4, 4, 3, 8]])
    assert encode_boxes(empty, empty.flip(0), BOX_WEIGHTS).isfinite().all()
    assert not usable(torch.cat([empty, torch.full((1, 4), float("nan"))])).any()
    assert usable(random_boxes(10, 0)).all()


def test_boxes_are_clipped_to_their_own_image() -> None:
    clipped = clip_boxes(torch.tensor([[[-3.0, 2, 90, 99]], [[-3.0, 2, 90, 99]]]), torch.tensor([[64, 96], [96, 64]]))
    assert clipped.tolist() == [[[0, 2, 90, 64]], [[0, 2, 64, 96]]]


def test_anchors_are_torchvisions_before_it_rounds_them() -> None:
    height, width = 128, 192
    ours = anchors_of(height, width)
    theirs = AnchorGenerator(tuple((size,) for size in SIZES), (RATIOS,) * len(SIZES))
    # As it computes them, without its `round`.
    cells = [theirs.generate_anchors([size], RATIOS) for size in SIZES]
    for level, cell in zip(ours, cells, strict=True):
        around_zero = level[: len(RATIOS)]
        torch.testing.assert_close(around_zero.round(), cell)
    theirs.cell_anchors = [level[: len(RATIOS)].clone() for level in ours]
    maps = [torch.zeros(1, 1, -(-height // stride), -(-width // stride)) for stride in STRIDES]
    (expected,) = theirs(ImageList(torch.zeros(1, 3, height, width), [(height, width)]), maps)
    torch.testing.assert_close(torch.cat(ours), expected)
