"""Reading recipes: defaults < YAML < dotted overrides (`train.micro_batch=64`). No torch: login nodes read them too.

An unknown key is an error that names the nearest known one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mixmae.base.errors import UsageError
from mixmae.trainer.recipe.base import read_sections
from mixmae.trainer.recipe.library import find_recipe
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.words import explain, shown
from mixmae.trainer.recipe.yaml_files import InvalidYamlError, parse_yaml

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
    return _overridden(read_sections(file), overrides, str(file))


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
            if not isinstance(here, dict):
                raise UsageError(f"key {path!r} stands below {section!r}, which is {shown(here)}")
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
        raise UsageError(f"{source}: {explain(error, Recipe)}") from error


def _apply(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UsageError(f"override {shown(override)} is not of the form key.path=value, such as train.micro_batch=64")
    *sections, key = path.split(".")
    here = content
    for section in sections:
        inner = here.get(section)
        if inner is not None and not isinstance(inner, dict):
            raise UsageError(
                f"override {shown(override)}: {section} is {shown(inner)} in the recipe, which has no keys"
            )
        here[section] = inner = dict(inner or {})
        here = inner
    try:
        here[key] = parse_yaml(text)
    except InvalidYamlError as error:
        raise UsageError(
            f"override {shown(override)}: the value is not YAML ({error}); quote it, or close its brackets"
        ) from error
