"""Invariants of a finished run after faults, checked against a baseline run without. A check returns its problems."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from mixmae.base import jsonl
from mixmae.base.run_directory import EVENTS, LOGS, checkpoint_step, complete_checkpoints, newest_checkpoint
from mixmae.trainer.checkpoints.layout import leftovers
from mixmae.trainer.checkpoints.weights import master_weights, optimizer_states
from mixmae.trainer.telemetry.sample_log import read_samples
from tests.cluster import ssh
from tests.cluster.cluster import Cluster
from tests.drill.rig import IMAGES, STEPS
from tests.drill.runs import Run

LOSS_TOLERANCE = 1e-3
"""In bf16, where the order of additions depends on the world size; a run's loss falls from 1.04 to 0.97."""
WEIGHT_TOLERANCE = 0.05
"""Likewise, as a fraction of the norm of the run's total weight update."""
_DAEMONS = "|".join(("munged", ssh.DAEMON, "slurmctld", ": slurmscriptd", "slurmd "))
_EXIT_SECONDS = 20.0
"""Seconds that processes of a start may outlive its exit."""


def check_run(run: Run, baseline: Path, same_ranks: bool) -> list[str]:
    """Runs all checks on a finished run.

    Args:
        baseline: directory of a run of the same recipe without faults.
        same_ranks: whether world size and ZeRO stage never changed, so that results are expected to be bitwise equal.
    """
    if problems := check_finished(run.folder):
        return [*problems, *check_starts_reported(run), *check_no_leftovers(run)]
    return [
        *check_samples(run.folder, baseline),
        *check_losses_logged(run),
        *(check_bitwise_equal(run.folder, baseline) if same_ranks else check_close(run.folder, baseline)),
        *check_starts_reported(run),
        *check_no_leftovers(run),
    ]


def check_finished(folder: Path) -> list[str]:
    """The newest checkpoint is that of the last step, and events.jsonl has an `end` event."""
    newest = newest_checkpoint(folder)
    if newest is None or checkpoint_step(newest) != STEPS:
        return [f"the newest checkpoint is {newest and newest.name}, expected step {STEPS}"]
    if not any(record["event"] == "end" for record in _events(folder)):
        return ["no end event in events.jsonl"]
    return []


def check_samples(folder: Path, baseline: Path) -> list[str]:
    """Every step used the baseline's samples; visits per sample differ by at most 1 after each step."""
    samples, expected = read_samples(folder), read_samples(baseline)
    if list(samples) != list(range(1, STEPS + 1)):
        missing = sorted(set(range(1, STEPS + 1)) - set(samples))
        return [f"no samples logged for steps {missing}" if missing else f"samples logged for steps {list(samples)}"]
    problems = [
        f"step {step} used other samples than the baseline" for step in samples if samples[step] != expected[step]
    ]
    seen = Counter(dict.fromkeys(range(IMAGES), 0))
    for step, used in samples.items():
        seen.update(used)
        if len(seen) != IMAGES or max(seen.values()) - min(seen.values()) > 1:
            problems.append(f"after step {step} some samples were seen {max(seen.values()) - min(seen.values())} times "
                            "more often than others")  # fmt: skip
    return problems[:3]


def check_losses_logged(run: Run) -> list[str]:
    """The loss of every step is in events.jsonl, unless the run reported a gap in it."""
    missing = sorted(set(range(1, STEPS + 1)) - set(_losses(run.folder)))
    return [f"no loss logged for steps {missing[:5]}"] if missing and not _reported_gap(run) else []


def check_bitwise_equal(folder: Path, baseline: Path) -> list[str]:
    """Losses, weights and AdamW's moments equal the baseline's bit for bit."""
    problems = []
    losses, expected_losses = _losses(folder), _losses(baseline)
    if steps := [step for step in losses if losses[step] != expected_losses[step]]:
        problems.append(f"losses of steps {steps[:5]} differ from the baseline")
    actual, expected = (
        {"weight": master_weights(newest), **optimizer_states(newest)}
        for newest in (complete_checkpoints(run)[-1] for run in (folder, baseline))
    )
    for kind in expected:
        if other := [name for name, value in expected[kind].items() if not torch.equal(value, actual[kind][name])]:
            problems.append(f"{kind} of {len(other)} parameters differs from the baseline, such as {other[0]}")
    return problems


