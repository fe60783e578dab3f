"""A run that is alive is not taken over; one whose owner is gone is, without anybody's help."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import pytest

from mixmae.base import ownership
from mixmae.base.errors import UsageError
from mixmae.base.liveness import HEARTBEAT_SECONDS, SILENT_SECONDS
from mixmae.base.ownership import Holding, Owner, evict, hold_run, take_run
from mixmae.base.run_directory import OWNER
from tests.helpers import ROOT

OTHER = """
import sys
from pathlib import Path
from mixmae.base.ownership import hold_run
with hold_run(Path(sys.argv[1])):
    print("there", flush=True)
    input()
"""


@contextmanager
def another_process(run_dir: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that has the run."""
    command = [sys.executable, "-c", OTHER, str(run_dir)]
    with subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        try:
            yield process
        finally:
            process.kill()


def here(**changes: object) -> Owner:
    return replace(Owner.this_process({}), **changes)  # type: ignore[arg-type]


def left(run_dir: Path, owner: Owner) -> Holding:
    """What an owner leaves that is killed."""
    return take_run(run_dir, owner)


def waiting(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None]) -> list[float]:
    """Makes waiting take no time; `meanwhile` is called at each look. Returns how long was waited, by the clock."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        meanwhile()

    quick = ownership._is_silent
    monkeypatch.setattr(ownership, "_is_silent", lambda file, who: quick(file, who, lambda: now[0], sleep))
    return now


def never(*_: object) -> NoReturn:
    raise AssertionError("waited although the kernel knows")


def test_a_run_that_lives_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_is_silent", never)
    run = tmp_path / "run"
    with another_process(run) as other:
        refused = (
            rf"run_dir={run} is in use by process {other.pid} on \S+ since 2\d{{3}}-\S+ \S+; watch it .*--take-over"
        )
        with pytest.raises(UsageError, match=refused), hold_run(run):
            pass
        with hold_run(run, take_over=True) as ours:
            ours.require()
            other.communicate("\n", timeout=200)  # it ends, and leaves what is ours
            ours.require()
            assert (run / OWNER).exists()
    assert not (run / OWNER).exists()


def test_a_killed_owner_is_followed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_is_silent", never)
    with another_process(tmp_path) as other:
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # nobody has reaped it yet
        with hold_run(tmp_path):
            pass


def test_another_process_with_the_id_of_a_dead_one_is_not_the_owner(tmp_path: Path) -> None:
    left(tmp_path, here(born="1"))
    with hold_run(tmp_path):
        pass


@pytest.mark.parametrize("state", ["beats", "silent", "removed"])
def test_an_owner_elsewhere_lives_as_long_as_it_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """The clock of the other host does not matter: its beats are years old."""
    file, beats = tmp_path / OWNER, iter(range(10, 1000))
    far = left(tmp_path, here(machine="another", host="far", since=1e9))
    far._released.set()  # its thread would beat too

    def meanwhile() -> None:
        number = next(beats)
        if state == "beats" and number % 5 == 0:
            os.utime(file, (number, number))
        elif state == "removed":
            file.unlink(missing_ok=True)

    waited = waiting(monkeypatch, meanwhile)
    if state == "beats":
        with pytest.raises(UsageError, match=r"is in use by process \d+ on far since 2001-09-"), hold_run(tmp_path):
            pass
    elif state == "silent":
        with hold_run(tmp_path), pytest.raises(UsageError, match="was taken over by process"):
            far.require()
        assert SILENT_SECONDS <= waited[0] <= SILENT_SECONDS + HEARTBEAT_SECONDS
    else:
        with hold_run(tmp_path):
            pass


def test_an_owner_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "HEARTBEAT_SECONDS", 0.01)
    with hold_run(tmp_path):
        os.utime(tmp_path / OWNER, (1, 1))
        while (tmp_path / OWNER).stat().st_mtime == 1:
            pass


def test_a_requeued_job_follows_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_is_silent", lambda *_: False)
    job = {"SLURM_JOB_ID": "41"}
    left(tmp_path, replace(Owner.this_process(job), machine="another"))
    with pytest.raises(UsageError, match=r"\(job 41\)"), hold_run(tmp_path, env=job):
        pass  # another step of the same job
    with pytest.raises(UsageError, match=r"\(job 41\)"), hold_run(tmp_path, env={"SLURM_JOB_ID": "42"}):
        pass
    with hold_run(tmp_path, env={**job, "SLURM_RESTART_COUNT": "1"}):
        pass


TRUE = asdict(Owner.this_process({}))
LIES = [{**TRUE, "host": "\x1b[2J"}, {**TRUE, "pid": -1}, {**TRUE, "since": 1e99}]


@pytest.mark.parametrize("content", ["", "{", '{"token": 1}', *map(json.dumps, LIES)])
def test_a_damaged_record_holds_nobody_up_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (tmp_path / OWNER).write_text(content)
    waiting(monkeypatch, lambda: None)
    with hold_run(tmp_path):
        pass


def test_of_many_starts_at_once_one_has_the_run(tmp_path: Path) -> None:
    left(tmp_path, here(born="1"))
    barrier, won, lost = threading.Barrier(8), [], []

    def start() -> None:
        barrier.wait()
        try:
            won.append(take_run(tmp_path, here()))
        except UsageError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)
    won[0].require()
    won[0].release()
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_wrote_nothing_leaves_no_directory(tmp_path: Path) -> None:
    with hold_run(tmp_path / "run"):
        assert (tmp_path / "run" / OWNER).exists()
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with hold_run(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_an_evicted_owner_stays_away(tmp_path: Path) -> None:
    with hold_run(tmp_path) as before:
        evict(tmp_path)
        before.require()  # nobody has come yet
        with hold_run(tmp_path), pytest.raises(UsageError, match="was taken over"):
            before.require()
    evict(tmp_path)
