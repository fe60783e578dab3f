"""Encoder directories: `model.safetensors` and a `config.json` that `timm.create_model("local-dir:DIR")` opens.

A directory that also holds `method.safetensors`, the rest of what was pretrained, lets a run of the same method go on
from there (`encoder.init` in a recipe).
"""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mixmae.base.errors import UsageError
from mixmae.base.files import new_directory
from mixmae.models.encoders.registry import create_encoder, default_cfg

ENCODER, METHOD, CONFIG = "model.safetensors", "method.safetensors", "config.json"


def write_encoder_directory(
    out: Path,
    architecture: str,
    model_args: dict[str, Any],
    encoder: dict[str, Tensor],
    method: tuple[str, dict[str, Tensor]] | None = None,
    facts: dict[str, Any] | None = None,
    input_facts: dict[str, Any] | None = None,
) -> None:
    """Writes an encoder directory; it appears under its name only when complete.

    Args:
        architecture: a registered name; `model_args` are what differs from its defaults.
        encoder: the encoder's state dict, with a head if it has one.
        method: the name of the method that pretrained it, and the weights that it has beside the encoder.
        input_facts: what timm's pretrained_cfg should say otherwise than usual: mean, std, crop_pct, label_names.
        facts: whatever else config.json should say of where the weights come from.

    Raises:
        UsageError: `out` exists.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; name a directory that does not, or remove it")
    num_classes = encoder["head.fc.weight"].shape[0] if "head.fc.weight" in encoder else 0
    with torch.device("meta"):
        num_features = create_encoder(architecture, **model_args).num_features
    config = {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": num_features,
        "model_args": model_args,
        "pretrained_cfg": default_cfg(
            architecture, model_args.get("img_size"), num_classes=num_classes, **(input_facts or {})
        ),
        **({} if method is None else {"method": method[0]}),
        **(facts or {}),
    }
    with new_directory(out) as partial:
        save_file(_storable(encoder), partial / ENCODER, metadata={"format": "pt"})
        if method is not None:
            save_file(_storable(method[1]), partial / METHOD, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_encoder(directory: str | Path, pretrained: bool = True, **options: Any) -> nn.Module:
    """An encoder directory as a timm model.

    Args:
        pretrained: False for the same architecture with random weights.
        options: those of `timm.create_model`, such as num_classes=10 or features_only=True.

    Raises:
        UsageError: not an encoder directory.
    """
    if not (Path(directory) / CONFIG).is_file():
        raise UsageError(f"{directory} is not an encoder directory: it has no {CONFIG}; make one with 'mixmae export'")
    model: nn.Module = timm.create_model(f"local-dir:{directory}", pretrained=pretrained, **options)
    return model


def misfits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of weights that are missing or foreign; where there are none, of those of another shape."""
    return sorted(found.keys() ^ expected.keys()) or sorted(k for k in found if found[k].shape != expected[k].shape)


def _storable(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}