def check_close(folder: Path, baseline: Path) -> list[str]:
    """Losses and weights equal the baseline's to rounding."""
    losses, expected_losses = _losses(folder), _losses(baseline)
    gaps = {step: abs(loss - expected_losses[step]) for step, loss in losses.items()}
    problems = [
        f"loss of step {step} differs from the baseline by {gap:.2e}"
        for step, gap in gaps.items()
        if gap > LOSS_TOLERANCE
    ]
    expected_checkpoints = complete_checkpoints(baseline)
    first, expected = master_weights(expected_checkpoints[0]), master_weights(expected_checkpoints[-1])
    actual = master_weights(complete_checkpoints(folder)[-1])
    update = torch.stack([(expected[name] - first[name]).norm() for name in expected]).norm()
    error = torch.stack([(expected[name] - actual[name]).norm() for name in expected]).norm()
    if error > WEIGHT_TOLERANCE * update:
        problems.append(f"weights differ from the baseline by {error / update:.3f} of the update's norm")
    return problems[:3]


def check_starts_reported(run: Run) -> list[str]:
    """Each training start logged its step, with a reason if not the newest saved one; restarts are logged."""
    restarts = run.restarts()
    attempts = [path for path in (run.folder / LOGS).iterdir() if path.is_dir()]
    problems = []
    if len(attempts) != run.starts + len(restarts):
        problems.append(f"{len(attempts)} starts, expected {run.starts} by the user and {len(restarts)} logged as "
                        "restarts")  # fmt: skip
    trainings = list(_trainings(_events(run.folder)))
    if len(trainings) > len(attempts):
        problems.append(f"training started {len(trainings)} times in {len(attempts)} starts")
    if not all(record.get("message") for record in restarts):
        problems.append("a restart is logged without a reason")
    for number, training in enumerate(trainings, 1):
        problems += [f"training {number} {problem}" for problem in training.problems(_reported_gap(run))]
    return problems


class _Training:
    """Events of one start that reached training.

    Attributes:
        saved: steps of checkpoints saved before it, on the history that it continues.
    """

    def __init__(self, record: dict[str, Any], saved: set[int]) -> None:
        self.record, self.saved = record, saved
        self.fell_back = False
        self.steps: list[int] = []

    def problems(self, reported_gap: bool) -> Iterator[str]:
        step, newest = self.record["step"], max(self.saved, default=0)
        if step < newest and not self.fell_back:
            yield f"began at step {step} although step {newest} was saved, and logged no reason"
        if (self.record["event"] == "start") != (step == 0):
            yield f"logged event {self.record['event']!r} at step {step}"
        if any(after != before + 1 for before, after in pairwise([step, *self.steps])) and not reported_gap:
            yield f"logged steps {self.steps} after it began at step {step}"


def _trainings(events: Iterable[dict[str, Any]]) -> Iterator[_Training]:
    saved: set[int] = set()
    current: _Training | None = None
    for record in events:
        match record["event"]:
            case "start" | "resumed":
                if current is not None:
                    yield current
                current = _Training(record, set(saved))
                saved = {step for step in saved if step <= record["step"]}
            case "fallback":
                assert current is not None
                current.fell_back = True
            case "step":
                assert current is not None
                current.steps.append(record["step"])
            case "checkpoint":
                saved.add(record["step"])
    if current is not None:
        yield current


def check_no_leftovers(run: Run) -> list[str]:
    """No partial checkpoint, no file in shared memory, and no process besides the cluster's daemons on any host."""
    return [f"{path.name} is left in {path.parent.name}" for path in leftovers(run.folder)] + leaks(run.cluster)


def leaks(cluster: Cluster, timeout: float = _EXIT_SECONDS) -> list[str]:
    """Processes and shared-memory files on the hosts that are not the cluster's own and outlive the timeout."""
    deadline = time.monotonic() + timeout
    while (found := _leaks(cluster)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def _leaks(cluster: Cluster) -> list[str]:
    found = []
    for host in (cluster.login, *cluster.hosts):
        for process in host.processes(f"^(?!{_DAEMONS})"):
            with suppress(psutil.NoSuchProcess):  # it has ended since it was listed
                found.append(f"a process is left on {host.name}: {' '.join(process.cmdline())[:120]}")
        for path in host.run(["find", "/dev/shm", "-mindepth", "1"], check=True).stdout.splitlines():
            found.append(f"{path} is left on {host.name}")
    return found


def _reported_gap(run: Run) -> bool:
    """Whether the run warned that events.jsonl has a gap because the disk was full."""
    return "events.jsonl cannot be written and has a gap here" in run.output()


def _events(folder: Path) -> list[dict[str, Any]]:
    return jsonl.read(folder / EVENTS)


def _losses(folder: Path) -> dict[int, float]:
    """Losses by step; of a step that was repeated, the last one."""
    return {record["step"]: record["loss"] for record in _events(folder) if record["event"] == "step"}
