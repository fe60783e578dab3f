"""Who has a run: one launch, or one start by hand, at a time.

`owner.json` in the run directory names the process that has the run. It is there from the start to the end of that
process, which touches it every two seconds. Whoever starts the same run meanwhile is refused. After a crash the file
is left behind; the next start takes the run over once the process is certainly gone: on the same machine the kernel
knows, and of a process elsewhere nothing must have come for as long as after which a peer counts as lost. That is
measured by the clock of the one who waits, so clocks of hosts may differ. A Slurm job that was requeued follows itself.
"""

import fcntl
import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from mixmae.base.errors import UsageError
from mixmae.base.json_text import parse_json
from mixmae.base.liveness import HEARTBEAT_SECONDS, SILENT_SECONDS
from mixmae.base.run_directory import OWNER

HELD = "MIXMAE_RUN_HELD"
"""The environment variable of ranks whose launcher has the run for them."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """A process that has a run.

    Attributes:
        token: distinguishes it from every other.
        machine: equal for processes that see each other's ids.
        born: when the process began, in the kernel's ticks since that machine's start: its id may be used again.
        since: seconds since the epoch, by its host's clock.
        job: its Slurm job, empty without one.
        requeues: of that job, so far.
    """

    token: str
    host: str
    machine: str
    pid: int
    born: str
    since: float
    job: str = ""
    requeues: str = "0"

    @classmethod
    def this_process(cls, env: Mapping[str, str]) -> "Owner":
        job, requeues = env.get("SLURM_JOB_ID", ""), env.get("SLURM_RESTART_COUNT", "0")
        pid = os.getpid()
        return cls(secrets.token_hex(8), platform.node(), _machine(), pid, _born(pid) or "", time.time(), job, requeues)

    def describe(self) -> str:
        """`process 123 on node1 (job 41) since 2026-01-01 10:00:00`"""
        job = f" (job {self.job})" if self.job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}{job} since {since}"


class Holding:
    """A run that this process has, until `release`."""

    def __init__(self, run_dir: Path, owner: Owner, descriptor: int, made: bool = False) -> None:
        self._run_dir, self._owner, self._made = run_dir, owner, made
        self._released = threading.Event()
        threading.Thread(target=self._touch, args=(descriptor,), name="owner", daemon=True).start()

    def require(self) -> None:
        """Raises UsageError if another start took the run over."""
        now = _parse(_read(self._run_dir / OWNER))
        if now is not None and now != self._owner:
            raise UsageError(f"run_dir={self._run_dir} was taken over by {now.describe()}; this start ends here")

    def release(self) -> None:
        """Gives the run free, unless another start has taken it over; of a refused start no empty directory is left."""
        self._released.set()
        with suppress(OSError):
            if _parse(_read(self._run_dir / OWNER)) == self._owner:
                (self._run_dir / OWNER).unlink()
            if self._made:
                self._run_dir.rmdir()

    def _touch(self, descriptor: int) -> None:
        """In a thread of its own: storage that hangs must hold up nothing else."""
        while not self._released.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # a full or read-only disk; what comes of it, checkpoints will tell
                os.utime(descriptor)
        os.close(descriptor)


@contextmanager
def hold_run(run_dir: Path, take_over: bool = False, env: Mapping[str, str] = os.environ) -> Iterator[Holding]:
    """Has the run within the block.

    Args:
        take_over: whether to take it from a process that lives.

    Raises:
        UsageError: another process has it, or the run directory cannot be written.
    """
    holding = take_run(run_dir, Owner.this_process(env), take_over)
    try:
        yield holding
    finally:
        holding.release()


def take_run(run_dir: Path, owner: Owner, take_over: bool = False) -> Holding:
    """Makes `owner`, which is this process, the owner of a run. See `hold_run`."""
    file = run_dir / OWNER
    made = not run_dir.exists()
    try:
        while True:
            run_dir.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError, FileNotFoundError):  # one that a refused start had made is gone again
                descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                os.write(descriptor, json.dumps(asdict(owner)).encode() + b"\n")
                return Holding(run_dir, owner, descriptor, made)
            _evict(file, owner, take_over)
    except OSError as error:
        raise UsageError(f"cannot write {file} ({error.strerror}); name a run_dir that can be written") from error


def evict(run_dir: Path) -> None:
    """Takes a run from whoever has it; the next start finds it free."""
    (run_dir / OWNER).unlink(missing_ok=True)


def _evict(file: Path, successor: Owner, take_over: bool) -> None:
    """Removes what an owner left that is gone, or from whom the run is taken over."""
    content = _read(file)
    if content is None:
        return
    owner = _parse(content)
    if not take_over and _may_live(file, owner, successor):
        who = "another process" if owner is None else owner.describe()
        raise UsageError(
            f"run_dir={file.parent} is in use by {who}; watch it with 'mixmae watch {file.parent}', stop it, or "
            "start with --take-over to end it at its next checkpoint"
        )
    with suppress(FileNotFoundError), _locked(file) as record:  # another start was quicker
        if record.read() != content or not os.path.samestat(os.fstat(record.fileno()), file.stat()):
            return
        aside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        file.rename(aside)
        if aside.read_bytes() == content:
            aside.unlink()
        else:  # a start elsewhere, which this host's cache did not show yet, has the run already
            aside.rename(file)


@contextmanager
def _locked(file: Path) -> Iterator[BinaryIO]:
    """Of many starts that find the same record, one at a time has it open; its path may be another's meanwhile.

    Without it a start could find the path free just while another moves a successor's record aside to look at it.
    """
    with _open_to_lock(file) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            _logger.warning("%s cannot be locked (%s): start the run once", file, error.strerror)
        yield stream


def _open_to_lock(file: Path) -> BinaryIO:
    try:
        return file.open("r+b")  # NFS has exclusive locks for writers alone
    except PermissionError:
        return file.open("rb")


def _may_live(file: Path, owner: Owner | None, successor: Owner) -> bool:
    if owner is None:
        return not _is_silent(file, "somebody")
    if owner.job and owner.job == successor.job and owner.requeues != successor.requeues:
        return False
    if owner.machine == successor.machine:
        return _lives(owner)
    return not _is_silent(file, owner.describe())


def _lives(owner: Owner) -> bool:
    """Whether an owner on this machine is there."""
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, which /proc may hide
    return _born(owner.pid) in (owner.born, None)


def _is_silent(
    file: Path, who: str, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> bool:
    """Whether nobody touches a file for as long as an owner that lives never leaves it alone."""
    before, until = _sign(file), clock() + SILENT_SECONDS
    _logger.warning("%s was left by %s: watching for %.0f s whether that lives", file, who, SILENT_SECONDS)
    while clock() < until:
        sleep(HEARTBEAT_SECONDS / 2)
        if (now := _sign(file)) != before:
            return now is None  # released meanwhile
    return True


def _sign(file: Path) -> tuple[int, int] | None:
    """What changes when a file is touched or replaced; opened each time, since only that asks an NFS server anew."""
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _read(file: Path) -> bytes | None:
    with suppress(FileNotFoundError):
        return file.read_bytes()
    return None


def _parse(content: bytes | None) -> Owner | None:
    """What a file says; None where it is not there, not yet written, or not what an owner writes."""
    try:
        owner = Owner(**parse_json(content or b""))
        time.localtime(owner.since)
    except (ValueError, TypeError, OverflowError, OSError):
        return None
    words = (owner.token, owner.host, owner.machine, owner.born, owner.job, owner.requeues)
    sound = (
        type(owner.pid) is int
        and 0 < owner.pid < 2**31
        and all(type(word) is str and word.isprintable() for word in words)
    )
    return owner if sound else None


def _machine() -> str:
    """The running kernel and the space of process ids: containers of one host may differ in the latter."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{platform.node()} {secrets.token_hex(8)}"  # unlike every other: nothing is known of its processes


def _born(pid: int) -> str | None:
    """When a process began; empty once it has ended and waits for its parent, None where that cannot be seen."""
    try:
        _, _, fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return None
    state, *rest = fields.split()
    return "" if state in "ZX" else rest[18]
