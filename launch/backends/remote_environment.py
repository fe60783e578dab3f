"""Which environment variables are exported to other hosts, and how they and arguments survive pdsh, ssh and shells."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from mixmae.base.errors import UsageError

_SETTINGS = ("CUDA_", "DS_", "FI_", "GLOO_", "NCCL_", "OMP_", "PYTHON", "PYTORCH_", "TORCH_", "TRITON_", "UCX_")
_FAMILIES = (*_SETTINGS, "MIXMAE_")
_SINGLE = ("LD_LIBRARY_PATH", "PATH")
_DEEPSPEED = ("MLFLOW", "MV2", "NCCL", "PYTHON", "UCX")
"""What DeepSpeed's runner exports by itself, as it is: the other host's shell would run a `$(...)` in it."""
_OWN = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")
"""Of these families, but not exported: DeepSpeed sets the first on each host, and the second is about this one."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FILE, _FILE_VARIABLE = ".deepspeed_env", "DS_ENV_FILE"


def exported_variables(environment: Mapping[str, str], home: Path, here: Path) -> dict[str, str]:
    """The variables for ranks on other hosts: those of known families, then those of the user's files.

    Raises:
        UsageError: a file has a line that is neither `NAME=value` nor empty nor a comment.
    """
    found = {
        name: value
        for name, value in environment.items()
        if (name.startswith(_FAMILIES) or name in _SINGLE) and name not in _OWN
    }
    for file in _users_files(environment, home, here):
        found.update(_read(file))
    return found


def is_setting(name: str) -> bool:
    """Whether a variable configures a library or Python, and so is no secret; it may be needed to start Python."""
    return name.startswith(_SETTINGS) or name in _SINGLE


def exported_by_deepspeed(name: str) -> bool:
    """Whether DeepSpeed's runner would export this variable without being asked."""
    return name.startswith(_DEEPSPEED)


def _users_files(environment: Mapping[str, str], home: Path, here: Path) -> list[Path]:
    """The files that DeepSpeed reads, in its order."""
    name = environment.get(_FILE_VARIABLE, _FILE)
    return [file for folder in dict.fromkeys((home, here)) if (file := folder / name).is_file()]


def _read(file: Path) -> dict[str, str]:
    found = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not _NAME.fullmatch(name.strip()):
            raise UsageError(f"{file}, line {number}: {line!r}: expected NAME=value, such as NCCL_DEBUG=INFO")
        found[name.strip()] = value.strip()
    return found


def environment_file(variables: Mapping[str, str]) -> str:
    """A file from which DeepSpeed exports exactly these variables.

    It puts values in double quotes if they have special characters, escapes nothing in them, and pdsh replaces some
    letters behind a percent sign.

    Raises:
        UsageError: a value does not fit on a line.
    """
    for name, value in variables.items():
        if value != value.strip() or "\n" in value:
            raise UsageError(f"{name}={value!r} begins or ends with a space, or has several lines; it cannot be passed "
                             "to other hosts: change or unset it")  # fmt: skip
    return "".join(f"{name}={_in_double_quotes(value)}\n" for name, value in variables.items())


def quote_for_pdsh(argument: str) -> str:
    """Quotes an argument so that it survives DeepSpeed, pdsh and the other host's shell.

    DeepSpeed puts arguments with a space in double quotes and escapes double quotes there; others it leaves bare.
    """
    if " " in argument:
        return re.sub(r"([\\$`])", r"\\\1", argument).replace("%", "%%")
    return shlex.quote(argument).replace("%", "%%")


def _in_double_quotes(value: str) -> str:
    return re.sub(r'([\\$`"])', r"\\\1", value).replace("%", "%%")
