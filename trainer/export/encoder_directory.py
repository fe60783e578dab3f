"""Encoder directories: `model.safetensors` and a `config.json` that `timm.create_model("local-dir:DIR")` opens.

A directory that also holds `method.safetensors`, the rest of what was pretrained, lets a run of the same method go on
from there (`encoder.init` in a recipe).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixmae.base.errors import UsageError
from mixmae.base.files import new_directory, what_is
from mixmae.base.json_text import parse_json
from mixmae.models.encoders.registry import create_encoder, default_cfg, family_of
from mixmae.trainer.recipe.components import check_settings
from mixmae.trainer.recipe.sections.data import Data
from mixmae.trainer.recipe.sections.pixels import PixelFormat
from mixmae.trainer.recipe.sections.section import Deviation
from mixmae.trainer.recipe.words import explain

ENCODER, METHOD, CONFIG, CARD = "model.safetensors", "method.safetensors", "config.json", "README.md"
_NOT_SIZES = ("self", "num_classes", "global_pool")
MISFIT = (ValueError, ArithmeticError, IndexError, RuntimeError)
"""What timm and torch raise for sizes, names and shapes that do not fit each other."""
_Side = Annotated[int, Field(gt=0, le=4096)]


def write_encoder_directory(
    out: Path,
    architecture: str,
    model_args: dict[str, Any],
    encoder: dict[str, Tensor],
    method: tuple[str, dict[str, Tensor]] | None = None,
    facts: dict[str, Any] | None = None,
    input_facts: dict[str, Any] | None = None,
    card: str | None = None,
    extend: Callable[[Path], None] | None = None,
) -> None:
    """Writes an encoder directory; it appears under its name only when complete.

    Args:
        architecture: a registered name; `model_args` are what differs from its defaults.
        encoder: the encoder's state dict, with a head if it has one.
        method: the name of the method that pretrained it, and the weights that it has beside the encoder.
        input_facts: what timm's pretrained_cfg should say otherwise than usual: mean, std, crop_pct, label_names.
        facts: whatever else config.json should say of where the weights come from.
        card: the model card, in Markdown.
        extend: adds files to the directory before it appears.

    Raises:
        UsageError: `out` exists.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; name a directory that does not, or remove it")
    num_classes = encoder["head.fc.weight"].shape[0] if "head.fc.weight" in encoder else 0
    with torch.device("meta"):
        model = create_encoder(architecture, **model_args)
    if model.position_size is not None:  # whatever the size of images that it is opened for, its positions stay those
        model_args = {**model_args, "pretrain_img_size": model.position_size}
    config = {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": model.num_features,
        "model_args": model_args,
        "pretrained_cfg": default_cfg(
            architecture,
            model_args.get("img_size"),
            model.in_chans,
            num_classes=num_classes,
            **(input_facts or {}),
        ),
        **({} if method is None else {"method": method[0]}),
        **(facts or {}),
    }
    with new_directory(out) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if card is not None:
            (partial / CARD).write_text(card)
        for name, state in ((ENCODER, encoder), *(() if method is None else ((METHOD, method[1]),))):
            save_file(_storable(state), partial / name, metadata={"format": "pt"})
            shutil.copymode(partial / CONFIG, partial / name)  # safetensors writes for the owner alone
        if extend is not None:
            extend(partial)


class _InputFacts(BaseModel):
    """What timm's pretrained_cfg says of the input."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    input_size: tuple[int, _Side, _Side]
    mean: tuple[float, ...]
    std: tuple[Deviation, ...]
    label_names: tuple[str, ...] | None = None


class EncoderConfig(BaseModel):
    """What a directory's config.json must say; whatever else is in it is passed over."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())
    architecture: str
    num_classes: int = Field(ge=0)
    num_features: int = Field(gt=0)
    model_args: dict[str, Any] = {}
    pretrained_cfg: _InputFacts
    method: str | None = None
    finetuning: dict[str, Any] = {}
    data: dict[str, Any] = {}
    """Keys of a recipe's `data:` that say which pixels the encoder is for, where they are not 8-bit RGB."""

    @property
    def pixels(self) -> PixelFormat:
        return Data(**self.data, mean=self.pretrained_cfg.mean, std=self.pretrained_cfg.std).pixels


def read_config(directory: str | Path) -> EncoderConfig:
    """The config.json of an encoder directory.

    Raises:
        UsageError: no encoder directory, or values that no encoder has.
    """
    file = Path(directory) / CONFIG
    if not file.is_file():
        raise UsageError(f"{directory} is not an encoder directory: it has no {CONFIG}; make one with 'mixmae export'")
    try:
        config = EncoderConfig.model_validate(parse_json(file.read_bytes()))
        family, _ = family_of(config.architecture)
        _ = config.pixels
        check_settings("model_args", family.__init__, config.model_args, _NOT_SIZES)
        _ = config.pixels
    except ValidationError as error:
        raise UsageError(f"{file}: {explain(error, EncoderConfig)}") from error
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be used: {error}") from error
    return config


def read_weights(file: Path) -> dict[str, Tensor]:
    """The weights in a safetensors file.

    Raises:
        UsageError: it cannot be read, is cut or damaged, or holds anything but finite floating point numbers.
    """
    state = read_tensors(file)
    require_finite(state, str(file))
    return state


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file.

    Raises:
        UsageError: it cannot be read, is cut or damaged.
    """
    if not file.is_file():
        raise UsageError(f"{file} {what_is(file)}; give a directory made by 'mixmae export' or 'mixmae import'")
    try:
        return load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"{file} cannot be read ({error}); copy or export it again") from error


def require_finite(state: dict[str, Tensor], source: str) -> None:
    """Raises UsageError unless all weights are floating point numbers, and finite."""
    for name, value in state.items():
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise UsageError(f"{source}: {name} holds {kind}; expected floating point weights, not quantised ones")
        if not value.isfinite().all():
            raise UsageError(f"{source}: {name} holds values that are not finite; the training that made it diverged")


def load_encoder(directory: str | Path, pretrained: bool = True, **options: Any) -> nn.Module:
    """An encoder directory as a timm model.

    Args:
        pretrained: False for the same architecture with random weights.
        options: those of `timm.create_model`, such as num_classes=10 or features_only=True.

    Raises:
        UsageError: not an encoder directory, or weights that are not those of its config.json.
    """
    config = read_config(directory)
    try:
        with torch.device("meta"):
            expected = create_encoder(config.architecture, **config.model_args).num_features
        if expected != config.num_features:
            raise ValueError(f"num_features={config.num_features}: these sizes give {expected}")
        if pretrained:
            read_weights(Path(directory) / ENCODER)
        model: nn.Module = timm.create_model(f"local-dir:{directory}", pretrained=pretrained, **options)
    except UsageError:
        raise
    except MISFIT as error:
        raise UsageError(f"{directory}: config.json and weights do not fit ({first_line(error)})") from error
    return model


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]


def own_weights(module: nn.Module, without: str | tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A module's weights, but those whose names begin so; indices and counters are none."""
    state = module.state_dict()
    return {name: value for name, value in state.items() if value.is_floating_point() and not name.startswith(without)}


def misfits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of weights that are missing or foreign; where there are none, of those of another shape."""
    return sorted(found.keys() ^ expected.keys()) or sorted(k for k in found if found[k].shape != expected[k].shape)


def _storable(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}
