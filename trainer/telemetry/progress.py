"""A logged step as one line that fits a terminal, in numbers that a person reads."""

import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta

_COUNTERS = ("skipped_steps", "replaced_samples", "retried_reads")
"""Shown only when they are not 0."""
_ELSEWHERE = ("epoch",)
"""In curves, events and metrics alone."""


class Progress:
    """Lines of the logged steps, with the time since this process began to train and the time that is left."""

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps, self._clock = total_steps, clock
        self._began = clock()
        self._first: tuple[int, float] | None = None
        """The first logged step and when it was: what came before, such as compiling, says nothing of the speed."""

    def line(self, step: int, values: Mapping[str, float]) -> str:
        """`step 150/1250  loss 0.8312  lr 1.2e-04  grad_norm 0.41  812 images/s  ...  0:02:11 elapsed  0:14:09 left`"""
        now = self._clock()
        self._first = self._first or (step, now)
        steps, seconds = step - self._first[0], now - self._first[1]
        words = [f"step {step}/{self._total_steps}", *_words(values), f"{_duration(now - self._began)} elapsed"]
        if steps > 0 and step < self._total_steps:
            words.append(f"{_duration(seconds / steps * (self._total_steps - step))} left")
        return "  ".join(words)


def _words(values: Mapping[str, float]) -> Iterator[str]:
    for name, value in values.items():
        if name == "images_per_second":
            yield f"{value:.0f} images/s" if value >= 10 else f"{value:.2g} images/s"
        elif name == "peak_memory_bytes":
            yield f"peak_memory {value / 1e9:.1f} GB" if value >= 1e9 else f"peak_memory {value / 1e6:.0f} MB"
        elif name in _COUNTERS:
            if value:
                yield f"{name} {value:.0f}"
        elif name not in _ELSEWHERE:
            yield f"{name} {plain_number(name, value)}"


def plain_number(name: str, value: float) -> str:
    """A learning rate with its power of ten, a loss with the digits that move, others with three."""
    if name == "lr":
        return f"{value:.1e}"
    if name == "loss":
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
