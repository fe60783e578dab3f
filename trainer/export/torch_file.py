"""Files of `torch.save` from anybody: tensors are read, and no object in them is made."""

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals

from mixmae.base.errors import UsageError
from mixmae.base.files import what_is

_REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed global")
_MAX_OBJECTS = 100
"""Kinds of objects beside the weights."""
_MAPPINGS = ("collections.defaultdict", "easydict.EasyDict", "yacs.config.CfgNode", "addict.addict.Dict")


class _Opaque:
    """Stands for an object that is no tensor: whatever a file would call to make one, nothing is called."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _OpaqueMapping:
    """Of objects that are filled key by key, which torch does with dictionaries alone."""

    def __new__(cls, *_: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


def read_torch_file(file: Path) -> Any:
    """What a file of `torch.save` holds, unpickled with `weights_only`, on the CPU.

    Training scripts save their arguments beside the weights (argparse.Namespace, paths, NumPy's numbers): such objects
    are not made, an empty one takes their place. Files of torch before 1.6, which are no zip archives, are read too.

    Raises:
        UsageError: no such file, or none of `torch.save`.
    """
    if not file.is_file():
        raise UsageError(f"{file} {what_is(file)}; expected a file of torch.save")
    try:
        return _load(file)
    except Exception as error:  # torch raises whatever its unpickler meets; each means the same to the user
        said = _plain(error)
        raise UsageError(
            f"{file} is not a checkpoint that torch loads with weights_only=True{f': {said}' if said else ''}"
        ) from error


def _load(file: Path) -> Any:
    with file.open("rb") as opened:
        is_zip = opened.read(4) == b"PK\x03\x04"
    names: list[str] = []
    while True:
        try:
            with safe_globals([(_OpaqueMapping if name in _MAPPINGS else _Opaque, name) for name in names]):
                return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:
            refused = _REFUSED.search(str(error))
            name = "" if refused is None else refused[1] if "." in refused[1] else f"builtins.{refused[1]}"
            if not name or name in names or len(names) == _MAX_OBJECTS:
                raise
            names.append(name)


def _plain(error: Exception) -> str:
    """What torch says, if anything, without its advice and escape codes."""
    refused = [line for line in str(error).splitlines() if "WeightsUnpickler error:" in line]
    line = (refused or str(error).splitlines() or [""])[0]
    return re.sub(r"\x1b\[[0-9;]*m", "", line).split("WeightsUnpickler error:")[-1].strip()
