"""IoU against counting pixel by pixel in numpy, and scikit-learn's Jaccard index."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, jaccard_score

from mixmae.trainer.evaluation.intersection_over_union import count_pixels, figures

CLASSES = 6


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, CLASSES))
def test_figures_of_several_images(seed: int, images: int, present: int) -> None:
    random = np.random.default_rng(seed)
    counts, pairs = torch.zeros(3, CLASSES, dtype=torch.int64), []
    for _ in range(images):
        labels, predicted = random.integers(0, present, (2, 5, 7))
        labels[random.random((5, 7)) < 0.3] = 255
        labels[0, 0] = 0
        counts += count_pixels(torch.tensor(predicted).byte(), torch.tensor(labels).byte(), CLASSES)
        pairs += [(label, guess) for label, guess in zip(labels.flat, predicted.flat, strict=True) if label != 255]
    found = figures(counts, [f"class {number}" for number in range(CLASSES)])
    expected = {}
    for number in range(CLASSES):
        both = sum(label == guess == number for label, guess in pairs)
        either = sum(number in pair for pair in pairs)
        if either:
            expected[f"iou/class {number}"] = both / either
    true, guessed = zip(*pairs, strict=True)
    assert {name: value for name, value in found.items() if "/" in name} == pytest.approx(expected)
    assert found["miou"] == pytest.approx(float(np.mean(list(expected.values()))))
    assert found["miou"] == pytest.approx(float(jaccard_score(true, guessed, average="macro")))
    assert found["pixel_accuracy"] == pytest.approx(float(accuracy_score(true, guessed)))
    assert 0 <= found["mean_accuracy"] <= 1


def test_a_class_that_does_not_occur_is_left_out() -> None:
    predicted, labels = torch.tensor([[0, 0, 1, 2]]).byte(), torch.tensor([[0, 1, 1, 255]]).byte()
    found = figures(count_pixels(predicted, labels, 4), "abcd")
    assert found == {
        "miou": 0.5,
        "pixel_accuracy": pytest.approx(2 / 3),
        "mean_accuracy": 0.75,
        "iou/a": 0.5,
        "iou/b": 0.5,
    }
