"""Masks cut out and pasted, against torchvision's."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import roi_align

from mixmae.models.heads.mask_rcnn.masks import masks_in_boxes, paste_mask, paste_masks
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


def test_a_mask_pasted_by_its_rows_is_what_sampling_all_of_the_image_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: what is outside of a box, and the rows that are held at once, change nothing."""
    height, width = SIDE, SIDE + 21
    boxes = torch.cat([random_boxes(30, 5), torch.tensor([[0, 0, width, height], [3.5, 2, 3.6, 40], [2, 2, 4, 4]])])
    masks = torch.rand(len(boxes), 28, 28, generator=torch.Generator().manual_seed(0))
    masks[::2] = masks[::2].round()
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    u, v = 2 * (x - left) / (right - left) - 1, 2 * (y - top) / (bottom - top) - 1
    grid = torch.stack([u[:, None].expand(-1, height, -1), v[:, :, None].expand(-1, -1, width)], dim=-1)
    expected = torch.nn.functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5
    for at_once in (2**20, 700):
        monkeypatch.setattr("mixmae.models.heads.mask_rcnn.masks._AT_ONCE", at_once)
        assert torch.equal(paste_masks(masks, boxes, height, width), expected)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.bytes = max(self.bytes, found.nbytes)
        return found


def test_a_mask_is_pasted_in_little_more_memory_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixmae.models.heads.mask_rcnn.masks._AT_ONCE", 2**14)
    with Largest() as largest:
        mask = paste_mask(torch.ones(28, 28), torch.tensor([0.0, 0.0, 1600, 1200]), 1200, 1600)
    assert mask[30:-30, 30:-30].all()
    assert largest.bytes == mask.nbytes
