"""Keys that belong to a component, an encoder or a method: checked against the arguments of its constructor.

No torch here: whoever calls has the component's class in hand.
"""

import inspect
import re
from collections.abc import Callable, Collection
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from mixmae.base.errors import UsageError
from mixmae.trainer.recipe.words import explain, shown

_LARGEST_SIZE = 2**16
"""Of anything that is counted in a model: beyond, making it takes all memory before anything can be said."""
_Config = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)


def check_settings(
    section: str, constructor: Callable[..., Any], settings: dict[str, Any], reserved: Collection[str]
) -> dict[str, Any]:
    """A component's settings with the types that its constructor declares, and with every default.

    Args:
        section: of the recipe, as messages name it.
        reserved: arguments that recipes cannot set.

    Raises:
        UsageError: an unknown key, with the nearest one, or a value of another type.
    """
    schema = _schema(constructor, reserved)
    try:
        checked = schema.model_validate(settings).model_dump()
    except ValidationError as error:
        raise UsageError(explain(error, schema, section)) from error
    for key, value in checked.items():
        sizes = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(size, int) and not 0 <= size <= _LARGEST_SIZE for size in sizes):
            raise UsageError(f"{section}.{key}={shown(value)}: expected sizes from 0 to {_LARGEST_SIZE}")
    return checked


def in_keys(section: str, component: type, error: Exception) -> str:
    """A component's error in the recipe's words: its arguments as keys."""
    names = [name for name in inspect.signature(component).parameters if "_" in name]
    text = re.sub(rf"\b({'|'.join(names)})\b", rf"{section}.\1", str(error)) if names else str(error)
    return text if f"{section}." in text else f"{section}: {text}"


def _schema(constructor: Callable[..., Any], reserved: Collection[str]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(constructor).parameters.items():
        if name not in reserved and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[name] = (parameter.annotation, default)
    return create_model("Settings", __config__=_Config, **fields)
