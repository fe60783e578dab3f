"""What is learned: mixing, encoders, decoder and loss. Importing it registers the encoders with timm."""

from models.mixmae import MixMAE
from models.registry import build_encoder

__all__ = ["MixMAE", "build_encoder"]
