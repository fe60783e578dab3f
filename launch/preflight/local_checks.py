"""Checks of this machine before `--local` starts ranks on it; those of hosts are the doctor's."""

from mixmae.base.errors import UsageError
from mixmae.base.files import what_is
from mixmae.base.machine import (
    require_shared_memory,
    require_temporary_folder,
    require_working_directory,
    require_writable,
)
from mixmae.trainer.recipe.schema import Recipe


def check_this_machine(recipe: Recipe, ranks: int) -> None:
    """
    Raises:
        UsageError: no shards, a run directory that cannot be written, or too little shared memory.
    """
    for directory in recipe.data.directories or ():
        if not directory.is_dir():
            raise UsageError(f"shard directory {directory} {what_is(directory)}; make one with 'mixmae shards build'")
    require_working_directory()
    require_temporary_folder()
    require_shared_memory(ranks * recipe.batch_bytes_ahead)
    require_writable(recipe.run_dir, "run_dir")
