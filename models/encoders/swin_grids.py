"""Token grids of a Swin's stages, and windows that divide them."""

from collections.abc import Sequence
from itertools import pairwise

from mixmae.models.encoders.staged import NUM_STAGES
from mixmae.models.layers.token_order import nearest_window


def token_grids(img_size: tuple[int, int], patch_size: int, window_size: Sequence[int]) -> list[tuple[int, int]]:
    """The token grid of each stage.

    Raises:
        ValueError: with the sizes that would fit, if cells or windows do not divide the image.
    """
    stride = patch_size * 2 ** (NUM_STAGES - 1)
    if any(side % stride for side in img_size):
        fits = [max(stride, round(side / stride) * stride) for side in img_size]
        raise ValueError(
            f"img_size {img_size[0]}x{img_size[1]} does not divide into cells of {stride} px; "
            f"the nearest that does is {fits[0]}x{fits[1]}"
        )
    if len(window_size) != NUM_STAGES:
        raise ValueError(f"window_size {tuple(window_size)} has {len(window_size)} entries; expected {NUM_STAGES}")
    if any(window < 1 for window in window_size):
        raise ValueError(f"window_size {tuple(window_size)}: expected sides greater than 0")
    grids = stage_grids(img_size, patch_size)
    if not windows_divide(window_size, grids):
        fitting = fitting_windows(grids, window_size)
        raise ValueError(
            f"img_size {img_size[0]}x{img_size[1]} gives token grids "
            f"{', '.join(f'{h}x{w}' for h, w in grids)} that do not divide by window_size "
            f"{tuple(window_size)}; leave it out, or set window_size=[{','.join(map(str, fitting))}]"
        )
    assert all(coarse[0] * 2 == fine[0] for fine, coarse in pairwise(grids))
    return grids


def windows_divide(windows: Sequence[int], grids: Sequence[tuple[int, int]]) -> bool:
    return not any(side % window for grid, window in zip(grids, windows, strict=True) for side in grid)


def stage_grids(img_size: tuple[int, int], patch_size: int) -> list[tuple[int, int]]:
    return [(img_size[0] // side, img_size[1] // side) for side in (patch_size * 2**i for i in range(NUM_STAGES))]


def fitting_windows(grids: Sequence[tuple[int, int]], window_size: Sequence[int]) -> tuple[int, ...]:
    """Windows that divide their grids: nearest to those asked for in stages 1 and 2, the largest in 3 and 4, which of a
    square image is the whole map."""
    wanted = (*window_size[:2], min(grids[2]), min(grids[3]))
    return tuple(nearest_window(grid, side) for grid, side in zip(grids, wanted, strict=True))


def require_wide_window(window: int | None, blocks: Sequence[int], grid: tuple[int, int], depth: int) -> None:
    """Raises ValueError if some blocks of stage 3 cannot have a window of their own."""
    if window is None:
        return
    if window < 1 or grid[0] % window or grid[1] % window:
        raise ValueError(
            f"wide_window {window} does not divide stage 3's token grid of {grid[0]}x{grid[1]}; "
            f"{nearest_window(grid, window)} would"
        )
    if wrong := [block for block in blocks if not 1 <= block <= depth]:
        raise ValueError(f"wide_blocks: stage 3 has no block {wrong[0]}; expected numbers from 1 to {depth}")
