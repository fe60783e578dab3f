"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899): a micro-batch blended with itself in reverse order.

All that is random is drawn on the CPU into one small tensor; on the device both are one interpolation, and the host
does not wait.
"""

import math
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor


@dataclass(frozen=True)
class MixSettings:
    """How images are mixed, as timm names it.

    Attributes:
        mixup, cutmix: alpha of Beta(alpha, alpha), from which the share of an image is drawn; 0 for never.
        prob: of mixing a micro-batch at all.
        switch_prob: of CutMix where both could be used.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5

    @property
    def mixes(self) -> bool:
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)


def draw_mix(settings: MixSettings, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draws how one micro-batch is mixed: fp32 [7], for `mix_images` and `mix_targets`.

    Top, bottom, left and right of a box; the image's own weight inside the box and outside; its weight in the target,
    which for CutMix is the share of pixels that stay.

    Args:
        size: height and width of the images.
    """
    random = Random(int(torch.randint(2**63 - 1, (), generator=generator)))
    if random.random() >= settings.prob:
        return torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    if settings.cutmix > 0 and (settings.mixup <= 0 or random.random() < settings.switch_prob):
        top, bottom, left, right = _draw_box(random.betavariate(settings.cutmix, settings.cutmix), size, random)
        kept = 1 - (bottom - top) * (right - left) / (size[0] * size[1])
        return torch.tensor([top, bottom, left, right, 0.0, 1.0, kept])
    kept = random.betavariate(settings.mixup, settings.mixup)
    return torch.tensor([0.0, 0.0, 0.0, 0.0, kept, kept, kept])


def _draw_box(kept: float, size: tuple[int, int], random: Random) -> tuple[int, int, int, int]:
    """A box of `1 - kept` of the area around a random point, cut off at the image's border."""
    edges = []
    for side in size:
        half, middle = int(side * math.sqrt(1 - kept)) // 2, int(random.random() * side)
        edges += [max(0, middle - half), min(side, middle + half)]
    return edges[0], edges[1], edges[2], edges[3]


def mix_images(images: Tensor, mix: Tensor) -> Tensor:
    """Images [B, 3, H, W], each blended with the one at its place from the end."""
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    inside = ((rows >= mix[0]) & (rows < mix[1]))[:, None] & ((columns >= mix[2]) & (columns < mix[3]))
    return torch.lerp(images.flip(0), images, torch.where(inside, mix[4], mix[5]))


def mix_targets(targets: Tensor, mix: Tensor) -> Tensor:
    """Soft targets [B, classes] of the images that `mix_images` gives."""
    return torch.lerp(targets.flip(0), targets, mix[6])
