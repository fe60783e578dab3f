"""YAML that people write, read strictly: what would be lost or misread is an error, in one line with its place.

The types are those of JSON: a date stays text, and tags that make other things are refused. No torch: login nodes read
recipes too.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from mixmae.base.errors import UsageError

_MAX_BYTES = 2**20
_MAX_VALUES = 10_000
"""Values of a file with its aliases written out, so that a few lines cannot stand for billions."""
_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"
_TYPES = ("null", "bool", "int", "float", "str", "seq", "map")


class InvalidYamlError(ValueError):
    """Text that is not YAML, or says a thing twice; the message is one line."""


def read_yaml(file: Path) -> Any:
    """A file's content: None, text, numbers, and lists and mappings of them.

    Raises:
        UsageError: it cannot be read, is not YAML in UTF-8, or has a key twice.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise UsageError(f"{file} has more than {_MAX_BYTES} bytes; expected a YAML file of some lines")
    try:
        return parse_yaml(content)
    except InvalidYamlError as error:
        raise UsageError(f"{file} is not valid YAML: {error}") from error


def parse_yaml(content: bytes | str) -> Any:
    """The value that YAML text stands for.

    Raises:
        InvalidYamlError: not UTF-8, not YAML, or a key that stands twice.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        return _construct(text)
    except UnicodeDecodeError as error:
        raise InvalidYamlError(f"byte {error.start} is not UTF-8 text; save the file as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        raise InvalidYamlError(f"{_line(error.problem_mark)}{error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        raise InvalidYamlError(f"character {error.position} is U+{error.character:04X}, which is not text") from error
    except RecursionError as error:
        raise InvalidYamlError("lists or mappings are nested too deeply") from error


def _construct(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > _MAX_VALUES:
            raise InvalidYamlError(f"its aliases stand for more than {_MAX_VALUES} values; write out what is meant")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node, aliases counted as often as they stand."""
    if id(node) not in known:
        known[id(node)] = _MAX_VALUES + 1  # of an alias inside of what it names
        values = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _line(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "


class _Loader(yaml.SafeLoader):
    """PyYAML's, which takes the last of several equal keys, and dates for dates."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[Hashable, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
                shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise yaml.MarkedYAMLError(None, None, f"{shown} is not text, as keys are; quote it", key.start_mark)
            if key.value in seen:
                first = seen[key.value].start_mark.line + 1
                problem = f"key {key.value!r} stands here and in line {first}; keep one of them"
                raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
            seen[key.value] = key
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if wrong := _NOT_TEXT.search(node.value):
            problem = f"character U+{ord(wrong[0]):04X} is not text"
            raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            problem = f"{_short(node)} is no number that can be used"
            raise yaml.MarkedYAMLError(None, None, problem, node.start_mark) from error


def _refuse_tag(loader: _Loader, node: yaml.Node) -> None:
    raise yaml.MarkedYAMLError(
        None, None, f"values of type {node.tag.removeprefix(_TAG)} are not read", node.start_mark
    )


_SAFE = yaml.SafeLoader.yaml_constructors
_Loader.yaml_constructors = {f"{_TAG}{name}": _SAFE[f"{_TAG}{name}"] for name in _TYPES} | {None: _refuse_tag}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _short(node: yaml.Node) -> str:
    text = str(node.value)
    return text if len(text) <= 20 else f"{text[:20]}..."
