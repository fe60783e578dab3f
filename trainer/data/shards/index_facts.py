"""What a directory's index says, as far as it can be read: of shards that are checked, or built from."""

from pathlib import Path
from typing import Any

from mixmae.base.errors import UsageError
from mixmae.base.json_text import parse_json
from mixmae.trainer.data.index import INDEX, LOCATION
from mixmae.trainer.recipe.sections.section import is_elsewhere


def class_names(directory: Path) -> list[str]:
    """Names of the labels 0, 1, ... in a directory's index; none where it has no index or one that cannot be read."""
    names = _index_content(directory).get("classes")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def category_ids(directory: Path) -> list[int]:
    """COCO's numbers of the classes in a directory's index; none where it has none, or none that can be read."""
    annotations = _index_content(directory).get("annotations")
    ids = annotations.get("category_ids") if isinstance(annotations, dict) else None
    return ids if isinstance(ids, list) and all(type(number) is int for number in ids) else []


def location_of_shards(directory: Path) -> Path:
    """Where the shards are whose index a directory holds: the directory itself, or what the index names.

    Raises:
        UsageError: it names a URL.
    """
    location = _index_content(directory).get(LOCATION)
    if not isinstance(location, str):
        return directory
    if is_elsewhere(location):
        raise UsageError(f"the index in {directory} is of shards behind {location}; check them where they are local")
    return Path(location)


def _index_content(directory: Path) -> dict[str, Any]:
    """What `index.json` holds; nothing where it cannot be read."""
    try:
        content = parse_json((directory / INDEX).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
