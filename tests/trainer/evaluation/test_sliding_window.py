import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixmae.trainer.evaluation.sliding_window import classes_of, count_windows, sliding_logits, starts


def segment(views: Tensor) -> Tensor:
    """Three classes, whose logits depend on where in its window a pixel lies."""
    ramp = torch.linspace(0, 1, views.shape[-1])
    return torch.stack([views.sum(1) * ramp, views[:, 0] - ramp[:, None], views[:, 2] * 2], dim=1)


@pytest.mark.parametrize("size", [(8, 8), (8, 21), (19, 13), (5, 30), (3, 4)])
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_are_the_mean_of_all_windows(size: tuple[int, int], batch: int) -> None:
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    found = sliding_logits(segment, image, 8, 5, batch, passes=20)
    height, width = (max(8, side) for side in size)
    padded = torch.zeros(3, height, width)
    padded[:, : size[0], : size[1]] = image
    total, count = np.zeros((3, height, width)), np.zeros((height, width))
    for top in range(0, height - 8 + 5, 5):
        for left in range(0, width - 8 + 5, 5):
            y, x = min(top, height - 8), min(left, width - 8)
            view = padded[None, :, y : y + 8, x : x + 8]
            total[:, y : y + 8, x : x + 8] += segment(view)[0].double().numpy()
            count[y : y + 8, x : x + 8] += 1
    expected = (total / count)[:, : size[0], : size[1]]
    np.testing.assert_allclose(found.double().numpy(), expected, atol=1e-5)


def test_windows_may_be_rectangles() -> None:
    image = torch.randn(3, 9, 30, generator=torch.Generator().manual_seed(0))
    found = sliding_logits(lambda views: views * 2, image, (8, 16), (5, 10), batch=2)
    torch.testing.assert_close(found, image * 2)
    assert count_windows(9, 30, (8, 16), (5, 10)) == 2 * 3


@given(st.integers(1, 900), st.integers(1, 200), st.integers(1, 200))
def test_windows_cover_a_side_and_none_is_there_twice(side: int, window: int, stride: int) -> None:
    stride = min(stride, window)
    found = starts(side, window, stride)
    assert sorted(set(found)) == found
    assert found[0] == 0
    assert found[-1] == max(0, side - window)
    assert all(later - earlier <= stride for earlier, later in itertools.pairwise(found))


def test_windows_of_the_paper() -> None:
    assert starts(683, 512, 341) == [0, 171]
    assert starts(512, 512, 341) == [0]


def test_classes_are_those_of_all_logits_resized_at_once() -> None:
    logits = torch.randn(37, 6, 9)
    logits[20] = logits[3]
    logits[20:, :, 4] = logits[3, :, 4]  # of equal ones the first
    whole = torch.nn.functional.interpolate(logits[None], (11, 7), mode="bilinear", align_corners=False)[0]
    assert torch.equal(classes_of(logits, (11, 7)).long(), whole.argmax(0))
