"""What is learned: encoders, methods and their parts. Importing it registers the encoders with timm."""

from mixmae.models.encoders import pvt, resnet, swin, twins, vit
from mixmae.models.encoders.registry import create_encoder
from mixmae.models.methods.distill import MixMAEDistill
from mixmae.models.methods.mae import MAE
from mixmae.models.methods.mixmae import MixMAE
from mixmae.models.methods.refine import Refine
from mixmae.models.methods.simmim import SimMIM

__all__ = [
    "MAE",
    "MixMAE",
    "MixMAEDistill",
    "Refine",
    "SimMIM",
    "create_encoder",
    "pvt",
    "resnet",
    "swin",
    "twins",
    "vit",
]
