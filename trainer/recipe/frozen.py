"""The recipe as it was when a launch was typed: resolved once, written under the run directory, read by all ranks.

Editing the YAML while a job is queued, or between two restarts, changes nothing.
"""

import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import LAUNCHES
from mixmae.trainer.recipe.schema import Recipe


def frozen_file(run_dir: Path, launch: str) -> Path:
    """Where the recipe of a launch lies."""
    return run_dir / LAUNCHES / f"{launch}.yaml"


def is_frozen(file: Path) -> bool:
    """Whether a path is one of `frozen_file`."""
    return file.parent.name == LAUNCHES


@dataclass(frozen=True)
class FrozenRecipes:
    """The recipes of one launch: one, or those of all tasks of an array.

    Attributes:
        launch: names the launch in all its run directories.
        typed: the command line behind `mixmae launch`.
    """

    launch: str
    recipes: Sequence[Recipe]
    typed: Sequence[str]

    def text(self, recipe: Recipe) -> str:
        """What ranks read, below the command and the version that it comes from."""
        command = "".join(char if char.isprintable() else " " for char in shlex.join(self.typed))
        head = (
            f"# mixmae launch {command}\n# resolved by mixmae {version('mixmae')}; ranks read this file and no other\n"
        )
        return head + recipe.to_yaml()

    def write(self) -> None:
        """Writes each recipe into its run directory.

        Raises:
            UsageError: it cannot be written, or another launch has the name.
        """
        for recipe in self.recipes:
            file = frozen_file(recipe.run_dir, self.launch)
            try:
                if not file.parent.is_dir():
                    file.parent.mkdir(parents=True)
                # The one copy that holds credentials in URLs is its owner's alone.
                descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w") as opened:
                    opened.write(self.text(recipe))
            except FileExistsError as error:
                raise UsageError(
                    f"another launch has been writing into run_dir={recipe.run_dir} since this second; start a run once"
                ) from error
            except OSError as error:
                raise UsageError(
                    f"cannot write {file} ({error.strerror}); name a run_dir that can be written"
                ) from error


def freeze(recipes: Sequence[Recipe], typed: Sequence[str]) -> FrozenRecipes:
    """The recipes of a launch under a new name; nothing is written yet."""
    launch = base = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    number = 1
    while any(frozen_file(recipe.run_dir, launch).exists() for recipe in recipes):
        number += 1
        launch = f"{base}-{number}"
    return FrozenRecipes(launch, recipes, typed)
