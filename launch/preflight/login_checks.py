"""Checks from the login node, before anything starts elsewhere: batch size, host names, ssh, Slurm's nodes."""

import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.launch.backends.hostfile_parser import HostSlots
from mixmae.launch.backends.module_path import module_path_in_shell
from mixmae.launch.backends.slurm_script import SlurmRequest
from mixmae.launch.backends.ssh import AT_ONCE, ssh_command
from mixmae.trainer.doctor.protocol.findings import Finding, Level, abbreviate
from mixmae.trainer.recipe.schema import Recipe

_ANSWER_SECONDS = 30.0
_LEAVE_ONE = "leave one of these lines in the hostfile, with all its slots"
_NO_FOLDER, _NO_PYTHON, _NO_PROJECT = 71, 72, 73
"""Exit codes of what is run on a host; 255 is ssh's own."""
_PROBE = f"""
import importlib.util, os, socket, sys
with open("/proc/sys/kernel/random/boot_id") as file:
    boot = file.read().strip()
print("mixmae-host", boot, os.stat("/proc/self/ns/net").st_ino, socket.gethostname())
sys.exit(0 if importlib.util.find_spec("mixmae") else {_NO_PROJECT})
"""
"""The second and third word identify a machine, whatever its name."""


def check_batch(recipe: Recipe, ranks: int) -> Iterator[Finding]:
    """Whether the global batch and the data streams divide among the ranks."""
    try:
        steps = recipe.accumulation(ranks)
        recipe.streams_of(0, ranks)
    except UsageError as error:
        yield Finding(Level.ERROR, "batch", f"{ranks} ranks", str(error), advice="change the recipe, or the ranks")
        return
    train = recipe.train
    found = f"{train.global_batch} images = {train.micro_batch} x {ranks} ranks x {steps} micro-steps"
    yield Finding(Level.OK, "batch", f"{ranks} ranks", found)


def check_names(hosts: HostSlots) -> Iterator[Finding]:
    """Whether all host names resolve here, each to another address."""
    by_address: dict[str, list[str]] = {}
    for name in hosts.slots:
        try:
            by_address.setdefault(str(socket.getaddrinfo(name, None)[0][4][0]), []).append(name)
        except OSError as error:
            found = f"its name does not resolve here ({error.strerror})"
            advice = "correct the hostfile, or add the name to DNS or /etc/hosts"
            yield Finding(Level.ERROR, "host", name, found, "an address", advice)
    for address, names in by_address.items():
        if len(names) > 1:
            yield Finding(Level.ERROR, "host", abbreviate(names), f"all are {address}", "another host each", _LEAVE_ONE)


@dataclass(frozen=True)
class Answer:
    """What a host answered over ssh.

    Attributes:
        machine: identifies the machine; empty if the host did not answer.
        code: exit code of ssh; None if it did not end in time.
        errors: its standard error.
    """

    host: str
    machine: str
    code: int | None
    errors: str


def ask(host: str, ssh_port: int | None = None) -> Answer:
    """Runs this Python in this directory of a host by ssh, as DeepSpeed's launcher will."""
    here, python = shlex.quote(str(Path.cwd())), shlex.quote(sys.executable)
    remote = (
        f"cd {here} || exit {_NO_FOLDER}; test -x {python} || exit {_NO_PYTHON}; "
        f"{module_path_in_shell()} {python} -c {shlex.quote(_PROBE)}"
    )
    try:
        done = subprocess.run(
            ssh_command(host, remote, ssh_port),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(host, "", None, "")
    words = next((line.split() for line in done.stdout.splitlines() if line.startswith("mixmae-host ")), None)
    return Answer(host, " ".join(words[1:3]) if words else "", done.returncode, done.stderr)


def check_hosts(hosts: HostSlots, ssh_port: int | None = None) -> Iterator[Finding]:
    """Whether every host can be reached, is another machine, and has Python and mixmae where this one has them."""
    started = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda host: ask(host, ssh_port), hosts.slots))
    seconds = time.monotonic() - started
    troubles = [trouble for answer in answers if (trouble := explain(answer)) is not None]
    yield from troubles
    by_machine: dict[str, list[str]] = {}
    for answer in answers:
        if answer.machine:
            by_machine.setdefault(answer.machine, []).append(answer.host)
    for names in by_machine.values():
        if len(names) > 1:
            yield Finding(Level.ERROR, "host", abbreviate(names), "are one machine", "another host each", _LEAVE_ONE)
    if not troubles:
        yield Finding(Level.OK, "ssh", f"{len(answers)} hosts", f"all answered within {seconds:.1f} s")


