"""Some faults in real runs (`make drill` plays them all), and that what must hold afterwards is really checked."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mixmae.base.run_directory import complete_checkpoints
from mixmae.trainer.checkpoints.layout import point_to
from tests.cluster.cluster import Cluster
from tests.drill import verdict
from tests.drill.faults import all_faults
from tests.drill.report import write_report
from tests.drill.rig import STEPS, Rig
from tests.drill.runs import Local, Run
from tests.drill.session import Outcome, play

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
def test_a_run_comes_through(rig: Rig, name: str, backend: str) -> None:
    (fault,) = (fault for fault in all_faults() if fault.name == name)
    outcome = play(rig, fault, backend, "short", stage=2)
    assert not outcome.problems
    assert outcome.training is not None or outcome.how == "continued"


@pytest.fixture
def finished(rig: Rig, tmp_path: Path) -> Run:
    """A copy of a run to which nothing happened, to be tampered with."""
    whole = rig.undisturbed(2)
    shutil.copytree(whole, tmp_path / "run")
    run = Run(rig.cluster, Local(2), tmp_path / "run.yaml", tmp_path / "run")
    run.starts = 1
    return run


def judge(rig: Rig, run: Run, same_ranks: bool = True) -> str:
    return "\n".join(verdict.judge(run, rig.undisturbed(2), same_ranks))


def edit(file: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Changes the records of a file, or leaves those out for which there is None."""
    records = [json.loads(line) for line in file.read_text().splitlines() if line]
    changed = [record for record in map(change, records) if record is not None]
    file.write_text("".join(json.dumps(record) + "\n" for record in changed))


@pytest.mark.parametrize("same_ranks", [True, False])
def test_a_run_to_which_nothing_happened_holds(rig: Rig, finished: Run, same_ranks: bool) -> None:
    assert judge(rig, finished, same_ranks) == ""


def test_a_run_that_ended_early_is_seen(rig: Rig, finished: Run) -> None:
    point_to(complete_checkpoints(finished.folder)[-2])
    assert f"not that of step {STEPS}" in judge(rig, finished)


def test_a_missing_end_is_seen(rig: Rig, finished: Run) -> None:
    edit(finished.folder / "events.jsonl", lambda record: None if record["event"] == "end" else record)
    assert "does not say that the run finished" in judge(rig, finished)


def test_a_lost_sample_is_seen(rig: Rig, finished: Run) -> None:
    edit(finished.folder / "samples" / "rank-00001.jsonl", lambda record: None if record.get("step") == 33 else record)
    found = judge(rig, finished)
    assert "step 33 used other samples" in found
    assert "more often than others" in found


def test_a_doubled_sample_is_seen(rig: Rig, finished: Run) -> None:
    def twice(record: dict[str, Any]) -> dict[str, Any]:
        if record.get("step") == 12:
            record["samples"][0][0] = record["samples"][0][1]
        return record

    edit(finished.folder / "samples" / "rank-00000.jsonl", twice)
    assert "step 12 used other samples" in judge(rig, finished)


def test_a_step_without_samples_is_seen(rig: Rig, finished: Run) -> None:
    for file in (finished.folder / "samples").iterdir():
        edit(file, lambda record: None if record.get("step") == 50 else record)
    assert "no samples are noted for steps [50]" in judge(rig, finished)


def test_another_loss_is_seen(rig: Rig, finished: Run) -> None:
    def off(record: dict[str, Any]) -> dict[str, Any]:
        return record | {"loss": record["loss"] + 0.01} if record.get("step") == 20 and "loss" in record else record

    edit(finished.folder / "events.jsonl", off)
    assert "the losses of steps [20] are others" in judge(rig, finished)
    assert "the losses of step 20 are 1.00e-02 apart" in judge(rig, finished, same_ranks=False)


def test_other_weights_are_seen(rig: Rig, finished: Run) -> None:
    """The weights of an earlier step, under the name of the last."""
    before, last = complete_checkpoints(finished.folder)[-6], complete_checkpoints(finished.folder)[-1]
    shutil.rmtree(last)
    before.rename(last)
    found = judge(rig, finished)
    assert "weight of" in found
    assert "exp_avg_sq of" in found
    assert "of their way apart" in judge(rig, finished, same_ranks=False)


def test_a_silent_restart_is_seen(rig: Rig, finished: Run) -> None:
    (finished.folder / "logs" / "20200101T000000Z").mkdir()
    assert "2 starts, of which the user made 1 and 0 are recorded" in judge(rig, finished)


def test_a_start_from_zero_is_seen(rig: Rig, finished: Run) -> None:
    """As if the run had begun again behind step 30, with nothing said but that it starts."""
    finished.starts = 2
    (finished.folder / "logs" / "20200101T000000Z").mkdir()
    file = finished.folder / "events.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    cut = next(n for n, line in enumerate(lines, 1) if '"event": "checkpoint"' in line and '"step": 30,' in line)
    file.write_text("".join(lines[:cut] + lines))
    assert "began at step 0 although step 30 was saved, and did not say why" in judge(rig, finished)


def test_a_skipped_step_is_seen(rig: Rig, finished: Run) -> None:
    edit(
        finished.folder / "events.jsonl",
        lambda record: None if record["event"] == "step" and record["step"] == 9 else record,
    )
    found = judge(rig, finished)
    assert "after it began at step 0" in found
    assert "the losses of steps [9] are not noted" in found


def test_what_is_left_behind_is_seen(rig: Rig, finished: Run) -> None:
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


def test_the_page_tells_what_held_and_what_did_not(rig: Rig, tmp_path: Path) -> None:
    good = Outcome("killed_rank", "SIGKILL of a rank", "local", 1, "rank 0 killed", "went on", None, 12.3, 40, ())
    bad = Outcome("requeued", "scontrol requeue", "slurm", 1, "requeued", "started again", 3.0, 9.0, 40, ("no end",))
    write_report(tmp_path / "page.md", [good, good, bad], "python -m tests.drill", 11.0)
    page = (tmp_path / "page.md").read_text()
    assert "All of this was true for 2 of 3 runs" in page
    assert "- slurm, scontrol requeue (requeued): no end" in page
    assert "| SIGKILL of a rank | local | 2 | rank 0 killed | went on |  | 12, 12 |" in page
    assert max(len(line) for line in page.splitlines() if not line.startswith("|")) <= 120
