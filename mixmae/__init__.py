"""Pretraining of hierarchical vision backbones. Importing this package registers its encoders with timm.

import mixmae, timm

encoder = timm.create_model("mixmae_swin_base_w14", num_classes=0)
backbone = mixmae.load_encoder("photos-encoder", features_only=True)
"""

import importlib
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

if TYPE_CHECKING:
    from mixmae.models.encoders.registry import create_encoder as create_encoder
    from mixmae.trainer.export.encoder_directory import load_encoder as load_encoder

_LAZY = {
    "create_encoder": "mixmae.models.encoders.registry",
    "load_encoder": "mixmae.trainer.export.encoder_directory",
}


@when_imported("timm")
def _register_encoders(_: Any) -> None:
    """At once where timm is imported already, else with it: login nodes run `mixmae` without torch."""
    importlib.import_module("mixmae.models")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mixmae' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
