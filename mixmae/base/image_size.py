"""Sizes of images in pixels."""

ImageSize = int | tuple[int, int]
"""The side of a square, or (height, width)."""


def both_sides(size: ImageSize) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def shown_size(size: ImageSize) -> str:
    """`224`, or `192x320`: height, then width."""
    return str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}"
