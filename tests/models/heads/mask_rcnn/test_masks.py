"""Masks cut out and pasted, against torchvision's."""

import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import roi_align

from mixmae.models.heads.mask_rcnn.masks import masks_in_boxes, paste_masks
from tests.models.heads.mask_rcnn.scenes import SIDE, ellipses, packed, random_boxes


def test_masks_in_boxes_are_what_aligned_pooling_of_whole_masks_gives() -> None:
    masks = ellipses(random_boxes(40, 0))
    boxes = (random_boxes(40, 0) + 8 * torch.randn(40, 4, generator=torch.Generator().manual_seed(1))).clamp(0, SIDE)
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:].maximum(boxes[:, :2] + 2)], dim=1).flip(0)
    rows = torch.arange(40).flip(0)
    found = masks_in_boxes(packed(masks), rows, boxes, 28)
    rois = torch.cat([rows[:, None], boxes], dim=1)
    expected = roi_align(masks[:, None].float(), rois, 28, 1.0, sampling_ratio=0, aligned=True)[:, 0] >= 0.5
    assert (found == expected).float().mean() > 0.99
    assert 0.1 < found.mean() < 0.9


def test_a_mask_fills_its_own_box_as_far_as_it_does() -> None:
    boxes = random_boxes(20, 2).round()
    found = masks_in_boxes(packed(ellipses(boxes)), torch.arange(20), boxes, 28)
    torch.testing.assert_close(found.mean((1, 2)), torch.full((20,), torch.pi / 4), atol=0.04, rtol=0)


def test_pasted_masks_are_torchvisions_to_the_edge() -> None:
    boxes = random_boxes(30, 4)
    masks = masks_in_boxes(packed(ellipses(boxes)), torch.arange(30), boxes, 28)
    found = paste_masks(masks, boxes, SIDE, SIDE + 10)
    expected = paste_masks_in_image(masks[:, None], boxes, (SIDE, SIDE + 10))[:, 0] >= 0.5
    true = torch.nn.functional.pad(ellipses(boxes), (0, 10))

    def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(((a & b).sum((1, 2)) / (a | b).sum((1, 2))).mean())

    assert overlap(found, expected) > 0.9
    assert overlap(found, true) > 0.95
    assert overlap(found, true) > overlap(expected, true), "torchvision truncates boxes to whole pixels"


def test_no_masks_are_pasted_where_nothing_was_found() -> None:
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 20, 30).shape == (0, 20, 30)
