"""When a run is started again, and when a batch script sends it back to the queue."""

import json
from pathlib import Path

import pytest

from mixmae.base.exit_codes import FAILED, FINISHED, PREEMPTED, USAGE_ERROR
from mixmae.base.run_directory import CHECKPOINTS, OUTCOME, RESTARTS, attempt_folder, checkpoint_name
from mixmae.launch.backends import slurm_job_steps
from mixmae.launch.supervision.outcome import USER, Outcome, write_outcome
from mixmae.launch.supervision.restarts import decide, read_restarts, record_restart
from mixmae.trainer.checkpoints.layout import set_newest

CRASH = Outcome(FAILED, "rank 3 on node2 was killed", rank=3, host="node2", signal="SIGKILL")
TAKEN = Outcome(PREEMPTED, "stopped", stopped_by="the job", stop_signal="SIGUSR1")


def save(run_dir: Path, step: int) -> None:
    folder = run_dir / CHECKPOINTS / checkpoint_name(step)
    folder.mkdir(parents=True)
    set_newest(folder)


@pytest.mark.parametrize(
    ("outcome", "most", "again"),
    [
        (CRASH, 1, True),
        (TAKEN, 1, True),
        (CRASH, 0, False),
        (TAKEN, 0, False),
        (Outcome(FINISHED, "finished"), 3, False),
        (Outcome(USAGE_ERROR, "no such recipe"), 3, False),
        (Outcome(PREEMPTED, "stopped", stopped_by=USER), 3, False),
        (Outcome(FAILED, "ended at once", stopped_by=USER), 3, False),
    ],
)
def test_which_outcomes_are_restarted(tmp_path: Path, outcome: Outcome, most: int, again: bool) -> None:
    decision = decide(tmp_path, "here", outcome, most)
    assert decision.restart == again
    if not again:
        assert decision.exit_code(outcome) == outcome.code


def test_a_crash_loop_ends(tmp_path: Path) -> None:
    delays = []
    for _ in range(3):
        decision = decide(tmp_path, "here", CRASH, 3)
        assert decision.restart
        delays.append(decision.delay)
        record_restart(tmp_path, "here", "a", CRASH)
    assert delays == [0.0, 10.0, 30.0]
    decision = decide(tmp_path, "here", TAKEN, 3)
    assert not decision.restart
    assert decision.exit_code(TAKEN) == FAILED
    assert decision.message == ("not restarted: 3 restarts without progress; the newest checkpoint is still step 0")


def test_progress_resets_the_count_and_a_step_back_does_not(tmp_path: Path) -> None:
    save(tmp_path, 100)
    for _ in range(2):
        record_restart(tmp_path, "here", "a", CRASH)
    assert not decide(tmp_path, "here", CRASH, 2).restart
    save(tmp_path, 120)
    assert decide(tmp_path, "here", CRASH, 2).restart
    record_restart(tmp_path, "here", "a", CRASH)
    (tmp_path / CHECKPOINTS / checkpoint_name(120)).rename(tmp_path / CHECKPOINTS / "damaged-step-00000120")
    record_restart(tmp_path, "here", "a", CRASH)  # now from step 100 again
    assert not decide(tmp_path, "here", CRASH, 2).restart


def test_starts_of_another_command_do_not_count(tmp_path: Path) -> None:
    record_restart(tmp_path, "yesterday", "a", CRASH)
    assert decide(tmp_path, "here", CRASH, 1).restart


def test_restarts_are_recorded(tmp_path: Path) -> None:
    save(tmp_path, 40)
    (tmp_path / RESTARTS).write_text('{"time": 1, "laun')  # a line that a full disk cut
    record_restart(tmp_path, "here", "a", CRASH)
    record_restart(tmp_path, "job7", "b", TAKEN, slurm_restart_count=1)
    record_restart(tmp_path, "job7", "", None, slurm_restart_count=2)
    crash, taken, lost = read_restarts(tmp_path)
    assert (crash["reason"], crash["step"], crash["host"], crash["rank"]) == ("failed", 40, "node2", 3)
    assert (crash["signal"], crash["attempt"], crash["exit_code"]) == ("SIGKILL", "a", FAILED)
    assert (taken["reason"], taken["exit_code"], taken["slurm_restart_count"]) == ("preempted", PREEMPTED, 1)
    assert (lost["reason"], lost["slurm_restart_count"]) == ("lost", 2)


def test_a_job_that_starts_again_records_how_it_ended_before(tmp_path: Path) -> None:
    for restart, outcome in enumerate([TAKEN, CRASH]):
        folder = attempt_folder(tmp_path, f"2026010{restart}T000000Z-job7-{restart}")
        folder.mkdir(parents=True)
        write_outcome(folder, outcome)
    attempt_folder(tmp_path, "20260109T000000Z-job17-1").mkdir()
    begin = ["begin", "--run-dir", str(tmp_path), "--attempt", "x", "--launch", "job7", "--restarts"]
    assert slurm_job_steps.main([*begin, "0"]) == 0
    assert read_restarts(tmp_path) == []
    assert slurm_job_steps.main([*begin, "2"]) == 0
    (record,) = read_restarts(tmp_path)
    assert (record["attempt"], record["message"]) == ("20260101T000000Z-job7-1", CRASH.reason)
    assert slurm_job_steps.main([*begin, "5"]) == 0
    assert read_restarts(tmp_path)[1]["reason"] == "lost"
    (attempt_folder(tmp_path, "20260101T000000Z-job7-1") / OUTCOME).write_text("")  # all that a power cut left of it
    assert slurm_job_steps.main([*begin, "2"]) == 0
    assert read_restarts(tmp_path)[2]["reason"] == "lost"


@pytest.mark.parametrize(
    ("outcome", "state", "code", "printed", "last"),
    [
        (TAKEN, "RUNNING", PREEMPTED, "requeue\n", "mixmae: restarting from step 0"),
        (TAKEN, "COMPLETING", PREEMPTED, "", "mixmae: stopped"),
        (CRASH, "RUNNING", FAILED, "requeue\n", "mixmae: restarting from step 0"),
        (CRASH, "", FAILED, "", "mixmae: error: rank 3 on node2 was killed"),
        (Outcome(FINISHED, "finished"), "RUNNING", FINISHED, "", ""),
        (None, "COMPLETING", FAILED, "", "mixmae: error: rank 0's supervisor left no record"),
    ],
)
def test_exit_codes_for_the_batch_script(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    outcome: Outcome | None,
    state: str,
    code: int,
    printed: str,
    last: str,
) -> None:
    folder = attempt_folder(tmp_path, "x")
    folder.mkdir(parents=True)
    if outcome is not None:
        write_outcome(folder, outcome)
    end = ["end", "--run-dir", str(tmp_path), "--attempt", "x", "--launch", "job7", "--max-restarts", "3"]
    assert slurm_job_steps.main([*end, "--job-state", state]) == code
    told = capsys.readouterr()
    assert told.out == printed
    assert (told.err.splitlines() or [""])[-1].startswith(last)


def test_a_stop_without_a_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MIXMAE_TOKEN", "secret")
    stop = ["stop", "--run-dir", str(tmp_path), "--attempt", "x", "--port", "20000", "--signal", "SIGUSR1"]
    assert slurm_job_steps.main(stop) == 1


def test_records_are_json_lines(tmp_path: Path) -> None:
    record_restart(tmp_path, "here", "a", CRASH)
    assert [json.loads(line)["launch"] for line in (tmp_path / RESTARTS).read_text().splitlines()] == ["here"]
