"""Operations that a model takes, and that a device can do."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from mixmae.trainer.engine.engine import build_model
from mixmae.trainer.recipe.schema import Recipe

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "V100": 112e12,
}
"""Dense bf16 operations per second by a part of the device's name (V100: fp16), from the data sheets."""


def model_flops(recipe: Recipe) -> float:
    """Operations of one image's forward and backward pass, decoder included, without recomputation.

    The forward pass is counted on the meta device; the backward one takes twice as many. Counted is the method, where
    all tokens of a window see each other, as published figures do, and not how its attention is computed here: keeping
    groups apart by computing less gains speed, and does not make the model smaller.
    """
    count = recipe.model.num_images
    side = recipe.model.img_size
    with torch.device("meta"):
        model = build_model(recipe)
        model.separate_groups = False
        images = torch.empty(count, 3, side, side)
        groups, partners = torch.zeros(model.grid).long(), torch.zeros(count, count).long()
        with FlopCounterMode(display=False) as counter:
            model(images, groups, partners)
    return 3 * counter.get_total_flops() / count


def peak_flops(recipe: Recipe, device: torch.device) -> float | None:
    """What a device can do in a second; None where nobody knows."""
    if recipe.monitoring.peak_flops is not None or device.type != "cuda":
        return recipe.monitoring.peak_flops
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
