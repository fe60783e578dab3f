"""Recipes that say only what they change: `base: pretrain/swin_base_w14`, a name in the library or a file."""

from pathlib import Path
from typing import Any

from mixmae.base.errors import UsageError
from mixmae.trainer.recipe.library import find_recipe
from mixmae.trainer.recipe.words import shown
from mixmae.trainer.recipe.yaml_files import read_yaml

_KEY = "base"


def read_sections(file: Path) -> dict[str, Any]:
    """The sections of a recipe's file, over those of its base, over those of that one's.

    Raises:
        UsageError: a file is no recipe, a base is unknown, or recipes are each other's base.
    """
    files, layers = [file], [_read(file)]
    while (base := layers[-1].pop(_KEY, None)) is not None:
        if not isinstance(base, str):
            raise UsageError(f"{files[-1]}: {_KEY} is {shown(base)}; expected a recipe's name or file")
        files.append(find_recipe(Path(base)))
        if files[-1].resolve() in [known.resolve() for known in files[:-1]]:
            raise UsageError(f"{' builds on '.join(map(str, files))}, and so without an end; take one {_KEY} out")
        layers.append(_read(files[-1]))
    content: dict[str, Any] = {}
    for layer in reversed(layers):
        content = _over(content, layer)
    return content


def _read(file: Path) -> dict[str, Any]:
    content = {} if (found := read_yaml(file)) is None else found
    if not isinstance(content, dict):
        raise UsageError(f"{file} holds {shown(content)}; expected sections such as 'encoder:' and 'train:'")
    return content


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` wins, key by key; a section that names another encoder or method has nothing of the one below."""
    if above.get("name", below.get("name")) != below.get("name"):
        return above
    merged = dict(below)
    for key, value in above.items():
        under = below.get(key)
        merged[key] = _over(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged
