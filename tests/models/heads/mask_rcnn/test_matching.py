"""Matching against torchvision's, and what is sampled."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from mixmae.models.heads.mask_rcnn.matching import BACKGROUND, NEITHER, OBJECT, match_boxes, random_order, sample_boxes
from tests.models.heads.mask_rcnn.scenes import random_boxes


@given(st.integers(0, 1000), st.sampled_from([(0.7, 0.3, True), (0.5, 0.5, False), (0.6, 0.2, False)]))
def test_matches_are_torchvisions(seed: int, rule: tuple[float, float, bool]) -> None:
    objects, boxes = random_boxes(5, seed), random_boxes(200, seed + 1)
    expected = Matcher(*rule)(box_iou(objects, boxes))
    padded = torch.cat([objects, boxes[:3]])  # what fills slots up matches nothing
    found = match_boxes(padded, torch.arange(8) < 5, boxes, *rule)
    labels = torch.where(expected >= 0, OBJECT, torch.where(expected == -1, BACKGROUND, NEITHER))
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.objects[labels == OBJECT], expected[labels == OBJECT])


def test_without_objects_all_is_background() -> None:
    found = match_boxes(torch.zeros(2, 4), torch.zeros(2, dtype=torch.bool), random_boxes(50, 0), 0.7, 0.3, True)
    assert (found.labels == BACKGROUND).all()


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 50), st.integers(0, 2**32 - 1))
def test_samples_hold_as_many_objects_as_may_be_and_background_besides(
    objects: int, background: int, neither: int, seed: int
) -> None:
    labels = torch.cat([torch.full((n,), kind) for n, kind in ((objects, 1), (background, 0), (neither, -1))])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    found = sample_boxes(labels, torch.arange(len(labels)), 64, 16, torch.tensor(seed))
    kinds = [int((found.labels == kind).sum()) for kind in (OBJECT, BACKGROUND, NEITHER)]
    expected = min(objects, 16)
    assert kinds[:2] == [expected, min(background, 64 - expected)]
    used = found.labels != NEITHER
    assert torch.equal(found.labels[used], labels[found.chosen[used]])
    assert len(found.chosen[used].unique()) == used.sum()
    assert (found.labels[:expected] == OBJECT).all(), "objects come first"


def test_each_box_is_sampled_as_often_as_the_others() -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    counts, numbers = torch.zeros(100), torch.arange(100)
    for seed in range(2000):
        counts[sample_boxes(labels, numbers, 10, 5, torch.tensor(seed * 7919)).chosen] += 1
    # Binomial: mean 200, standard deviation 13.4.
    assert counts.min() > 140
    assert counts.max() < 260


def test_what_is_sampled_does_not_depend_on_the_order_of_boxes() -> None:
    labels, numbers = torch.tensor([OBJECT, BACKGROUND] * 50), torch.arange(100)
    found = sample_boxes(labels, numbers, 20, 5, torch.tensor(3))
    other = sample_boxes(labels.flip(0), numbers.flip(0), 20, 5, torch.tensor(3))
    assert torch.equal(found.chosen, 99 - other.chosen)


def test_random_numbers_are_uniform_and_of_their_seed_alone() -> None:
    seed = torch.tensor(2**32 - 1)
    values = random_order(torch.arange(100_000), seed)
    assert values.min() >= 0
    assert values.max() < 1
    histogram = torch.histc(values, 20, 0, 1)
    assert ((histogram - 5000).square() / 5000).sum() < 60  # chi squared of 19: above with a chance of 4e-6
    assert torch.equal(random_order(torch.arange(150, 100, -1), seed), values[101:151].flip(0))
    assert not torch.equal(random_order(torch.arange(50), torch.tensor(1)), values[:50])
