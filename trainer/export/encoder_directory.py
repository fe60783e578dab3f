"""Encoder directories: `model.safetensors` and a `config.json` that `timm.create_model("local-dir:DIR")` opens.

A directory that also holds `decoder.safetensors` can start a pretraining run (`model.init` in a recipe).
"""

import json
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixmae.base.errors import UsageError
from mixmae.base.files import new_directory
from mixmae.models import MixMAE
from mixmae.models.encoders.registry import default_cfg, fit_to_model

ENCODER, DECODER, CONFIG = "model.safetensors", "decoder.safetensors", "config.json"


def write_artifact(
    out: Path,
    architecture: str,
    model_args: dict[str, Any],
    encoder: dict[str, Tensor],
    decoder: dict[str, Tensor] | None = None,
    facts: dict[str, Any] | None = None,
    normalisation: dict[str, tuple[float, ...]] | None = None,
) -> None:
    """Writes an encoder directory; it appears under its name only when complete.

    Args:
        architecture: a registered name; `model_args` are what differs from its defaults.
        encoder: the encoder's state dict, with a head if it has one.
        normalisation: mean and std of the input, if not ImageNet's.
        facts: whatever else config.json should say of where the weights come from.

    Raises:
        UsageError: `out` exists.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; name a directory that does not, or remove it")
    num_classes = encoder["head.fc.weight"].shape[0] if "head.fc.weight" in encoder else 0
    config = {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": encoder["norm.weight"].shape[0],
        "model_args": model_args,
        "pretrained_cfg": default_cfg(
            architecture, model_args.get("img_size"), num_classes=num_classes, **(normalisation or {})
        ),
        **(facts or {}),
    }
    with new_directory(out) as partial:
        save_file(_storable(encoder), partial / ENCODER, metadata={"format": "pt"})
        if decoder is not None:
            save_file(_storable(decoder), partial / DECODER, metadata={"format": "pt"})
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


def initialise(model: MixMAE, directory: Path) -> None:
    """Loads an encoder directory into `model`: the encoder, and the decoder if there is one.

    Raises:
        UsageError: no such directory, or weights that do not fit the model.
    """
    if not (directory / ENCODER).is_file():
        raise UsageError(
            f"model.init: {directory / ENCODER} does not exist; give a directory made by "
            "'mixmae export' or 'mixmae import'"
        )
    encoder = load_file(directory / ENCODER)
    weights = {name: value for name, value in encoder.items() if not name.startswith("head.")}
    _load(model.encoder, fit_to_model(weights, model.encoder), directory / ENCODER)
    if (directory / DECODER).is_file():
        _load(model.decoder, load_file(directory / DECODER), directory / DECODER)


def misfits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of weights that are missing or foreign; where there are none, of those of another shape."""
    return sorted(found.keys() ^ expected.keys()) or sorted(k for k in found if found[k].shape != expected[k].shape)


def _load(module: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    wrong = misfits(state, module.state_dict())
    if wrong:
        raise UsageError(
            f"{file} does not fit the model: {len(wrong)} weights are missing, foreign or of another shape, "
            f"the first is {wrong[0]!r}; take the sizes of its config.json into the recipe"
        )
    module.load_state_dict(state)


def _storable(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}
