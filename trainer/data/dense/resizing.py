"""Sizes to which whole images are resized, keeping their aspect."""

Sides = tuple[float, float]
"""Height and width."""

MAX_ASPECT = 4
"""The longer side over the window's longer one, at most: (2048, 512) in recipes for ADE20K."""


def fit_into(height: int, width: int, window: Sides) -> tuple[int, int]:
    """Height and width of the largest image that fits into a window: of a square the longer side decides."""
    return _times(height, width, min(window[0] / height, window[1] / width))


def fit_over(height: int, width: int, window: Sides) -> tuple[int, int]:
    """Height and width of the smallest image that covers a window, `MAX_ASPECT` times as long as it at most: of a
    square the shorter side decides."""
    most = MAX_ASPECT * max(window) / max(height, width)
    return _times(height, width, min(most, max(window[0] / height, window[1] / width)))


def _times(height: int, width: int, factor: float) -> tuple[int, int]:
    return max(1, round(height * factor)), max(1, round(width * factor))
