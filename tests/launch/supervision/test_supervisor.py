"""Supervisors with fake ranks on loopback: every end of a rank ends the run, in words, and leaves nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mixmae.base.exit_codes import FAILED, FINISHED, PREEMPTED, USAGE_ERROR
from mixmae.launch.supervision.outcome import ENDED, Exit
from tests.launch.ranks import Started, processes_of, started
from tests.launch.supervision.test_processes import eventually

pytestmark = pytest.mark.distributed


def stepping(run: Started) -> bool:
    """Waits until all ranks are past their start."""
    return eventually(lambda: all("rank" in run.log(rank) for rank in range(len(run.supervisors))))


def test_a_run_finishes(tmp_path: Path) -> None:
    with started(tmp_path, 3, "steps=5", f"run_dir={tmp_path}") as run:
        assert run.codes() == [FINISHED] * 3
        assert (run.outcome().code, run.outcome().step) == (FINISHED, 4)
        console = run.supervisors[0].communicate()[0]
    assert console == run.log(0)  # rank 0's output is the console's, whole
    assert "rank 0 of 3" in console
    assert "rank 2 of 3" in run.log(2)
    assert not processes_of(tmp_path)


@pytest.mark.parametrize(
    ("how", "code", "reason", "line"),
    [
        ("error", FAILED, "rank 1 on {host} ended with exit code 1", "RuntimeError: injected error"),
        (
            "kill",
            FAILED,
            "rank 1 on {host} was killed by SIGKILL; the kernel does that when the host runs out of memory",
            "port",
        ),
        (
            "leak-child",
            FAILED,
            "rank 1 on {host} was killed by SIGKILL; the kernel does that when the host runs out of memory",
            "port",
        ),
        ("hang", FAILED, "stuck: no progress for", "in fail"),
        ("stop", FAILED, "stuck: no progress for", "port"),
    ],
)
def test_one_failed_rank_ends_all_and_is_named(tmp_path: Path, how: str, code: int, reason: str, line: str) -> None:
    host = os.uname().nodename
    settings = ["at=5", "rank=1", f"how={how}", f"run_dir={tmp_path}"]
    with started(tmp_path, 3, *settings, stuck=8.0 if how in ("hang", "stop") else 100.0) as run:
        assert run.codes() == [code] * 3
        outcome = run.outcome()
    assert outcome.reason.startswith(reason.format(host=host))
    assert (outcome.rank, outcome.host, outcome.log) == (1, host, str(run.folder / "rank-00001.log"))
    assert any(line in text for text in outcome.lines)
    assert outcome.final_message().splitlines()[-1] == f"mixmae: error: {outcome.reason}"
    if how == "hang":
        assert "the straggler is rank 1" in outcome.reason
        assert "it is in data_wait of step 6" in outcome.reason
    if how == "error":
        assert "in wait" in run.log(0)  # where those hung that waited for it
    assert not processes_of(tmp_path)


def test_a_usage_error_keeps_its_exit_code(tmp_path: Path) -> None:
    with started(tmp_path, 2, "at=0", "rank=1", "how=exit", "code=2") as run:
        assert run.codes() == [USAGE_ERROR] * 2
        assert run.outcome().lines[-1] == "mixmae: error: injected usage error"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_one_supervisor_stops_all_ranks(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, 2, "steps=1000") as run:
        assert stepping(run)
        run.supervisors[1].send_signal(number)
        assert run.codes() == [PREEMPTED] * 2
        outcome = run.outcome()
    name = number.name if number in (signal.SIGUSR1, signal.SIGUSR2) else "SIGTERM"
    assert (outcome.stop_signal, outcome.code) == (name, PREEMPTED)
    assert outcome.stopped_by == f"rank 1 on {os.uname().nodename}"
    assert all(f"stopped by {name}" in run.log(rank) for rank in range(2))


def test_a_second_signal_does_not_disturb_the_stop(tmp_path: Path) -> None:
    with started(tmp_path, 2, "steps=1000") as run:
        assert stepping(run)
        for supervisor in run.supervisors * 2:
            supervisor.send_signal(signal.SIGTERM)
        assert run.codes() == [PREEMPTED] * 2


def test_ranks_that_ignore_a_stop_are_killed(tmp_path: Path) -> None:
    with started(tmp_path, 2, "steps=10000", "how=ignore-signals", f"run_dir={tmp_path}", grace=2.0) as run:
        assert stepping(run)
        run.supervisors[0].send_signal(signal.SIGTERM)
        assert run.codes() == [FAILED] * 2
        assert "had not exited 2 s after the signal to stop" in run.outcome().reason
    assert not processes_of(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_supervisor_ends_its_rank_and_the_run(tmp_path: Path, rank: int) -> None:
    with started(tmp_path, 2, "steps=10000", f"run_dir={tmp_path}") as run:
        assert stepping(run)
        run.supervisors[rank].kill()
        assert run.codes()[1 - rank] == FAILED
        if rank == 0:
            assert "lost the supervisor of rank 0 on 127.0.0.1" in run.supervisors[1].communicate()[1]
            assert not (run.folder / "outcome.json").exists()
        else:
            assert "lost its supervisor" in run.outcome().reason
        assert eventually(lambda: not processes_of(tmp_path))
        assert (run.folder / ENDED).exists()


def test_ranks_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    start = f"import sys, time; sys.path[:0] = {sys.path!r}\n" + (
        "from pathlib import Path; from tests.launch.ranks import Started\n"
        f"Started(Path({str(tmp_path)!r}), 2, ('steps=10000', 'run_dir={tmp_path}'), {{}}); time.sleep(1000)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", start])
    log = tmp_path / "logs" / "one" / "rank-00001.log"
    assert eventually(lambda: log.is_file() and "rank" in log.read_text())
    launcher.kill()
    launcher.wait()
    assert eventually(lambda: not processes_of(tmp_path))
    assert "the process that started rank" in (tmp_path / "logs" / "one" / "outcome.json").read_text()


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    with started(tmp_path, 2, join=2.0) as run:
        run.supervisors[1].kill()
        run.supervisors[1].wait()
        assert run.supervisors[0].wait(200) == FAILED
        assert "rank 1" in run.outcome().reason


@pytest.mark.slow
def test_a_stopped_supervisor_counts_as_an_unreachable_host(tmp_path: Path) -> None:
    with started(tmp_path, 2, "steps=10000", f"run_dir={tmp_path}") as run:
        assert stepping(run)
        run.supervisors[1].send_signal(signal.SIGSTOP)
        assert run.supervisors[0].wait(200) == FAILED
        assert "rank 1 on" in run.outcome().reason
        assert "has been silent for 20 s" in run.outcome().reason


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "3"}, "expected world size 2, got 3; refusing to start"),
        ({"MIXMAE_TOKEN": ""}, "MIXMAE_TOKEN is not set"),
        ({"RANK": "x"}, "expected whole numbers"),
        ({"RANK": "2"}, "RANK=2, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_PORT=1: expected whole numbers, a rank below"),
    ],
)
def test_wrong_environments_are_one_clear_line(environment: dict[str, str], message: str) -> None:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    options = ["--attempt", "a", "--run-dir", "r", "--ranks", "2", "--port", "20000"]
    limits = ["--join-seconds", "1", "--stuck-seconds", "1", "--grace-seconds", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "mixmae.launch.supervision.rank", *options, *limits, "tests.launch.fake_rank"],
        env={**os.environ, "MIXMAE_TOKEN": "secret", **place, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == USAGE_ERROR
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_exits_are_described() -> None:
    assert Exit(3).describe() == "ended with exit code 3"
    assert Exit(None, signal.SIGSEGV).describe() == "was killed by SIGSEGV"
