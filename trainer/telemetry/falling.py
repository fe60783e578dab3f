"""For how long a figure of an evaluation has been well below its highest, whatever restarts lie between."""

import math
from collections.abc import Iterable, Mapping

_FALL = 0.1
"""Of the highest value: a probe on a thousand images is known to two or three hundredths."""


class FallingFigures:
    """Counts evaluations in a row in which a figure was more than a tenth below its highest so far.

    Args:
        history: the figures of earlier evaluations, oldest first; None for those that were not finite.
    """

    def __init__(self, history: Iterable[Mapping[str, float | None]] = ()) -> None:
        self._highest: dict[str, float] = {}
        self._below: dict[str, int] = {}
        for figures in history:
            self.add({name: math.nan if value is None else value for name, value in figures.items()})

    def add(self, figures: Mapping[str, float]) -> dict[str, int]:
        """Counts one more evaluation; returns, for its figures, how many in a row were below."""
        for name, value in figures.items():
            highest = max(self._highest.get(name, -math.inf), value) if math.isfinite(value) else None
            if highest is not None:
                self._highest[name] = highest
            below = not value >= self._highest.get(name, -math.inf) * (1 - _FALL)
            self._below[name] = self._below.get(name, 0) + 1 if below else 0
        return {name: self._below[name] for name in figures}
