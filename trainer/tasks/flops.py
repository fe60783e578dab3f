"""Operations that a model takes, and that a device can do."""

import re

import torch
from torch.utils.flop_counter import FlopCounterMode

from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.registry import task_of

PEAKS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "V100": 112e12,
    "RTX A6000": 154.8e12,
    "RTX 6000 Ada": 364e12,
    "RTX 3080": 59.5e12,
    "RTX 3090": 71e12,
    "RTX 4080": 97.5e12,
    "RTX 4090": 165.2e12,
    "RTX 5080": 112.6e12,
    "RTX 5090": 209.5e12,
}
"""Dense bf16 operations per second, summed in fp32, by a part of the device's name (V100: fp16); from the data sheets,
of GeForce from the white papers of their architectures (GA102, Ada, RTX Blackwell)."""
_OTHER_PRODUCT = r"(?!\w)(?! (?:Ti|SUPER|D|Laptop|Max-Q)\b)"
"""Behind a part: what makes another product of it, with other figures."""


def model_flops(recipe: Recipe) -> float:
    """Operations of one image's forward and backward pass, decoder or head included, without recomputation.

    The forward pass is counted on the meta device; the backward one takes twice as many. Counted is what published
    figures count (`Trainable.as_counted`), and not how it is computed here: computing less makes no model smaller.
    """
    task = task_of(recipe)
    with torch.device("meta"):
        model = task.build().as_counted()
    count = model.min_batch
    inputs = [tensor.to("meta") for tensor in task.example_inputs(model, count)]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.empty(count, *recipe.image_shape), *inputs)
    return 3 * counter.get_total_flops() / count


def peak_flops(recipe: Recipe, device: torch.device) -> float | None:
    """What a device can do in a second; None where nobody knows."""
    if recipe.monitoring.peak_flops is not None or device.type != "cuda":
        return recipe.monitoring.peak_flops
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(device_name: str) -> float | None:
    """bf16 operations per second of a device by the name that CUDA has for it; None for one that is not listed."""
    return next((peak for part, peak in PEAKS.items() if re.search(part + _OTHER_PRODUCT, device_name)), None)
