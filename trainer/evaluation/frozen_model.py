"""A trained classifier, or an encoder alone, opened to be evaluated: any model that timm opens."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor, nn

from mixmae.base.errors import UsageError
from mixmae.trainer.data.to_device import ToDevice
from mixmae.trainer.evaluation.held_out import HeldOut
from mixmae.trainer.export.encoder_directory import CONFIG, load_encoder, read_config
from mixmae.trainer.recipe.sections.pixels import RGB, PixelFormat

TOP = 5


@dataclass(frozen=True)
class FrozenModel:
    """A model in eval mode, with what its configuration says of images and classes.

    Attributes:
        size: height and width of its input in pixels.
        pixels: that images have to have.
        crop_ratio: side of the centre crop over that of the largest that fits the image.
        num_classes: 0 where it has no head.
        class_names: as shards name them; empty where classes have numbers alone.
        descriptions: for people; empty or one for each class.
        multi_label: whether an image has any number of its classes.
    """

    name: str
    module: Any
    size: tuple[int, int]
    pixels: PixelFormat
    crop_ratio: float
    to_device: ToDevice
    num_classes: int
    class_names: tuple[str, ...]
    descriptions: tuple[str, ...]
    multi_label: bool

    def describe(self, number: int) -> str:
        """A class for people."""
        return (self.descriptions or self.class_names)[number] if self.class_names else f"class {number}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pooled features fp32 [B, C] and logits fp32 [B, classes] of uint8 images; None where it has no head."""
        features = self.module.forward_features(self.to_device(images))
        pooled = self.module.forward_head(features, pre_logits=True).float()
        return pooled, self.module.forward_head(features).float() if self.num_classes else None

    def run(self, batches: Iterable[HeldOut]) -> tuple[Tensor, Tensor]:
        """Of this rank's share: pooled features [n, C], and answers [n, ...]."""
        features, answers = [], []
        for images, samples, _ in batches:
            pooled, logits = self(images)
            features.append(pooled[: len(samples)])
            answers.append(self._answers(pooled[:, :0] if logits is None else logits)[: len(samples)])
        return torch.cat(features), torch.cat(answers)

    def _answers(self, logits: Tensor) -> Tensor:
        """The `TOP` classes of each image, int64 [B, TOP], best first; of multi-label models each class's probability,
        fp32 [B, classes]."""
        return logits.sigmoid() if self.multi_label else logits.topk(min(TOP, logits.shape[1]), dim=1).indices


def open_model(name: str, device: torch.device) -> FrozenModel:
    """A directory of `mixmae export` or `mixmae import`, or a model by a name that timm knows (also `hf-hub:...`).

    Raises:
        UsageError: neither of them, or weights that cannot be had or do not fit.
    """
    directory = Path(name)
    local = directory.exists() or name.startswith((".", "/"))
    module = _open_directory(directory) if local else _open_by_name(name)
    config = resolve_model_data_config(module)
    _, height, width = config["input_size"]
    facts = getattr(module, "pretrained_cfg", {})
    pixels = read_config(directory).pixels if local else _pixels_by_name(name, config)
    names, descriptions = _class_names(module, facts, local)
    return FrozenModel(
        name,
        module.eval().to(device),
        (height, width),
        pixels,
        config["crop_pct"],
        ToDevice(device, config["mean"], config["std"], pixels.scale),
        int(getattr(module, "num_classes", 0)),
        names,
        descriptions,
        local and bool(json.loads((directory / CONFIG).read_text()).get("finetuning", {}).get("multi_label")),
    )


def _pixels_by_name(name: str, config: Mapping[str, Any]) -> PixelFormat:
    """8-bit RGB. Raises UsageError for published models of other images, of which nothing says what pixels mean."""
    if config["input_size"][0] != RGB.channels:
        raise UsageError(f"{name} takes images of {config['input_size'][0]} channels; expected RGB, or a directory")
    return RGB


def _open_directory(directory: Path) -> nn.Module:
    try:
        return load_encoder(directory)
    except (RuntimeError, OSError, KeyError) as error:
        raise UsageError(f"{directory} cannot be opened: {_first_line(error)}") from error


def _open_by_name(name: str) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # of timm, the hub's client and the network
        raise UsageError(
            f"{name} is no directory, and timm cannot open a model of this name with weights: {_first_line(error)}; "
            "'mixmae export' makes a directory of a run"
        ) from error
    return model


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _class_names(module: nn.Module, facts: Any, local: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names in a model's configuration; ImageNet's of published models that have as many classes."""
    names = tuple(facts.get("label_names") or ())
    descriptions = facts.get("label_descriptions") or {}
    if names:
        return names, tuple(descriptions.get(name, name) for name in names)
    subset = None if local else infer_imagenet_subset(module)
    if subset is None:
        return (), ()
    known = ImageNetInfo(subset)
    return tuple(known.label_names()), tuple(known.label_descriptions())
