"""What a run starts from: the weights of an encoder directory, or of another run."""

import json
import logging
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from torch import Tensor, nn

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import CHECKPOINTS, newest_checkpoint
from mixmae.models.encoders.contract import Encoder
from mixmae.models.methods.contract import Method
from mixmae.trainer.checkpoints.manifest import Manifest
from mixmae.trainer.checkpoints.weights import model_weights
from mixmae.trainer.export.encoder_directory import CONFIG, ENCODER, METHOD, misfits

_logger = logging.getLogger(__name__)
_HEAD = "head."


class InitialWeights(NamedTuple):
    """Weights as a run or an export left them.

    Attributes:
        encoder: by name, and the head's, if there is one.
        method: that pretrained it; None where nothing says.
        rest: the method's own weights.
        classes: names of the head's classes, as far as they are known.
        source: for messages.
    """

    encoder: dict[str, Tensor]
    method: str | None
    rest: dict[str, Tensor]
    classes: tuple[str, ...]
    source: Path


def read_initial_weights(path: Path) -> InitialWeights:
    """Reads an encoder directory, or the newest checkpoint of a run directory.

    Raises:
        UsageError: it is neither, or damaged.
    """
    if (path / ENCODER).is_file():
        config = json.loads((path / CONFIG).read_text())
        rest = load_file(path / METHOD) if (path / METHOD).is_file() else {}
        classes = tuple(config["pretrained_cfg"].get("label_names") or ())
        return InitialWeights(load_file(path / ENCODER), config.get("method"), rest, classes, path / ENCODER)
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        holds = f"{path / CHECKPOINTS} holds no checkpoint" if (path / CHECKPOINTS).is_dir() else f"{path} is neither"
        raise UsageError(
            f"encoder.init: {holds}; give a directory made by 'mixmae export' or 'mixmae import', or the run directory "
            "of a run that saved"
        )
    weights = model_weights(checkpoint)
    recipe = Manifest.read(checkpoint).recipe
    encoder = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    return InitialWeights(
        encoder,
        recipe["method"]["name"] if "method" in recipe else None,
        {name: value for name, value in weights.items() if not name.startswith("encoder.")},
        tuple(recipe.get("classification", {}).get("classes") or ()),
        checkpoint,
    )


def initialise_method(model: Method, path: Path, method: str) -> None:
    """Loads the encoder, and what else the same method pretrained.

    Raises:
        UsageError: no such weights, or weights that do not fit the model.
    """
    found = read_initial_weights(path)
    _load_encoder(model.encoder, found)
    if found.method == method and found.rest:
        own = {name: value for name, value in model.state_dict().items() if not name.startswith("encoder.")}
        _require_fit(found.rest, own, found.source)
        model.load_state_dict(found.rest, strict=False)


def initialise_classifier(encoder: Encoder, path: Path, classes: tuple[str, ...]) -> None:
    """Loads the encoder, and its head where that has the same classes by name.

    Raises:
        UsageError: no such weights, or weights that do not fit the encoder.
    """
    found = read_initial_weights(path)
    _load_encoder(encoder, found)
    head = {name: value for name, value in found.encoder.items() if name.startswith(_HEAD)}
    if head and classes and found.classes == classes:
        encoder.load_state_dict(head, strict=False)
        _logger.info("the head of %d classes in %s was loaded too", len(classes), path)


def _load_encoder(encoder: Encoder, found: InitialWeights) -> None:
    weights = {name: value for name, value in found.encoder.items() if not name.startswith(_HEAD)}
    fitted = encoder.fit_state_dict(weights)
    own = {name: value for name, value in encoder.state_dict().items() if not name.startswith(_HEAD)}
    _require_fit(fitted, own, found.source)
    nn.Module.load_state_dict(encoder, fitted, strict=False)


def _require_fit(found: dict[str, Tensor], expected: dict[str, Tensor], source: Path) -> None:
    wrong = misfits(found, expected)
    if wrong:
        raise UsageError(
            f"{source} does not fit the model: {len(wrong)} weights are missing, foreign or of another shape, "
            f"the first is {wrong[0]!r}; take the encoder's sizes that it was trained with into the recipe"
        )
