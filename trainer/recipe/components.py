"""Keys that belong to a component, an encoder or a method: checked against the arguments of its constructor.

No torch here: whoever calls has the component's class in hand.
"""

import inspect
from collections.abc import Callable, Collection
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from mixmae.base.errors import UsageError
from mixmae.trainer.recipe.loading import explain

_Config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


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
        return schema.model_validate(settings).model_dump()
    except ValidationError as error:
        raise UsageError("; ".join(explain(detail, schema, section) for detail in error.errors()[:3])) from error


def _schema(constructor: Callable[..., Any], reserved: Collection[str]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(constructor).parameters.items():
        if name not in reserved and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[name] = (parameter.annotation, default)
    return create_model("Settings", __config__=_Config, **fields)
