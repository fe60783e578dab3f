"""Weights that others trained: timm's by name, timm's directories, and files of safetensors or `torch.save`.

Which family's names they have, the encoder finds out (`models.encoders.conversion`).
"""

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import timm
from torch import Tensor

from mixmae.base.errors import UsageError
from mixmae.models.encoders.registry import ENCODERS
from mixmae.trainer.export.encoder_directory import CONFIG, ENCODER, first_line, read_tensors, require_finite
from mixmae.trainer.export.torch_file import read_torch_file
from mixmae.trainer.recipe.sections.section import TIMM

_TIMM_FILES = (ENCODER, "pytorch_model.bin")
"""Of a directory that timm wrote (`save_for_hf`), in the order in which timm looks for them."""
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
"""Of files, whether they are there or not."""
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
"""Where training scripts put a state dict, as timm looks for it: averaged weights first."""
_WRAPPERS = ("module.", "encoder.", "backbone.")
"""What stands before an encoder's names in a larger model's; what has none of it is not the encoder's (SimMIM)."""
_INDEX = re.compile(r"(?:.*\.)?(?:relative_position_index|attn_mask|num_batches_tracked)")


class ForeignWeights(NamedTuple):
    """A state dict in fp32 under its own names.

    Attributes:
        source: for messages.
        left_out: names of what is around the encoder.
        note: how images were given to the model, as far as that is known.
    """

    state: dict[str, Tensor]
    source: str
    left_out: tuple[str, ...]
    note: str


def is_foreign(init: str) -> bool:
    """Whether these weights are others': a timm name, a file, or a directory that timm wrote of a model of its own."""
    path = Path(init)
    is_file = path.is_file() or (path.suffix in _SUFFIXES and not path.is_dir())
    return init.startswith(TIMM) or is_file or _is_timms(_architecture(path))


def own_directory(init: str) -> str:
    """The encoder directory whose weights' file is named; else what is named."""
    path = Path(init)
    return str(path.parent) if path.name == ENCODER and _architecture(path.parent) in ENCODERS else init


def read_foreign_weights(init: str) -> ForeignWeights:
    """Reads them.

    Raises:
        UsageError: no such name or file, no weights in it, or a hub that cannot be reached.
    """
    if init.startswith(TIMM):
        state, note = _of_timm(init.removeprefix(TIMM))
        return _encoder_alone(state, init, note)
    path = Path(init)
    if path.is_dir():
        note = _input_note(json.loads((path / CONFIG).read_bytes()).get("pretrained_cfg") or {})
        file = next((path / name for name in _TIMM_FILES if (path / name).is_file()), path / ENCODER)
        return _encoder_alone(_read(file), str(file), note)
    return _encoder_alone(_read(path), str(path), "")


def _architecture(directory: Path) -> str:
    """What a directory's config.json calls its model; empty where there is none that says."""
    try:
        return str(json.loads((directory / CONFIG).read_bytes())["architecture"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""


def _is_timms(architecture: str) -> bool:
    return architecture not in ENCODERS and timm.is_model(architecture)


def _of_timm(name: str) -> tuple[dict[str, Tensor], str]:
    if "/" not in name:  # else it is on a hub, such as hf-hub:timm/...
        _require_known(name)
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # of sockets, HTTP, the hub's client and files, of whichever version
        raise UsageError(
            f"the weights of {name} are not in the cache, and the hub cannot be reached ({first_line(error)}); where "
            f"there is a network, run timm.create_model({name!r}, pretrained=True) and copy its cache (HF_HOME), or "
            "give a file"
        ) from error
    return model.state_dict(), _input_note(model.pretrained_cfg)


def _require_known(name: str) -> None:
    architecture = name.split(".", maxsplit=1)[0]
    if not timm.is_model(architecture):
        nearest = get_close_matches(architecture, timm.list_models(), n=1)
        hint = f"did you mean {TIMM}{nearest[0]}?" if nearest else "see timm.list_models(pretrained=True)"
        raise UsageError(f"timm {timm.__version__} has no model {architecture!r}; {hint}")
    known = timm.list_pretrained(f"{architecture}.*")
    if name not in (known and [architecture, *known]):  # without a tag it stands for the first of them
        raise UsageError(f"timm {timm.__version__} has no weights {name!r}; it has {', '.join(known) or 'none of it'}")


def _input_note(facts: Mapping[str, Any]) -> str:
    if not {"input_size", "mean", "std"} <= facts.keys():
        return ""
    size, mean, std = ([*facts[key]] for key in ("input_size", "mean", "std"))
    return f"trained on {size[1]}x{size[2]} px with data.mean={mean} and data.std={std}"


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return read_tensors(file)
    content = read_torch_file(file)
    while isinstance(content, Mapping) and (key := next((key for key in _NESTED if _nests(content, key)), None)):
        content = content[key]
    if not isinstance(content, Mapping):
        raise UsageError(f"{file} holds no state dict; expected one, alone or under {', '.join(_NESTED)}")
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _nests(content: Mapping[Any, Any], key: str) -> bool:
    return isinstance(content.get(key), Mapping) and len(content[key]) > 0


def _encoder_alone(state: dict[str, Tensor], source: str, note: str) -> ForeignWeights:
    """The encoder's weights, whatever they are wrapped in."""
    left_out: list[str] = []
    state = {name: value for name, value in state.items() if not _INDEX.fullmatch(name)}
    while wrapper := next((prefix for prefix in _WRAPPERS if any(name.startswith(prefix) for name in state)), None):
        left_out += [name for name in state if not name.startswith(wrapper)]
        state = {name.removeprefix(wrapper): value for name, value in state.items() if name.startswith(wrapper)}
    if not state:
        raise UsageError(f"{source} holds no weights; give a checkpoint with a state dict")
    if "absolute_pos_embed" in state:
        raise UsageError(
            f"{source} has absolute positions, as MixMIM's releases do: 'mixmae import {source} OUT' converts those; "
            "then give OUT"
        )
    require_finite(state, source)
    return ForeignWeights({name: value.float() for name, value in state.items()}, source, tuple(left_out), note)