def explain(answer: Answer) -> Finding | None:
    """What is wrong with a host; None if nothing is."""
    if answer.code == 0:
        return None
    found, advice = _describe(answer)
    return Finding(Level.ERROR, "ssh", answer.host, found, "an answer without a password", advice)


_CAUSES = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", "its host key has changed",
     "if it was reinstalled: ssh-keygen -R {host}, then ssh {host} once by hand; otherwise do not trust it"),
    ("Host key verification failed", "its host key is unknown here",
     "ssh {host} once by hand and compare the key, or add it: ssh-keyscan {host} >> ~/.ssh/known_hosts"),
    ("Permission denied", "it refuses your key", "ssh-copy-id {host}; a key with a passphrase needs ssh-agent"),
    ("Could not resolve hostname", "its name does not resolve here", "correct the hostfile, or add the name to DNS or "
     "/etc/hosts"),
    ("Connection refused", "nothing listens for ssh there", "start sshd there, or give its port with --ssh-port"),
    ("No route to host", "there is no route to it", "check that it is up, and check its network"),
    ("timed out", "it does not answer", "check that it is up, and that no firewall drops ssh"),
    ("Connection reset", "it drops connections", "check its sshd's log: MaxStartups, or a firewall"),
    ("Connection closed", "it drops connections", "check its sshd's log: MaxStartups, or a full host"),
)  # fmt: skip
"""What ssh prints, what it means, and what to do."""


def _describe(answer: Answer) -> tuple[str, str]:
    host = answer.host
    if answer.code is None:
        return f"no answer within {_ANSWER_SECONDS:.0f} s", f"ssh {host} by hand; a file system or login script hangs"
    if answer.code == _NO_FOLDER:
        return f"it has no {Path.cwd()}", "start from a folder that all hosts share"
    if answer.code == _NO_PYTHON:
        return f"it has no {sys.executable}", "install the same environment at the same path on every host"
    if answer.code == _NO_PROJECT:
        return "its Python does not find mixmae", "pip install it there, or start from a checkout in a shared folder"
    for words, found, advice in _CAUSES:
        if words in answer.errors:
            return found, advice.format(host=host)
    said = answer.errors.strip().splitlines() or [f"exit code {answer.code}"]
    return said[-1], f"ssh {host} by hand, and fix what it reports"


_USABLE = re.compile(r"(idle|mixed|allocated|completing|planned|reserved|blocked)[-+~#!%$@^]*")
"""States of nodes that can run a job, now or later; a star behind a state is a node that does not answer."""


def check_slurm(request: SlurmRequest, partition: str | None) -> Iterator[Finding]:
    """Whether Slurm answers, and has enough nodes that are not down."""
    where = f"partition {partition}" if partition is not None else "all partitions"
    command = ["sinfo", "--noheader", "--Node", "--format=%N %T", *([f"--partition={partition}"] if partition else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False)
    except FileNotFoundError:
        advice = "run this on a login node of the cluster"
        yield Finding(Level.ERROR, "Slurm", "here", "sinfo is not on PATH", "Slurm's commands", advice)
        return
    except subprocess.TimeoutExpired:
        advice = "check that slurmctld runs ('scontrol ping')"
        yield Finding(Level.ERROR, "Slurm", where, f"no answer within {_ANSWER_SECONDS:.0f} s", "its nodes", advice)
        return
    if done.returncode:
        advice = "check that slurmctld runs ('scontrol ping')"
        yield Finding(Level.ERROR, "Slurm", where, " ".join(done.stderr.split()), "its nodes", advice)
        return
    usable, unusable = sort_nodes(done.stdout)
    found = f"{len(usable)} usable nodes" + (f", {len(unusable)} not: {abbreviate(unusable)}" if unusable else "")
    if len(usable) < request.nodes:
        advice = "wait for nodes ('sinfo --list-reasons' says why), ask for fewer, or name another partition"
        yield Finding(Level.ERROR, "Slurm", where, found, f"{request.nodes} nodes", advice)
    else:
        yield Finding(Level.OK, "Slurm", where, found)


def sort_nodes(listed: str) -> tuple[list[str], list[str]]:
    """Nodes that can run a job, and those that cannot with their states; `listed` has a name and a state a line."""
    states = dict(line.split()[:2] for line in listed.splitlines() if line.strip())
    usable = [node for node, state in states.items() if _USABLE.fullmatch(state)]
    return usable, [f"{node} ({state})" for node, state in states.items() if node not in usable]
