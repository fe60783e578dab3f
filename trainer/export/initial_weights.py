"""What a run starts from: the weights of an encoder directory, of another run, or others' (`foreign_weights`)."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import CHECKPOINTS, newest_checkpoint
from mixmae.models.encoders.contract import Encoder
from mixmae.models.encoders.registry import create_encoder
from mixmae.models.layers.positions import resize_all_positions
from mixmae.models.methods.contract import Method
from mixmae.trainer.checkpoints.manifest import Manifest
from mixmae.trainer.checkpoints.weights import model_weights
from mixmae.trainer.export.encoder_directory import (
    ENCODER,
    METHOD,
    MISFIT,
    first_line,
    misfits,
    own_weights,
    read_config,
    read_weights,
    require_finite,
)
from mixmae.trainer.export.fit_channels import fit_channels, has_channels
from mixmae.trainer.export.foreign_weights import is_foreign, own_directory, read_foreign_weights
from mixmae.trainer.export.load_foreign import load_foreign_weights
from mixmae.trainer.export.task_config import task_recipe

_logger = logging.getLogger(__name__)
_ENCODER, _BACKBONE = "encoder.", "backbone.encoder."
"""Where modules have their encoder."""
_HEAD = "head."
_FINAL_NORM = "norm."


class InitialWeights(NamedTuple):
    """Weights as a run or an export left them.

    Attributes:
        encoder: by name, and the head's, if there is one; a detector's or segmenter's has no final norm.
        method: that pretrained it; None where nothing says.
        rest: the method's own weights.
        classes: names of the head's classes, as far as they are known.
        source: for messages.
        position_size, grid: as encoders have them.
        heads: what else a detector or segmenter has, of which nothing is taken.
    """

    encoder: dict[str, Tensor]
    method: str | None
    rest: dict[str, Tensor]
    classes: tuple[str, ...]
    source: Path
    position_size: tuple[int, int] | None
    grid: tuple[int, int]
    heads: tuple[str, ...] = ()


def read_initial_weights(path: Path) -> InitialWeights:
    """Reads an encoder directory, an exported detector or segmenter, or the newest checkpoint of a run directory.

    Raises:
        UsageError: it is none of these, or damaged.
    """
    if (recipe := task_recipe(path)) is not None:
        return _of_run(read_weights(path / ENCODER), recipe, path / ENCODER)
    if not (path / CHECKPOINTS).is_dir():
        encoder, config = read_weights(path / ENCODER), read_config(path)
        rest = read_weights(path / METHOD) if config.method is not None else {}
        classes = config.pretrained_cfg.label_names or ()
        sizes = _sizes(config.architecture, **config.model_args)
        return InitialWeights(encoder, config.method, rest, classes, path / ENCODER, *sizes)
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        raise UsageError(f"{path / CHECKPOINTS} holds no checkpoint yet; give the directory of a run that saved")
    weights = model_weights(checkpoint)
    require_finite(weights, str(checkpoint))
    return _of_run(weights, Manifest.read(checkpoint).recipe, checkpoint)


def _of_run(weights: dict[str, Tensor], recipe: Mapping[str, Any], source: Path) -> InitialWeights:
    """The weights of a run's module; the encoder's stand where its task has it."""
    dense = any(name.startswith(_BACKBONE) for name in weights)
    prefix = _BACKBONE if dense else _ENCODER
    encoder = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    rest = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    return InitialWeights(
        encoder,
        recipe["method"]["name"] if "method" in recipe and not dense else None,
        rest,
        tuple(recipe.get("classification", {}).get("classes") or ()),
        source,
        *_sizes(**{key: value for key, value in recipe["encoder"].items() if key != "init"}),
        tuple(sorted({name.removeprefix("backbone.").split(".")[0] for name in rest})) if dense else (),
    )


def _sizes(name: str, **sizes: Any) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """An encoder's `position_size` and `grid`."""
    try:
        with torch.device("meta"):
            encoder = create_encoder(name, **sizes)
            return encoder.position_size, encoder.grid
    except MISFIT as error:
        raise UsageError(f"encoder {name} cannot be made: {first_line(error)}") from error


