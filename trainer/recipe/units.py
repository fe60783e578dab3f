"""Lengths of training and sizes of files, as recipes and commands write them."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

_LONGEST = 1e15
"""More than any training has of anything, and exact in a float."""
_DURATION = re.compile(r"(\d+(?:\.\d*)?(?:e\+?\d+)?) (step|epoch|sample)s?")


@dataclass(frozen=True)
class Span:
    """A stretch of training: `40 epochs`, `1000 steps`, `5e6 samples`."""

    amount: float
    unit: Literal["step", "epoch", "sample"]

    def steps(self, epoch_samples: int, global_batch: int) -> int:
        """Whole optimizer steps, rounded to the nearest."""
        if self.unit == "step":
            return round(self.amount)
        samples = self.amount * (epoch_samples if self.unit == "epoch" else 1)
        return round(samples / global_batch)

    def __str__(self) -> str:
        amount = int(self.amount) if float(self.amount).is_integer() else self.amount
        return f"{amount} {self.unit}{'' if amount == 1 else 's'}"


def _parse_span(value: object) -> object:
    if isinstance(value, Span):
        return value
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("expected an amount and a unit, such as '40 epochs', '1000 steps' or '5e6 samples'")
    amount = float(match[1])
    if amount > _LONGEST:
        raise ValueError(f"expected {_LONGEST:.0e} at most")
    return Span(amount, match[2])  # type: ignore[arg-type]


Duration = Annotated[Span, BeforeValidator(_parse_span), PlainSerializer(str)]


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(value: object) -> object:
    """`500MB`, `1G` or plain bytes to bytes.

    Raises:
        ValueError: text that is not a size.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)\s*([KMGT]?)B?", value.strip().upper())
    if match is None:
        raise ValueError("expected a number of bytes, such as 500MB or 1GB")
    return int(Fraction(match[1]) * _UNITS[match[2]])


Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0, le=2**60)]
