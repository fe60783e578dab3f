"""Operations that a model takes, and that a device can do."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import Recipe
from trainer.engine import build_model

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

    The backward pass takes twice as many as the forward one.
    """
    return 3 * sum(forward_flops(recipe).values())


def forward_flops(recipe: Recipe) -> dict[int | str, float]:
    """Operations of one image's forward pass, counted on the meta device.

    By the blocks of stages 1 to 4 and of the `decoder` (the keys of `activation_checkpointing.stages`), and the `rest`.
    """
    count = recipe.model.num_images
    side = recipe.model.img_size
    with torch.device("meta"):
        model = build_model(recipe)
        images = torch.empty(count, 3, side, side)
        groups, partners = torch.zeros(model.grid).long(), torch.zeros(count, count).long()
        with FlopCounterMode(display=False) as counter:
            model(images, groups, partners)
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    blocks: dict[int | str, str] = {stage: f"MixMAE.encoder.stages.{stage - 1}.blocks" for stage in (1, 2, 3, 4)}
    blocks["decoder"] = "MixMAE.decoder.blocks"
    flops = {
        part: sum(number for name, number in by_module.items() if name.rpartition(".")[0] == path) / count
        for part, path in blocks.items()
    }
    return {**flops, "rest": counter.get_total_flops() / count - sum(flops.values())}


def peak_flops(recipe: Recipe, device: torch.device) -> float | None:
    """What a device can do in a second; None where nobody knows."""
    if recipe.monitoring.peak_flops is not None or device.type != "cuda":
        return recipe.monitoring.peak_flops
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
