"""Where shards are: one directory or URL, or a list of several with weights, with brace patterns expanded."""

import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import braceexpand
from pydantic import BeforeValidator, Field

from mixmae.base.errors import UsageError
from mixmae.trainer.recipe.sections.section import Section, Shards, is_elsewhere

_SHARD = ".tar"


class WeightedShards(Section):
    """One place of several."""

    shards: Shards
    """As `data.shards`: a directory, a URL or a brace pattern."""
    weight: float | None = Field(None, gt=0)
    """Share of an epoch, relative to the other places; None for all: each image once an epoch."""


def _read_entry(entry: Any) -> Any:
    return {"shards": entry} if isinstance(entry, str) else entry


def _read_entries(value: Any) -> Any:
    return [_read_entry(entry) for entry in value] if isinstance(value, list | tuple) else value


ShardPlaces = Annotated[Shards | tuple[WeightedShards, ...], BeforeValidator(_read_entries)]


class Place(NamedTuple):
    """One shard directory of a run, or a few of its shards."""

    location: str
    names: tuple[str, ...] | None
    """Of the shards that are read; None: all that its index lists."""
    weight: float | None


def places_of(shards: str | Path | Sequence[WeightedShards]) -> list[Place]:
    """The places that `data.shards` names, in its order.

    Raises:
        UsageError: a pattern whose braces do not match, or a place that is there twice.
    """
    if isinstance(shards, str | Path):
        return list(_expanded(str(shards), None))
    places = [place for entry in shards for place in _expanded(entry.shards, entry.weight)]
    locations = [place.location for place in places]
    twice = next((location for location in locations if locations.count(location) > 1), None)
    if twice is not None:
        raise UsageError(
            f"data.shards names {twice} twice; name it once, with a weight where its share should be larger"
        )
    return places


def _expanded(pattern: str, weight: float | None) -> Iterator[Place]:
    """A pattern's directories, of which each has the pattern's weight, and its shards grouped by theirs."""
    if pattern.startswith("pipe:") or (not is_elsewhere(pattern) and Path(pattern).exists() and not _is_shard(pattern)):
        yield Place(pattern, None, weight)
        return
    try:
        names = list(braceexpand.braceexpand(pattern, escape=False))
    except ValueError as error:
        raise UsageError(f"data.shards={pattern}: its braces do not match ({error})") from error
    found: dict[str, list[str] | None] = {}
    for name in names:
        path, mark, query = name.partition("?") if is_elsewhere(name) else (name, "", "")
        if _is_shard(path):
            shards = found.setdefault(f"{posixpath.dirname(path) or '.'}{mark}{query}", [])
            if shards is not None:
                shards.append(posixpath.basename(path))
        else:
            found[name] = None
    for location, shards in found.items():
        yield Place(location, None if shards is None else tuple(shards), weight)


def _is_shard(path: str) -> bool:
    return path.endswith(_SHARD) and not Path(path).is_dir()


def describe_places(shards: str | Sequence[WeightedShards]) -> str:
    """`data.shards` for messages."""
    return shards if isinstance(shards, str) else ", ".join(entry.shards for entry in shards)


def require_weights(shards: str | Sequence[WeightedShards]) -> None:
    """Raises ValueError for an empty list, or one in which some places have weights and others none."""
    if isinstance(shards, str):
        return
    if not shards:
        raise ValueError("shards=[]: expected at least one directory or URL")
    bare = [entry.shards for entry in shards if entry.weight is None]
    if bare and len(bare) < len(shards):
        raise ValueError(f"shards: {bare[0]} has no weight and others have; expected a weight for each place or none")
