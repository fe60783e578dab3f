"""The site file, YAML: what every job on a cluster needs: modules, variables, a container, options of sbatch."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError

from mixmae.base.errors import UsageError
from mixmae.trainer.recipe.sections.section import Section
from mixmae.trainer.recipe.words import explain
from mixmae.trainer.recipe.yaml_files import read_yaml

VARIABLE = "MIXMAE_SITE"
SEARCH_PATHS = (Path("~/.config/mixmae/site.yaml"), Path("/etc/mixmae/site.yaml"))
"""Searched in this order, after `--site` and the variable."""


def _one_line(text: str) -> str:
    if "\n" in text:
        raise ValueError("expected one line")
    return text


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("expected a variable's name")
    return name


def _option(text: str) -> str:
    if not _one_line(text).startswith("-"):
        raise ValueError("expected an option of sbatch, such as --constraint=a100")
    return text


Line = Annotated[str, AfterValidator(_one_line)]
Name = Annotated[str, AfterValidator(_variable)]
Option = Annotated[str, AfterValidator(_option)]


class Container(Section):
    """How ranks are started in a container: by one of these, or not at all."""

    srun: tuple[Option, ...] = ()
    """Options of srun, as enroot's pyxis has them: --container-image=..., --container-mounts=..."""
    prefix: tuple[Line, ...] = ()
    """Prepended to the command: apptainer, exec, --nv, image.sif"""


class Site(Section):
    partition: Line | None = None
    account: Line | None = None
    """Defaults for --partition and --account."""
    qos: Line | None = None
    modules: tuple[Line, ...] = ()
    """Loaded in this order, after `module purge`."""
    setup: tuple[Line, ...] = ()
    """Lines of shell, after the modules."""
    environment: Mapping[Name, Line] = Field(default_factory=dict)
    sbatch: tuple[Option, ...] = ()
    """Further options, one per line."""
    container: Container = Container()
    python: Line | None = None
    """On the nodes, or in the container; None: the one that runs `mixmae launch`."""


def find_site(given: Path | None, environment: Mapping[str, str]) -> Path | None:
    """The site file: as given, else as the variable names it, else the first of `SEARCH_PATHS` that exists.

    Raises:
        UsageError: the file that is named does not exist.
    """
    named = given or (Path(environment[VARIABLE]) if environment.get(VARIABLE) else None)
    if named is not None:
        if not named.is_file():
            source = f"--site {named}" if given else f"{VARIABLE}={named}"
            raise UsageError(f"{source}: no such file; docs/launching.md shows one")
        return named
    return next((file for path in SEARCH_PATHS if (file := path.expanduser()).is_file()), None)


def read_site(file: Path | None) -> Site:
    """The settings of a site file; all defaults without a file.

    Raises:
        UsageError: not YAML, an unknown key or a wrong value.
    """
    if file is None:
        return Site()
    content = read_yaml(file)
    try:
        return Site.model_validate({} if content is None else content)
    except ValidationError as error:
        raise UsageError(f"{file}: {explain(error, Site)}") from error
