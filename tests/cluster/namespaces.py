"""Sets of namespaces, each held by one process that sleeps; commands inside them."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

MARK = "MIXMAE_TEST_CLUSTER"
"""The environment variable, CLUSTER/HOST, by which a holder is found in the list of processes."""

_PATIENCE = 100.0
_CLONE_NEWPID = 0x20000000  # of <sched.h>; os.setns comes with Python 3.12
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Namespaces:
    """The namespaces of the process `pid`, which is their first process: when it dies, all inside them die."""

    pid: int

    def popen(self, command: Sequence[str | Path], cwd: Path, **options: Any) -> "subprocess.Popen[str]":
        """Starts a command inside; its pid here is the one by which the machine knows it. `options` are Popen's."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--ipc", "--net", f"--wdns={cwd}", "--"]
        with self._children_inside():
            return subprocess.Popen([*enter, *map(str, command)], text=True, **options)

    def processes(self) -> Iterator[psutil.Process]:
        """Every process inside, other than the holder, those of namespaces further inside not included."""
        here = _pid_namespace(self.pid)
        for process in psutil.process_iter():
            if process.pid != self.pid and here is not None and _pid_namespace(process.pid) == here:
                yield process

    @contextmanager
    def _children_inside(self) -> Iterator[None]:
        """The processes that this thread starts are in the process namespace, without a process between."""
        # nsenter --pid would stay as the parent: signals would go to it, and it would stop when its child is stopped.
        _children_go_to(self.pid)
        try:
            yield
        finally:
            _children_go_to(os.getpid())


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
    bound = ["setpriv", "--pdeathsig", "KILL"] if with_parent else []
    with inside._children_inside() if inside else nullcontext():
        process = subprocess.Popen(
            [*bound, *unshare, *sleep],
            env={"PATH": os.environ["PATH"], MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the holder would keep a caller's pipe open
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    assert process.stderr is not None
    deadline = time.monotonic() + _PATIENCE
    with process.stderr:
        while mark not in (found := find(mark)):
            if process.poll() is not None:
                raise RuntimeError(f"no namespaces for {mark}: {process.stderr.read().decode().strip()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no namespaces for {mark} after {_PATIENCE} s")
            time.sleep(0.01)
    return found[mark]


def find(prefix: str) -> dict[str, Namespaces]:
    """The namespaces whose mark begins with `prefix`, by mark; only those that are ready for commands."""
    return {mark: Namespaces(process.pid) for process, mark in marked(prefix) if _is_ready_holder(process.pid)}


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


def _children_go_to(pid: int) -> None:
    """The processes that this thread starts from now on are in the process namespace of `pid`."""
    with Path(f"/proc/{pid}/ns/pid").open() as namespace:
        if _libc.setns(namespace.fileno(), _CLONE_NEWPID):
            raise OSError(ctypes.get_errno(), f"setns to the process namespace of {pid}")


def _is_ready_holder(pid: int) -> bool:
    """Whether it is the first process of its namespace and has come to its sleep."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return status["Name"] == "sleep" and status["NSpid"].split()[-1] == "1"


def _pid_namespace(pid: int) -> int | None:
    """Which process namespace it is in; None for a process that has ended or is not ours to look at."""
    try:
        return Path(f"/proc/{pid}/ns/pid").stat().st_ino
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def run_checked(command: Sequence[str]) -> None:
    """Runs a command of the machine. Raises RuntimeError with what it said if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
