"""Mixing of K images into one input, cell by cell (MixMAE section 3.2, equation 1).

Shapes, once for the whole package:
    B   images in a micro-batch            K   images mixed into one input, 2..5
    Gh, Gw   the cell grid, one cell for each position of the encoder's last stage
    groups   int64 [Gh, Gw] (one map for the micro-batch) or [B, Gh, Gw] (one per sample); values 0..K-1
    partners int64 [K, B]; partners[k, i] is the image that fills group k of mixed input i
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Mix(NamedTuple):
    """How one micro-batch is mixed; see the module's head for shapes."""

    groups: Tensor
    partners: Tensor

    def to(self, device: torch.device) -> "Mix":
        return Mix(self.groups.to(device, non_blocking=True), self.partners.to(device, non_blocking=True))


def draw_mix(
    batch: int, num_images: int, grid: tuple[int, int], generator: torch.Generator, per_sample: bool = False
) -> Mix:
    """Draws group maps and partners for a micro-batch; all randomness comes from `generator`.

    The cells are split into `num_images` parts as equal as possible; the lower groups get the cells left over, so a
    group's size depends on K and the grid alone. Partners are shifts along one random cycle through the batch: every
    row is a permutation and no input holds the same image twice.

    Raises:
        ValueError: K is not in 2..5, or the micro-batch or the grid is smaller than K.
    """
    check_num_images(num_images, grid)
    if batch < num_images:
        raise ValueError(
            f"a micro-batch of {batch} cannot mix {num_images} different images; raise micro_batch to "
            f"{num_images} or more, or lower num_images"
        )
    return Mix(
        draw_groups(batch if per_sample else None, num_images, grid, generator),
        _draw_partners(batch, num_images, generator),
    )


def check_num_images(num_images: int, grid: tuple[int, int]) -> None:
    """Raises ValueError unless K is in 2..5 and the grid has a cell for each image."""
    if not 2 <= num_images <= 5:
        raise ValueError(f"num_images is {num_images}; expected 2 to 5")
    if grid[0] * grid[1] < num_images:
        raise ValueError(f"a grid of {grid[0]}x{grid[1]} cells has no room for {num_images} images; raise img_size")


def group_sizes(num_images: int, cells: int) -> list[int]:
    """Cells of each group, as `draw_mix` splits them; larger groups come first."""
    return [cells // num_images + (group < cells % num_images) for group in range(num_images)]


def draw_groups(batch: int | None, num_images: int, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Random groups [Gh, Gw], or [batch, Gh, Gw], of the sizes that `group_sizes` says."""
    cells = grid[0] * grid[1]
    even_split = torch.arange(cells) % num_images
    if batch is None:
        return even_split[torch.randperm(cells, generator=generator)].view(grid)
    order = torch.rand(batch, cells, generator=generator).argsort(dim=1)
    return even_split[order].view(batch, *grid)


def _draw_partners(batch: int, num_images: int, generator: torch.Generator) -> Tensor:
    cycle = torch.randperm(batch, generator=generator)
    place = cycle.argsort()
    shifts = 1 + torch.randperm(batch - 1, generator=generator)[: num_images - 1]
    shifts = torch.cat([torch.zeros(1, dtype=torch.int64), shifts])
    return cycle[(place[None] + shifts[:, None]) % batch]


def mix_images(images: Tensor, groups: Tensor, partners: Tensor) -> Tensor:
    """Mixed inputs [B, C, H, W]: cell p of input i is cell p of images[partners[groups[p], i]].

    Mixing pixels equals mixing tokens behind a patch embedding that does not overlap, and moves fewer bytes.
    """
    batch, channels, height, width = images.shape
    grid_h, grid_w = groups.shape[-2:]
    cells = images.view(batch, channels, grid_h, height // grid_h, grid_w, width // grid_w)
    device = images.device
    source = partners[groups.expand(batch, grid_h, grid_w), torch.arange(batch, device=device)[:, None, None]]
    rows = torch.arange(grid_h, device=device)[:, None]
    cols = torch.arange(grid_w, device=device)
    mixed = cells.permute(0, 2, 4, 1, 3, 5)[source, rows, cols]
    return mixed.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def upsample_groups(groups: Tensor, grid: tuple[int, int]) -> Tensor:
    """The group map [..., Gh, Gw] at a finer token grid [..., *grid], by nearest neighbour."""
    rows, cols = grid[0] // groups.shape[-2], grid[1] // groups.shape[-1]
    return groups.repeat_interleave(rows, dim=-2).repeat_interleave(cols, dim=-1)
