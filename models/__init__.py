"""What is learned: mixing, encoders, decoder and loss. Importing it registers the encoders with timm."""

from mixmae.models.encoders.registry import create_encoder
from mixmae.models.methods.mixmae import MixMAE

__all__ = ["MixMAE", "create_encoder"]
