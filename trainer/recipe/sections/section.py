"""What all sections of a recipe share: frozen values, unknown keys refused, paths expanded."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

_VARIABLE = re.compile(r"\$(?:\{(\w*)\}|(\w+))")


def expand(path: str) -> str:
    """A path with `~`, `~user`, `$NAME` and `${NAME}` as a shell would have them.

    Raises:
        ValueError: there is no such variable or user.
    """
    for braced, bare in _VARIABLE.findall(path):
        if (name := braced or bare) not in os.environ:
            raise ValueError(f"the environment has no variable {name}; set it, or write the path out")
    expanded = os.path.expandvars(path)
    if not expanded.startswith("~"):
        return expanded
    try:
        return str(Path(expanded).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{expanded.partition('/')[0]} is nobody's home; write the path out, or ./{path}") from error


def is_elsewhere(shards: str) -> bool:
    """Whether shards are behind a URL or a command, and not in a directory."""
    return "://" in shards or shards.startswith("pipe:")


def _expand_directory(shards: str) -> str:
    return shards if is_elsewhere(shards) else expand(shards)


Shards = Annotated[str, AfterValidator(_expand_directory)]
"""A directory of shards, expanded, or the URL of one."""
TIMM = "timm:"
"""What stands before a name of timm's where weights are named."""


def _expand_file(weights: str) -> str:
    return weights if weights.startswith(TIMM) else expand(weights)


Weights = Annotated[str, AfterValidator(_expand_file)]
"""A directory or file of weights, expanded, or `timm:` and the name of timm's."""
Share = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0)]
Batch = Annotated[int, Field(gt=0, le=2**24)]
Seconds = Annotated[float, Field(gt=0, le=1e7)]
"""Of patience: at most some months, which every library's timeouts can hold."""


def _kinds(annotation: Any) -> Iterator[Any]:
    """All types within a type: of `int | Literal["auto"]` also int."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's `yes` and `on` are Python's True, which is 1."""
        if isinstance(value, bool):
            kinds = list(_kinds(cls.model_fields[str(info.field_name)].annotation))
            if bool not in kinds and (int in kinds or float in kinds):
                raise ValueError("expected a number")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _paths_are_expanded(cls, value: Any) -> Any:
        return Path(expand(str(value))) if isinstance(value, Path) else value
