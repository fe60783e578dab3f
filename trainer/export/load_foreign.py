"""Others' weights into an encoder: a table of what became of each, or one line on why they do not fit."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.base.rank_env import read_rank_env
from mixmae.models.encoders.contract import Encoder
from mixmae.models.encoders.registry import ENCODERS, create_encoder
from mixmae.trainer.export.encoder_directory import MISFIT, first_line, misfits, own_weights
from mixmae.trainer.export.fit_channels import fit_channels
from mixmae.trainer.export.foreign_weights import ForeignWeights

_logger = logging.getLogger(__name__)
_MAY_BE_MISSING = ("norm.",)
"""The final norm, which models for dense tasks, or of pooled features, do not have or have elsewhere."""
_SHOWN = 4
"""Names of what was left out or is missing."""


class Loaded(NamedTuple):
    """Names of the encoder's weights, and, of those left out, of the source's.

    Attributes:
        resized: what became of them, such as `relative_position_bias_table 169x4 -> 729x4`.
    """

    loaded: list[str]
    resized: list[str]
    left_out: list[str]
    missing: list[str]


def load_foreign_weights(encoder: Encoder, found: ForeignWeights, not_wanted: tuple[str, ...]) -> Loaded:
    """Loads them, and logs a table of what became of each.

    Args:
        not_wanted: beginnings of names that the task has no use for, such as a head.

    Raises:
        UsageError: weights of another family or size.
    """
    converted = encoder.convert(found.state)
    fitted = _fit(encoder, found, not_wanted)
    own = own_weights(encoder, not_wanted)
    missing = sorted(own.keys() - fitted.keys())
    if wrong := _misfits(fitted, own):
        raise UsageError(_refusal(encoder, found, fitted, own, wrong, not_wanted))
    encoder.load_state_dict(fitted, strict=False)
    resized = Counter(
        f"{name.rsplit('.', 1)[-1] if 'table' in name else name} {_shape(converted.state[name])} -> {_shape(value)}"
        for name, value in fitted.items()
        if value.shape != converted.state[name].shape
    )
    heads = [name for name in converted.state if name.startswith(not_wanted)]
    result = Loaded(
        sorted(fitted),
        [f"{count} x {what}" for what, count in resized.items()],
        [*converted.left_out, *found.left_out, *heads],
        missing,
    )
    if read_rank_env(os.environ).is_main:
        for line in describe(found, result):
            _logger.info(line)
    return result


def describe(found: ForeignWeights, result: Loaded) -> Iterator[str]:
    """The table, line by line."""
    yield f"encoder.init: {found.source}{f', {found.note}' if found.note else ''}"
    yield f"  loaded    {len(result.loaded):4}  {', '.join(_parts(result.loaded))}"
    yield f"  resized   {sum(int(each.split()[0]) for each in result.resized):4}  {', '.join(result.resized)}".rstrip()
    yield f"  left out  {len(result.left_out):4}  {_some(result.left_out)}".rstrip()
    yield f"  missing   {len(result.missing):4}  {_some(result.missing)}{', as new' if result.missing else ''}".rstrip()


def _fit(encoder: Encoder, found: ForeignWeights, not_wanted: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        fitted = fit_channels(encoder, encoder.fit_state_dict(found.state))
    except MISFIT as error:
        raise UsageError(f"{found.source} does not fit {type(encoder).__name__}: {first_line(error)}") from error
    return {name: value for name, value in fitted.items() if not name.startswith(not_wanted)}


def _misfits(fitted: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    optional = {name for name in own if name.startswith(_MAY_BE_MISSING)}
    return misfits(fitted, {name: value for name, value in own.items() if name in fitted or name not in optional})


def _refusal(
    encoder: Encoder,
    found: ForeignWeights,
    fitted: dict[str, Tensor],
    own: dict[str, Tensor],
    wrong: list[str],
    not_wanted: tuple[str, ...],
) -> str:
    name, family = wrong[0], type(encoder).__name__
    if fitting := _fitting_name(encoder, found, not_wanted):
        change = f"they fit encoder.name={fitting}"
    else:
        change = f"take weights of a {family} of the encoder's sizes, or the encoder's sizes from them"
    if name in fitted and name in own:
        how = f"{name} is {_shape(fitted[name])} there, and {_shape(own[name])} here"
    else:
        how = f"{len(wrong)} weights are missing or foreign, the first is {name!r}"
    return f"{found.source} does not fit this {family}: {how}; {change}"


def _fitting_name(encoder: Encoder, found: ForeignWeights, not_wanted: tuple[str, ...]) -> str | None:
    """A registered encoder of the same family that takes these weights."""
    for name, (family, _) in ENCODERS.items():
        if family is not type(encoder):
            continue
        try:
            with torch.device("meta"):
                other = create_encoder(name)
                state = other.fit_state_dict({key: value.to("meta") for key, value in found.state.items()})
        except MISFIT:
            continue
        if not _misfits(
            {k: v for k, v in state.items() if not k.startswith(not_wanted)}, own_weights(other, not_wanted)
        ):
            return name
    return None


def _parts(names: list[str]) -> list[str]:
    """`patch_embed`, `stages.0`, ..., in the order of names."""
    parts = ((".".join(name.split(".")[:2]) if name.startswith("stages.") else name.split(".")[0]) for name in names)
    return list(dict.fromkeys(parts))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape))
