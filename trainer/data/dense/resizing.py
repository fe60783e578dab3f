"""Sizes to which whole images are resized, keeping their aspect."""

MAX_ASPECT = 4
"""The longer side over what the shorter one should be, at most: (2048, 512) in recipes for ADE20K."""


def fit(height: int, width: int, longest: float, shortest: float | None = None) -> tuple[int, int]:
    """Height and width of the largest image whose sides do not exceed two lengths.

    Args:
        longest: of the longer side.
        shortest: of the shorter side; None: the longer one alone decides.
    """
    factor = longest / max(height, width)
    if shortest is not None:
        factor = min(factor, shortest / min(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))
