"""Methods by name, as recipes name them."""

from collections.abc import Callable
from difflib import get_close_matches
from typing import TypeVar

from mixmae.models.methods.contract import Method

_METHODS: dict[str, type[Method]] = {}
_Class = TypeVar("_Class", bound=type[Method])


def register_method(name: str) -> Callable[[_Class], _Class]:
    """Puts a method on the list, under the name by which recipes know it."""

    def put(method: _Class) -> _Class:
        if _METHODS.get(name, method) is not method:
            raise ValueError(f"method {name!r} is registered already, by {_METHODS[name].__module__}")
        _METHODS[name] = method
        return method

    return put


def method_class(name: str) -> type[Method]:
    """Raises ValueError for an unknown name, with the nearest one."""
    if name not in _METHODS:
        nearest = get_close_matches(name, _METHODS, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"unknown method {name!r}; {hint}known: {', '.join(sorted(_METHODS))}")
    return _METHODS[name]
