"""Commands and files for other hosts by ssh, as pdsh reaches them."""

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONNECT_SECONDS = 5
AT_ONCE = 64
_WRITE_SECONDS = 30.0


def ssh_command(host: str, remote: str, port: int | None = None) -> list[str]:
    """A command that runs a line of shell on a host, with the user's own options for pdsh's ssh, and never asks."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    users = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    return ["ssh", *options, *users, *(["-p", str(port)] if port is not None else []), host, remote]


def put_on_hosts(hosts: Sequence[str], files: Mapping[Path, str], port: int | None = None) -> None:
    """Writes files on hosts, readable by their owner alone; contents travel on ssh's standard input.

    On a file system that hosts share each writes the same. What fails is found by who reads the file.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for file, text in files.items():
            list(pool.map(lambda host, file=file, text=text: _put(host, file, text, port), hosts))


def _put(host: str, file: Path, text: str, port: int | None) -> None:
    folder, name = shlex.quote(str(file.parent)), shlex.quote(str(file))
    remote = f"mkdir -p {folder} && umask 077 && cat > {name}.$$ && mv -f {name}.$$ {name}"
    try:
        subprocess.run(
            ssh_command(host, remote, port),
            input=text,
            text=True,
            capture_output=True,
            timeout=_WRITE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return
