"""mIoU, the classes' own IoU, and pixel accuracy, of counts of pixels over a whole set of images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mixmae.models.heads.upernet import IGNORED


def count_pixels(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """int64 [3, classes] of one image, without its ignored pixels: rightly predicted, predicted, and labelled so.

    Args:
        predicted, labels: uint8 [H, W].
    """
    judged = labels != IGNORED
    predicted, labels = predicted[judged].long(), labels[judged].long()
    right = labels[predicted == labels]
    return torch.stack([torch.bincount(part, minlength=num_classes) for part in (right, predicted, labels)])


def figures(counts: Tensor, names: Sequence[str]) -> dict[str, float]:
    """`miou`, `pixel_accuracy`, `mean_accuracy`, and `iou/NAME` of each class that occurs.

    A class that no image has, and that was predicted nowhere, is left out of the means, as mmsegmentation does it.

    Args:
        counts: sums of `count_pixels`, of one pixel at least that is not ignored.
        names: of the classes.
    """
    right, predicted, labelled = counts.double().cpu()
    assert labelled.any(), "a pixel to be judged"
    iou, accuracy = right / (predicted + labelled - right), right / labelled
    each = {f"iou/{name}": float(value) for name, value in zip(names, iou, strict=True) if not value.isnan()}
    return {
        "miou": float(iou.nanmean()),
        "pixel_accuracy": float(right.sum() / labelled.sum()),
        "mean_accuracy": float(accuracy.nanmean()),
        **each,
    }