def initialise_method(model: Method, init: str | Path, method: str) -> None:
    """Loads the encoder, and what else the same method pretrained.

    Raises:
        UsageError: no such weights, or weights that do not fit the model.
    """
    with _naming_the_key():
        found = _load_encoder(model.encoder, init)
        if found is not None and found.method == method and has_channels(model.encoder, found.encoder):
            _require_fit(found.rest, own_weights(model, "encoder."), found.source)
            model.load_state_dict(found.rest, strict=False)


def initialise_classifier(encoder: Encoder, init: str | Path, classes: tuple[str, ...]) -> None:
    """Loads the encoder, and its head where that has the same classes by name.

    Raises:
        UsageError: no such weights, or weights that do not fit the encoder.
    """
    with _naming_the_key():
        found = _load_encoder(encoder, init)
    if found is None:
        return
    head = {name: value for name, value in found.encoder.items() if name.startswith(_HEAD)}
    if head and classes and found.classes == classes:
        encoder.load_state_dict(head, strict=False)
        _logger.info("the head of %d classes in %s was loaded too", len(classes), init)


def initialise_backbone(encoder: Encoder, init: str | Path) -> None:
    """Loads the encoder of a backbone, which has no final norm; bias tables and positions are resized to its sizes.

    Raises:
        UsageError: no such weights, or weights that do not fit the encoder.
    """
    with _naming_the_key():
        _load_encoder(encoder, init, (_HEAD, _FINAL_NORM))


@contextmanager
def _naming_the_key() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        raise UsageError(f"encoder.init: {error}") from error


def _load_encoder(encoder: Encoder, init: str | Path, left_out: tuple[str, ...] = (_HEAD,)) -> InitialWeights | None:
    """Loads the encoder; returns what else was there, None of others' weights, which are an encoder alone."""
    init = own_directory(str(init))
    if is_foreign(init):
        load_foreign_weights(encoder, read_foreign_weights(init), left_out)
        return None
    found = read_initial_weights(Path(init))
    if found.heads:
        begins_anew = "" if _FINAL_NORM in left_out else "; it has no final norm, and the model's begins anew"
        _logger.info("%s: the encoder is loaded, without %s%s", found.source, ", ".join(found.heads), begins_anew)
        left_out = (_HEAD, _FINAL_NORM)
    weights = {name: value for name, value in found.encoder.items() if not name.startswith(left_out)}
    try:
        weights = resize_all_positions(encoder, weights, found.grid, encoder.grid)
        fitted = fit_channels(encoder, encoder.fit_state_dict(weights))
    except MISFIT as error:
        raise UsageError(f"{found.source} does not fit the model: {first_line(error)}") from error
    _require_fit(fitted, own_weights(encoder, left_out), found.source)
    _require_positions(encoder, found)
    encoder.load_state_dict(fitted, strict=False)
    return found


def _require_positions(encoder: Encoder, found: InitialWeights) -> None:
    theirs, own = found.position_size, encoder.position_size
    if theirs is None or own is None or theirs == own:
        return
    size = theirs[0] if theirs[0] == theirs[1] else list(theirs)
    raise UsageError(
        f"{found.source} has positions of images of {theirs[0]}x{theirs[1]} px, the recipe those of {own[0]}x{own[1]}; "
        f"set encoder.pretrain_img_size={size}, and they are resized to encoder.img_size"
    )


def _require_fit(found: dict[str, Tensor], expected: dict[str, Tensor], source: Path) -> None:
    wrong = misfits(found, expected)
    if wrong:
        raise UsageError(
            f"{source} does not fit the model: {len(wrong)} weights are missing, foreign or of another shape, "
            f"the first is {wrong[0]!r}; take the encoder's sizes that it was trained with into the recipe"
        )
