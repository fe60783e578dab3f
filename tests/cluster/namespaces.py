"""Sets of namespaces, each held by one process that sleeps; commands inside them."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "MIXMAE_TEST_CLUSTER"
"""The environment variable, CLUSTER/HOST, by which a holder is found in the list of processes."""

_ENTER = ("--mount", "--uts", "--ipc", "--net", "--pid")
_PATIENCE = 20.0


@dataclass(frozen=True)
class Namespaces:
    """The namespaces of the process `pid`, which is their first process: when it dies, all inside them die."""

    pid: int

    def command(self, arguments: Sequence[str | Path], cwd: Path | None = None) -> list[str]:
        """The command line that runs `arguments` inside."""
        where = [] if cwd is None else [f"--wdns={cwd}"]
        return ["nsenter", f"--target={self.pid}", *_ENTER, *where, "--", *map(str, arguments)]

    def processes(self) -> Iterator[psutil.Process]:
        """Every process inside, other than the holder, those of namespaces further inside not included."""
        here = _pid_namespace(self.pid)
        for process in psutil.process_iter():
            if process.pid != self.pid and here is not None and _pid_namespace(process.pid) == here:
                yield process


class Process(subprocess.Popen[str]):
    """A command inside namespaces. Signals go to the command itself, not to the nsenter that waits for it."""

    def send_signal(self, sig: int) -> None:
        for child in self._children():
            os.kill(child, sig)

    def _children(self) -> list[int]:
        """The command's pid as the machine counts, in a list that is empty when the command has ended."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        while self.poll() is None:
            if found := children.read_text().split():
                return [int(pid) for pid in found]
            time.sleep(0.002)
        return []


def hold(mark: str, inside: Namespaces | None = None, with_parent: bool = False) -> Namespaces:
    """Makes new namespaces, whose processes are also in the process namespace of `inside`.

    Args:
        mark: CLUSTER/HOST, by which `find` knows the holder.
        inside: whose end is their end too.
        with_parent: they end when the thread that called this ends, however it ends.
    """
    # Ignoring SIGCHLD, the first process need not reap: what daemons leave behind never becomes a zombie.
    unshare = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    sleep = ["env", "--ignore-signal=CHLD", "sleep", "infinity"]
    before = ["nsenter", f"--target={inside.pid}", "--pid", "--"] if inside else []
    bound = ["setpriv", "--pdeathsig", "KILL"] if with_parent else []
    process = subprocess.Popen(
        [*bound, *before, *unshare, *sleep],
        env={"PATH": os.environ["PATH"], MARK: mark},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + _PATIENCE
    while mark not in (found := find(mark)):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no namespaces for {mark}: {' '.join(unshare)} ended with {process.returncode}")
        time.sleep(0.01)
    return found[mark]


def find(prefix: str) -> dict[str, Namespaces]:
    """The namespaces whose mark begins with `prefix`, by mark; only those that are ready for commands."""
    return {
        mark: Namespaces(process.pid)
        for process, mark in marked(prefix)
        if process.name() == "sleep" and _is_first(process.pid)
    }


def marked(prefix: str) -> list[tuple[psutil.Process, str]]:
    """Every process that makes or holds namespaces whose mark begins with `prefix`, with its mark."""
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK, "")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if mark.startswith(prefix):
            found.append((process, mark))
    return found


def end(prefix: str) -> None:
    """Ends the namespaces whose mark begins with `prefix`, half-made ones too, and all that runs in them."""
    deadline = time.monotonic() + _PATIENCE
    while processes := marked(prefix):
        if time.monotonic() > deadline:
            raise RuntimeError(f"still there after SIGKILL: {processes}")
        for process, _ in processes:
            _kill(process)
        psutil.wait_procs([process for process, _ in processes], timeout=1)


def _kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def _is_first(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1] == "1"


def _pid_namespace(pid: int) -> int | None:
    """Which process namespace it is in; None for a process that has ended or is not ours to look at."""
    try:
        return Path(f"/proc/{pid}/ns/pid").stat().st_ino
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def run_checked(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Runs a command of the machine; returns its output, raises RuntimeError with what it said if it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
