"""Reading recipes: defaults < YAML < dotted overrides (`train.micro_batch=64`). No torch: login nodes read them too.

An unknown key is an error that names the nearest known one.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mixmae.base.errors import UsageError
from mixmae.trainer.recipe.library import find_recipe
from mixmae.trainer.recipe.schema import Recipe

RENAMED = {
    "model.encoder": "encoder.name",
    "model.img_size": "encoder.img_size",
    "model.init": "encoder.init",
    "model.sizes": "encoder",
    "model": "method",
    "data.max_bad_share": "data.max_corrupt_fraction",
    "data.window": "data.shuffle_window",
}
"""Keys of recipes before version 0.2, and what they are called now; the keys of a section go where it goes."""


def load_recipe(recipe: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, or of a name in the library, with `key.path=value` overrides.

    Raises:
        UsageError: no such recipe, not YAML, an unknown key or a value outside its range.
    """
    file = find_recipe(recipe)
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} holds {type(content).__name__}; expected sections such as 'model:' and 'train:'")
    return _overridden(content, overrides, str(file))


def default_recipe(overrides: Sequence[str]) -> Recipe:
    """The recipe of all defaults with overrides.

    Raises:
        UsageError: an unknown key or a value outside its range.
    """
    return _overridden({}, overrides, "recipe")


def _overridden(content: dict[str, Any], overrides: Sequence[str], source: str) -> Recipe:
    for override in overrides:
        _apply(content, override)
    return parse_recipe(content, source)


def renamed(path: str) -> str | None:
    """What a key of an older recipe is called now; None for one that has kept its name."""
    for old, new in RENAMED.items():
        if path == old or path.startswith(old + "."):
            return new + path[len(old) :]
    return None


def upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """A recipe that an older version resolved, under today's keys; for runs that were started with it."""
    current: dict[str, Any] = {}
    for path, value in leaves(content):
        if path == "optim.no_decay" and value == ["relative_position_bias_table", "mask_token"]:
            continue  # then the default, which now asks the model
        *sections, key = (renamed(path) or path).split(".")
        here = current
        for section in sections:
            here = here.setdefault(section, {})
        if value is not None or not path.startswith("model.sizes."):
            here[key] = value
    return current


def leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested sections with its dotted path."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def parse_recipe(content: dict[str, Any], source: str) -> Recipe:
    """The recipe of nested values; `source` is what an error names."""
    for path, _ in leaves(content):
        if (new := renamed(path)) is not None:
            raise UsageError(f"{source}: key {path!r} is now called {new!r}; rename it")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{source}: {'; '.join(explain(detail) for detail in error.errors()[:3])}") from error


def _apply(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UsageError(f"override {override!r} is not of the form key.path=value, such as train.micro_batch=64")
    *sections, key = path.split(".")
    here = content
    for section in sections:
        inner = here.get(section)
        here[section] = inner = dict(inner) if isinstance(inner, dict) else {}
        here = inner
    try:
        here[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"override {override!r}: the value is not YAML; quote it, or close its brackets") from error


def explain(detail: Any, schema: type[BaseModel] = Recipe, section: str = "") -> str:
    """One of pydantic's findings as a sentence; an unknown key with the nearest one that the schema has.

    Args:
        section: of the recipe that the schema is for, where it is not for all of it.
    """
    path = ".".join([*([section] if section else []), *map(str, detail["loc"])])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {path!r}{_nearest(path, schema, section)}"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    given = detail["input"]
    shown = f"={given!r}" if path and not isinstance(given, (dict, BaseModel)) else ""
    expected = message if detail["type"] == "value_error" else f"expected {message}"
    return f"{path}{shown}: {expected}" if path else expected


def _nearest(path: str, schema: type[BaseModel], section: str) -> str:
    prefix = f"{section}." if section else ""
    known, wanted = list(_paths(schema)), path.removeprefix(prefix)
    by_leaf = [k for k in known if k.rsplit(".", 1)[-1] == wanted.rsplit(".", 1)[-1]]
    nearest = by_leaf or difflib.get_close_matches(wanted, known, n=1, cutoff=0.6)
    return f"; did you mean {prefix + nearest[0]!r}?" if nearest else f"; known: {', '.join(schema.model_fields)}"


def _paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _paths(field.annotation, f"{prefix}{name}.")
