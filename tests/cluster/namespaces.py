"""Sets of Linux namespaces, each held open by one sleeping process, and commands inside them."""

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
"""Environment variable of a holder process, CLUSTER/HOST, to find it in the process list."""

_TIMEOUT = 100.0
_CLONE_NEWPID = 0x20000000  # from <sched.h>; os.setns needs Python 3.12
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Namespaces:
    """The namespaces of the holder `pid`, their init process: when it dies, the kernel kills all processes inside."""

    pid: int

    def popen(self, command: Sequence[str | Path], cwd: Path, **options: Any) -> "subprocess.Popen[str]":
        """Starts a command inside; its pid is that of the machine's PID namespace. `options` are Popen's."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--ipc", "--net", f"--wdns={cwd}", "--"]
        with self._children_inside():
            return subprocess.Popen([*enter, *map(str, command)], text=True, **options)

    def processes(self) -> Iterator[psutil.Process]:
        """Every process inside, except the holder and processes of nested PID namespaces."""
        own = _pid_namespace(self.pid)
        for process in psutil.process_iter():
            if process.pid != self.pid and own is not None and _pid_namespace(process.pid) == own:
                yield process

    @contextmanager
    def _children_inside(self) -> Iterator[None]:
        """Starts the thread's child processes directly in the PID namespace."""
        # nsenter --pid forks and stays as the parent: it would receive the signals, and stop when its child is stopped.
        _set_child_pid_namespace(self.pid)
        try:
            yield
        finally:
            _set_child_pid_namespace(os.getpid())


def hold(mark: str, inside: Namespaces | None = None, with_parent: bool = False) -> Namespaces:
    """Creates namespaces, nested in the PID namespace of `inside`.

    Args:
        mark: CLUSTER/HOST, by which `find` recognizes the holder.
        inside: namespaces to nest in; they end together.
        with_parent: the holder is killed when the calling thread exits for any reason.
    """
    # With SIGCHLD ignored the kernel reaps orphans of daemons, so that none becomes a zombie.
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
    deadline = time.monotonic() + _TIMEOUT
    with process.stderr:
        while mark not in (found := find(mark)):
            if process.poll() is not None:
                raise RuntimeError(f"no namespaces for {mark}: {process.stderr.read().decode().strip()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no namespaces for {mark} after {_TIMEOUT} s")
            time.sleep(0.01)
    return found[mark]


def find(prefix: str) -> dict[str, Namespaces]:
    """Namespaces whose mark begins with `prefix`, by mark; only those ready for commands."""
    return {mark: Namespaces(process.pid) for process, mark in holders_of(prefix) if _is_ready_holder(process.pid)}


def holders_of(prefix: str) -> list[tuple[psutil.Process, str]]:
    """Every process that creates or holds namespaces whose mark begins with `prefix`, with its mark."""
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
    """Kills the namespaces whose mark begins with `prefix`, including incomplete ones, and all processes in them."""
    deadline = time.monotonic() + _TIMEOUT
    while processes := holders_of(prefix):
        if time.monotonic() > deadline:
            raise RuntimeError(f"still running after SIGKILL: {processes}")
        for process, _ in processes:
            _kill(process)
        psutil.wait_procs([process for process, _ in processes], timeout=1)


def _kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def _set_child_pid_namespace(pid: int) -> None:
    """Makes the thread's future children start in the PID namespace of `pid`."""
    with Path(f"/proc/{pid}/ns/pid").open() as namespace:
        if _libc.setns(namespace.fileno(), _CLONE_NEWPID):
            raise OSError(ctypes.get_errno(), f"setns to the PID namespace of {pid}")


def _is_ready_holder(pid: int) -> bool:
    """Whether it is the init process of its namespace and has exec'd `sleep`."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return status["Name"] == "sleep" and status["NSpid"].split()[-1] == "1"


def _pid_namespace(pid: int) -> int | None:
    """Inode of its PID namespace; None if the process has exited or access is denied."""
    try:
        return Path(f"/proc/{pid}/ns/pid").stat().st_ino
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def run_checked(command: Sequence[str]) -> None:
    """Runs a command on the machine. Raises RuntimeError with its stderr if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
