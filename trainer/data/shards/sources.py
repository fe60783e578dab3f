"""Which source a path is: a folder of images, a list of files, or existing shards."""

from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.trainer.data.shards.image_files import open_folder, open_list
from mixmae.trainer.data.shards.shard_samples import open_shards
from mixmae.trainer.data.shards.source import Source
from mixmae.trainer.recipe.sections.section import is_elsewhere


def open_source(location: str, jobs: int = 1) -> Source:
    """The source that a path is: a directory of shards or of images, or a list of files.

    Args:
        jobs: processes that list the members of shards.

    Raises:
        UsageError: nothing of that kind, or nothing in it.
    """
    path = Path(location)
    if is_elsewhere(location):
        raise UsageError(f"source {location} is a URL; shards are built where the images are local")
    if path.suffix.lower() in (".csv", ".jsonl") and path.is_file():
        return open_list(path.resolve())
    if path.is_file():
        raise UsageError(f"{path} is no source; expected a folder of images or of shards, or a list: .csv or .jsonl")
    if path.is_dir() and any(path.glob("*.tar")):
        return open_shards(path.resolve(), jobs)
    return open_folder(path.resolve())
