"""Weights of RGB images for an encoder of another number of channels."""

import logging

from timm.models import adapt_input_conv
from torch import Tensor

from mixmae.models.encoders.contract import Encoder

_logger = logging.getLogger(__name__)


def has_channels(encoder: Encoder, weights: dict[str, Tensor]) -> bool:
    """Whether weights are of as many channels; a decoder of others has to begin anew."""
    first = weights.get(f"{encoder.first_conv}.weight")
    if first is None or first.shape[1] == encoder.in_chans:
        return True
    _logger.warning("the weights are of %d channels: the method's own part begins anew", first.shape[1])
    return False


def fit_channels(encoder: Encoder, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of RGB images for an encoder of another number of channels, as timm makes them: their sum for one
    channel, else repeated, and scaled so that outputs keep their size. Other weights stay.

    Raises:
        ValueError: weights of other channels than 3 and the encoder's.
    """
    name = f"{encoder.first_conv}.weight"
    first = weights.get(name)
    if first is None or first.dim() != 4 or first.shape[1] == encoder.in_chans:
        return weights
    if first.shape[1] != 3:
        raise ValueError(
            f"weights are of images of {first.shape[1]} channels, and data.channels={encoder.in_chans}; expected "
            f"{first.shape[1]}, or weights of RGB images"
        )
    _logger.warning("the first convolution's weights are of RGB images: made into %d channels", encoder.in_chans)
    return {**weights, name: adapt_input_conv(encoder.in_chans, first)}
