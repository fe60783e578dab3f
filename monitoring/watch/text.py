"""Text for terminals of any width: charts, durations, sizes."""

import math
import time
from collections.abc import Sequence

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
NOT_FINITE = "x"
_FAR = 1e11
"""Largest timestamp to format, in seconds since 1970."""


def chart(values: Sequence[float], width: int, rows: int = 1, blocks: str = BLOCKS) -> list[str]:
    """Draws values from left to right as `rows` lines of at most `width` cells; a cell is the mean of its values."""
    cells = min(width, len(values))
    means = [_mean(values[i * len(values) // cells : (i + 1) * len(values) // cells]) for i in range(cells)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, span = min(finite, default=0.0), max(finite, default=0.0) / 2 - min(finite, default=0.0) / 2
    levels = [_level(mean, low, span, rows * len(blocks)) for mean in means]
    return ["".join(_cell(level, row, blocks) for level in levels) for row in reversed(range(rows))]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(value / len(finite) for value in finite) if finite else math.nan


def _level(value: float, low: float, span: float, levels: int) -> int | None:
    """1 to `levels`; computed with halves, because differences of large floats may overflow."""
    if not math.isfinite(value):
        return None
    return 1 + round((levels - 1) * ((value / 2 - low / 2) / span)) if span > 0 else (levels + 1) // 2


def _cell(level: int | None, row: int, blocks: str) -> str:
    if level is None:
        return NOT_FINITE if row == 0 else " "
    filled = min(len(blocks), level - row * len(blocks))
    return blocks[filled - 1] if filled > 0 else " "


def wrap_items(words: Sequence[str], width: int) -> list[str]:
    """Joins items to as few lines as possible, without splitting any."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 3 + len(word) <= width:
            lines[-1] += "   " + word
        else:
            lines.append(word)
    return lines


def sanitize(text: str) -> str:
    """Untrusted text on one line, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def amount(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def size(count: float) -> str:
    return "-" if not count > 0 else f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Seconds in at most two units; negative durations, from clock skew, are 0."""
    if not math.isfinite(seconds):
        return "-"
    whole = round(max(0.0, seconds))
    if whole < 90:
        return f"{whole} s"
    hours, minutes = divmod(round(whole / 60), 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def clock(when: float, now: float) -> str:
    """Local time, with the date unless it is today."""
    if not abs(when) < _FAR:
        return "-"
    there, here = time.localtime(when), time.localtime(now)
    same_day = there[:3] == here[:3]
    near = abs(when - now) < 6 * 86400
    return time.strftime("%H:%M" if same_day else "%a %H:%M" if near else "%d %b %Y", there)
