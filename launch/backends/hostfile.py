"""Ranks on the hosts of a hostfile, under DeepSpeed's launcher with pdsh over ssh."""

import ipaddress
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.launch.backends.hostfile_parser import HostSlots
from mixmae.launch.backends.job_spec import Attempt, Command, JobSpec
from mixmae.launch.backends.module_path import module_path
from mixmae.launch.backends.remote_environment import (
    environment_file,
    exported_by_deepspeed,
    exported_variables,
    is_setting,
    quote_for_pdsh,
)
from mixmae.launch.backends.ssh import put_on_hosts
from mixmae.launch.supervision.token import TOKEN

_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]*")
_CONNECT_SECONDS, _COMMAND_SECONDS = 5, 20
_ALIVE = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3"
"""Ends ssh to a host that has become unreachable; nothing else would."""


@dataclass(frozen=True)
class HostfileBackend:
    """A rank for each slot of some hosts.

    Attributes:
        address: of the first host, as all hosts and this one reach it.
    """

    hosts: HostSlots
    address: str
    ssh_port: int | None = None

    @property
    def ranks(self) -> int:
        return self.hosts.ranks

    def command(self, job: JobSpec, attempt: Attempt, environment: Mapping[str, str]) -> Command:
        """The command that starts the ranks.

        DeepSpeed gets a hostfile and a file of environment variables that we write, so that it starts what was checked
        here; the user's own files are left alone. It exports variables on the hosts' command lines, which all users
        see: only settings go that way, what may be secret is in a file.

        Args:
            environment: this process's.

        Raises:
            UsageError: the working directory, Python or a variable cannot be passed to a shell on other hosts.
        """
        here = str(Path.cwd())
        _require_plain("working directory", here)
        _require_plain("Python", sys.executable)
        variables = {**exported_variables(environment, Path.home(), Path.cwd()), TOKEN: attempt.secret}
        variables |= module_path(variables)
        early = {name: value for name, value in variables.items() if is_setting(name)}
        private = {name: value for name, value in variables.items() if name not in early}
        folder = attempt.folder(job.run_dir).absolute()
        hostfile, exports, secrets = folder / "hostfile", folder / "environment", folder / "environment.json"
        slots = self.hosts.slots
        include = "@".join(f"{host}:{','.join(map(str, numbers))}" for host, numbers in slots.items())
        runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--include", include]
        where = ["--force_multi", "--master_addr", self.address, "--master_port", str(attempt.port), "--no_local_rank"]
        ssh = ["--ssh_port", str(self.ssh_port)] if self.ssh_port is not None else []
        rank = job.rank_arguments(self.ranks, attempt.name, str(attempt.port), launcher=True, environment=secrets)
        return Command(
            [*runner, *where, *ssh, "--module", "mixmae.launch.supervision.rank", *map(quote_for_pdsh, rank)],
            {
                **module_path(environment),
                "DS_ENV_FILE": str(exports),
                "PDSH_SSH_ARGS_APPEND": f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {_ALIVE}",
            },
            {
                hostfile: "".join(f"{host} slots={max(numbers) + 1}\n" for host, numbers in slots.items()),
                exports: environment_file(early),
            },
            {secrets: json.dumps(private), **job.private},
            [name for name in environment if exported_by_deepspeed(name) and name not in early],
        )

    def distribute(self, files: Mapping[Path, str]) -> None:
        """Writes files for their owner alone on all hosts that answer; those that do not are told by the start."""
        put_on_hosts(list(self.hosts.slots), files, self.ssh_port)

    def kill_leftovers(self, attempt: Attempt) -> None:
        """Kills what a start may have left running on hosts that did not hear of its end."""
        pattern = f"[-]-attempt {re.escape(attempt.name)}"  # the brackets keep it from matching this command itself
        ends = [f"pkill -{name} -f -- {shlex.quote(pattern)}" for name in ("TERM", "KILL")]
        self.run_on_all_hosts(f"{ends[0]}; sleep 2; {ends[1]}")

    def run_on_all_hosts(self, command: str) -> None:
        """Runs a short shell command on all hosts that answer; its output is dropped."""
        pdsh = ["pdsh", "-t", str(_CONNECT_SECONDS), "-u", str(_COMMAND_SECONDS), "-w", ",".join(self.hosts.slots)]
        environment = {**os.environ, "PDSH_RCMD_TYPE": "ssh"}
        if self.ssh_port is not None:
            environment["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} -p {self.ssh_port}"
        # Its errors are about hosts that are known to be down by now.
        subprocess.run([*pdsh, command], env=environment, capture_output=True, check=False)


def require_pdsh() -> None:
    """Raises UsageError where pdsh is missing."""
    if shutil.which("pdsh") is None:
        raise UsageError("pdsh is not on PATH; --hostfile needs it (apt-get install pdsh, dnf install pdsh-rcmd-ssh)")


def master_address(hosts: HostSlots) -> str:
    """The address of the first host, as this host resolves it.

    Raises:
        UsageError: a name does not resolve here.
    """
    first = _resolve(hosts.first)
    others = [name for name in hosts.slots if name != hosts.first]
    if not ipaddress.ip_address(first).is_loopback or not others:
        return first
    # This host is the first, and its name is that of its loopback interface: ask for the route to the second.
    other = _resolve(others[0])
    with socket.socket(socket.AF_INET6 if ":" in other else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # sends nothing
        return str(probe.getsockname()[0])


def _resolve(name: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UsageError(
            f"host {name} of the hostfile does not resolve here ({error.strerror}); correct the hostfile, or give the "
            "first host's address with --master-addr"
        ) from error


def _require_plain(what: str, path: str) -> None:
    if not _PLAIN.fullmatch(path):
        raise UsageError(
            f"{what} {path!r} has characters that a shell on other hosts would change; use a path of letters, digits "
            "and ._-/ only"
        )
