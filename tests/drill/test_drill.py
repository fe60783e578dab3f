"""Some faults in real runs (`make drill` injects all), and violations of each invariant are detected."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mixmae.base.run_directory import complete_checkpoints
from mixmae.trainer.checkpoints.layout import set_newest
from tests.cluster.cluster import Cluster
from tests.drill import invariants
from tests.drill.faults import all_faults
from tests.drill.report import write_report
from tests.drill.rig import STEPS, Rig
from tests.drill.runs import Local, Run
from tests.drill.session import Outcome, run_drill

pytestmark = [pytest.mark.services, pytest.mark.timeout(1200)]

SHORT = (
    ("killed_rank_while_saving", "local"),
    ("fewer_hosts_and_more", "hostfile"),
    ("preempted", "slurm"),
    ("node_set_down", "slurm"),
)


@pytest.fixture(scope="module")
def rig(cluster_of: Callable[[int], Cluster]) -> Iterator[Rig]:
    cluster = cluster_of(3)
    yield Rig(cluster, cluster.shared)
    cluster.repair()


@pytest.mark.parametrize(("name", "backend"), SHORT)
def test_a_run_recovers(rig: Rig, name: str, backend: str) -> None:
    (fault,) = (fault for fault in all_faults() if fault.name == name)
    outcome = run_drill(rig, fault, backend, "short", stage=2)
    assert not outcome.problems
    assert outcome.recovery_seconds is not None or outcome.recovery == "continued"


@pytest.fixture
def finished(rig: Rig, tmp_path: Path) -> Run:
    """A copy of the baseline run, to be tampered with."""
    whole = rig.baseline(2)
    shutil.copytree(whole, tmp_path / "run")
    run = Run(rig.cluster, Local(2), tmp_path / "run.yaml", tmp_path / "run")
    run.starts = 1
    return run


def judge(rig: Rig, run: Run, same_ranks: bool = True) -> str:
    return "\n".join(invariants.check_run(run, rig.baseline(2), same_ranks))


def edit(file: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Maps `change` over the records of a file; a record is dropped where it returns None."""
    records = [json.loads(line) for line in file.read_text().splitlines() if line]
    changed = [record for record in map(change, records) if record is not None]
    file.write_text("".join(json.dumps(record) + "\n" for record in changed))


@pytest.mark.parametrize("same_ranks", [True, False])
def test_a_run_without_faults_passes(rig: Rig, finished: Run, same_ranks: bool) -> None:
    assert judge(rig, finished, same_ranks) == ""


def test_an_unfinished_run_is_detected(rig: Rig, finished: Run) -> None:
    set_newest(complete_checkpoints(finished.folder)[-2])
    assert f"expected step {STEPS}" in judge(rig, finished)


def test_a_missing_end_event_is_detected(rig: Rig, finished: Run) -> None:
    edit(finished.folder / "events.jsonl", lambda record: None if record["event"] == "end" else record)
    assert "no end event in events.jsonl" in judge(rig, finished)


def test_a_skipped_sample_is_detected(rig: Rig, finished: Run) -> None:
    edit(finished.folder / "samples" / "rank-00001.jsonl", lambda record: None if record.get("step") == 33 else record)
    found = judge(rig, finished)
    assert "step 33 used other samples" in found
    assert "more often than others" in found


def test_a_repeated_sample_is_detected(rig: Rig, finished: Run) -> None:
    def twice(record: dict[str, Any]) -> dict[str, Any]:
        if record.get("step") == 12:
            record["samples"][0][0] = record["samples"][0][1]
        return record

    edit(finished.folder / "samples" / "rank-00000.jsonl", twice)
    assert "step 12 used other samples" in judge(rig, finished)


def test_a_step_without_samples_is_detected(rig: Rig, finished: Run) -> None:
    for file in (finished.folder / "samples").iterdir():
        edit(file, lambda record: None if record.get("step") == 50 else record)
    assert "no samples logged for steps [50]" in judge(rig, finished)


def test_a_different_loss_is_detected(rig: Rig, finished: Run) -> None:
    def off(record: dict[str, Any]) -> dict[str, Any]:
        return record | {"loss": record["loss"] + 0.01} if record.get("step") == 20 and "loss" in record else record

    edit(finished.folder / "events.jsonl", off)
    assert "losses of steps [20] differ from the baseline" in judge(rig, finished)
    assert "loss of step 20 differs from the baseline by 1.00e-02" in judge(rig, finished, same_ranks=False)


def test_different_weights_are_detected(rig: Rig, finished: Run) -> None:
    """The weights of an earlier step, under the name of the last."""
    before, last = complete_checkpoints(finished.folder)[-6], complete_checkpoints(finished.folder)[-1]
    shutil.rmtree(last)
    before.rename(last)
    found = judge(rig, finished)
    assert "weight of" in found
    assert "exp_avg_sq of" in found
    assert "of the update's norm" in judge(rig, finished, same_ranks=False)


def test_an_unlogged_restart_is_detected(rig: Rig, finished: Run) -> None:
    (finished.folder / "logs" / "20200101T000000Z").mkdir()
    assert "2 starts, expected 1 by the user and 0 logged as restarts" in judge(rig, finished)


def test_a_start_from_zero_is_detected(rig: Rig, finished: Run) -> None:
    """As if the run had started from step 0 after step 30 without a fallback event."""
    finished.starts = 2
    (finished.folder / "logs" / "20200101T000000Z").mkdir()
    file = finished.folder / "events.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    cut = next(n for n, line in enumerate(lines, 1) if '"event": "checkpoint"' in line and '"step": 30,' in line)
    file.write_text("".join(lines[:cut] + lines))
    assert "began at step 0 although step 30 was saved, and logged no reason" in judge(rig, finished)


def test_a_skipped_step_is_detected(rig: Rig, finished: Run) -> None:
    edit(
        finished.folder / "events.jsonl",
        lambda record: None if record["event"] == "step" and record["step"] == 9 else record,
    )
    found = judge(rig, finished)
    assert "after it began at step 0" in found
    assert "no loss logged for steps [9]" in found


def test_leftovers_are_detected(rig: Rig, finished: Run) -> None:
    (finished.folder / "checkpoints" / "partial-00000060-0").mkdir()
    node = rig.cluster.hosts[2]
    left = node.popen(["sleep", "1000"])
    node.run(["touch", "/dev/shm/left"], check=True)
    found = judge(rig, finished)
    assert "partial-00000060-0 is left in checkpoints" in found
    assert "a process is left on node3: sleep 1000" in found
    assert "/dev/shm/left is left on node3" in found
    left.kill()
    left.wait()
    node.run(["rm", "/dev/shm/left"], check=True)


def test_the_report_lists_passed_and_failed_drills(rig: Rig, tmp_path: Path) -> None:
    good = Outcome("killed_rank", "SIGKILL of a rank", "local", 1, "rank 0 killed", "went on", None, 12.3, 40, ())
    bad = Outcome("requeued", "scontrol requeue", "slurm", 1, "requeued", "started again", 3.0, 9.0, 40, ("no end",))
    write_report(tmp_path / "page.md", [good, good, bad], "python -m tests.drill", 11.0)
    page = (tmp_path / "page.md").read_text()
    assert "All of this was true for 2 of 3 runs" in page
    assert "- slurm, scontrol requeue (requeued): no end" in page
    assert "| SIGKILL of a rank | local | 2 | rank 0 killed | went on |  | 12, 12 |" in page
    assert max(len(line) for line in page.splitlines() if not line.startswith("|")) <= 120
