"""What stands in an input where an image is masked, other than another image: MixMAE's ablations (Table 9).

Shapes: groups int64 [Gh, Gw] or [B, Gh, Gw], as in `mixmae.models.methods.mixing`; b is 1 or B accordingly, L = Gh*Gw.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ZOOM_AREA = (0.2, 0.6)
"""Of the image, which a zoomed-in crop shows. Published nowhere: this project's own choice."""


def draw_hidden(groups: Tensor, sizes: list[int], ratio: float, generator: torch.Generator) -> Tensor:
    """bool, of the groups' shape: so many cells of each group that a mask token replaces, uniformly drawn.

    Args:
        sizes: cells of each group.
        ratio: share of a group's cells, rounded.
    """
    runs = _in_runs(groups, generator)
    hidden = torch.cat([torch.arange(size) < num_hidden(size, ratio) for size in sizes])
    return torch.zeros_like(runs, dtype=torch.bool).scatter(1, runs, hidden.expand_as(runs)).view(groups.shape)


def num_hidden(size: int, ratio: float) -> int:
    """Cells of a group of `size` that a mask token replaces."""
    return round(size * ratio)


def draw_shuffle(groups: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [b, L]: the cell that comes to each cell's place; those of group 1 change places among each other."""
    runs, flat = _in_runs(groups, generator), groups.view(-1, groups.shape[-2] * groups.shape[-1])
    number = int((flat[0] == 1).sum())
    targets = flat.argsort(dim=1, stable=True)[:, -number:]
    return torch.arange(flat.shape[1]).repeat(len(flat), 1).scatter(1, targets, runs[:, -number:])


def _in_runs(groups: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [b, L]: cells of group 0, then of group 1, ..., each in a random order."""
    flat = groups.view(-1, groups.shape[-2] * groups.shape[-1])
    shuffled = torch.rand(flat.shape, generator=generator).argsort(dim=1)
    return shuffled.gather(1, flat.gather(1, shuffled).argsort(dim=1, stable=True))


def move_cells(images: Tensor, source: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images [B, C, H, W] in which cell p shows what cell source[.., p] did, for `source` [b, L]."""
    batch, channels, height, width = images.shape
    cells = images.view(batch, channels, grid[0], height // grid[0], grid[1], width // grid[1])
    cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    moved = cells[torch.arange(batch, device=images.device)[:, None], source]
    return moved.unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def draw_crops(batch: int, generator: torch.Generator) -> Tensor:
    """fp32 [B, 2, 3]: for `affine_grid`, crops of the image's own shape and a random share of its area."""
    low, high = ZOOM_AREA
    side = (low + (high - low) * torch.rand(batch, generator=generator)).sqrt()
    centre = (2 * torch.rand(batch, 2, generator=generator) - 1) * (1 - side)[:, None]
    return torch.cat([torch.diag_embed(side[:, None].expand(-1, 2)), centre[..., None]], dim=2)


def zoom_in(images: Tensor, crops: Tensor) -> Tensor:
    """The crops at the images' size (bilinear)."""
    places = F.affine_grid(crops, list(images.shape), align_corners=False)
    return F.grid_sample(images, places, padding_mode="border", align_corners=False)
