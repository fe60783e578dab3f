"""The recipes that ship with the package, found by name: `pretrain/swin_huge`."""

import difflib
import socket
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.base.files import what_is
from mixmae.trainer.recipe.frozen import is_frozen

_SUFFIX = ".yaml"


@dataclass(frozen=True)
class LibraryRecipe:
    """A recipe of the package.

    Attributes:
        name: its path below configs/, without the suffix.
    """

    name: str
    file: Path

    @property
    def head(self) -> list[str]:
        """Its first comment lines: the command that runs it, then what it is, costs and gives."""
        lines = self.file.read_text().splitlines()
        end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
        return [line.removeprefix("#").strip() for line in lines[:end]]

    @property
    def summary(self) -> str:
        """The first sentence that describes it."""
        sentence, end, _ = " ".join(self.head[1:]).partition(". ")
        return sentence + end.rstrip()


def library() -> dict[str, LibraryRecipe]:
    """All recipes of the package by name, in the order of their names."""
    root = Path(str(resources.files("mixmae") / "configs"))
    files = sorted(root.rglob(f"*{_SUFFIX}"))
    names = [file.relative_to(root).with_suffix("").as_posix() for file in files]
    return {name: LibraryRecipe(name, file) for name, file in zip(names, files, strict=True)}


def find_recipe(recipe: Path) -> Path:
    """The file of a recipe that is given as a path, or by its name in the library.

    Raises:
        UsageError: it is neither; the message says the nearest name.
    """
    if recipe.is_file():
        return recipe
    if is_frozen(recipe):
        raise UsageError(
            f"recipe {recipe}, which 'mixmae launch' wrote at submission, is not seen on {socket.gethostname()}; "
            "run_dir must be one directory on all hosts, and stay until the run has ended"
        )
    known = library()
    if recipe.as_posix() in known:
        return known[recipe.as_posix()].file
    raise UsageError(
        f"recipe {recipe} {what_is(recipe)}, and is not in the library either{_nearest(recipe, list(known))}; "
        "'mixmae recipes' lists the library"
    )


def _nearest(recipe: Path, names: list[str]) -> str:
    given = recipe.with_suffix("").as_posix() if recipe.suffix == _SUFFIX else recipe.as_posix()
    same_last_part = [name for name in names if Path(name).name == Path(given).name]
    nearest = same_last_part or difflib.get_close_matches(given, names, n=1, cutoff=0.4)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
