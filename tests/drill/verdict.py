"""What must hold when a run that was disturbed is over. Each check returns its problems, none where all is well."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

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

LOSSES_APART = 1e-3
"""In bf16, where other ranks add up in another order; a run's loss falls from 1.04 to 0.97."""
WEIGHTS_APART = 0.05
"""Likewise, as a share of how far the run moved its weights."""
_DAEMONS = "|".join(("munged", ssh.DAEMON, "slurmctld", ": slurmscriptd", "slurmd "))
_GOING = 20.0
"""Seconds that what belongs to a start may still take to go when the start is over."""


def judge(run: Run, undisturbed: Path, same_ranks: bool) -> list[str]:
    """All looks at a run that has finished.

    Args:
        undisturbed: the directory of a run of the same recipe to which nothing happened.
        same_ranks: whether it ran on as many ranks all the time, so that its arithmetic is the same.
    """
    if problems := came_to_the_end(run.folder):
        return [*problems, *told_of_every_start(run), *left_nothing_behind(run)]
    return [
        *saw_every_sample(run.folder, undisturbed),
        *noted_every_loss(run),
        *(computed_the_same(run.folder, undisturbed) if same_ranks else computed_alike(run.folder, undisturbed)),
        *told_of_every_start(run),
        *left_nothing_behind(run),
    ]


def came_to_the_end(folder: Path) -> list[str]:
    """The newest checkpoint is that of the last step, and the run says that it finished."""
    newest = newest_checkpoint(folder)
    if newest is None or checkpoint_step(newest) != STEPS:
        return [f"the newest checkpoint is {newest and newest.name}, not that of step {STEPS}"]
    if not any(record["event"] == "end" for record in _events(folder)):
        return ["events.jsonl does not say that the run finished"]
    return []


def saw_every_sample(folder: Path, undisturbed: Path) -> list[str]:
    """Every step used the samples that it uses undisturbed; after none was a sample seen twice more than another."""
    samples, expected = read_samples(folder), read_samples(undisturbed)
    if list(samples) != list(range(1, STEPS + 1)):
        missing = sorted(set(range(1, STEPS + 1)) - set(samples))
        return [f"no samples are noted for steps {missing}" if missing else f"samples of steps {list(samples)}"]
    problems = [
        f"step {step} used other samples than undisturbed" for step in samples if samples[step] != expected[step]
    ]
    seen = Counter(dict.fromkeys(range(IMAGES), 0))
    for step, used in samples.items():
        seen.update(used)
        if len(seen) != IMAGES or max(seen.values()) - min(seen.values()) > 1:
            problems.append(f"after step {step} some samples were seen {max(seen.values()) - min(seen.values())} times "
                            "more often than others")  # fmt: skip
    return problems[:3]


def noted_every_loss(run: Run) -> list[str]:
    """The loss of every step is in events.jsonl, unless the run said that it has a gap."""
    missing = sorted(set(range(1, STEPS + 1)) - set(_losses(run.folder)))
    return [f"the losses of steps {missing[:5]} are not noted"] if missing and not _has_a_gap(run) else []


def computed_the_same(folder: Path, undisturbed: Path) -> list[str]:
    """Losses, weights and AdamW's moments are those of the undisturbed run, bit for bit."""
    problems = []
    losses, expected = _losses(folder), _losses(undisturbed)
    if steps := [step for step in losses if losses[step] != expected[step]]:
        problems.append(f"the losses of steps {steps[:5]} are others than undisturbed")
    actual, right = (
        {"weight": master_weights(newest), **optimizer_states(newest)}
        for newest in (complete_checkpoints(run)[-1] for run in (folder, undisturbed))
    )
    for kind in right:
        if other := [name for name, value in right[kind].items() if not torch.equal(value, actual[kind][name])]:
            problems.append(f"{kind} of {len(other)} parameters is another than undisturbed, such as {other[0]}")
    return problems


def computed_alike(folder: Path, undisturbed: Path) -> list[str]:
    """Losses and weights are those of the undisturbed run to rounding."""
    losses, expected = _losses(folder), _losses(undisturbed)
    apart = {step: abs(loss - expected[step]) for step, loss in losses.items()}
    problems = [f"the losses of step {step} are {gap:.2e} apart" for step, gap in apart.items() if gap > LOSSES_APART]
    expected_checkpoints = complete_checkpoints(undisturbed)
    first, right = master_weights(expected_checkpoints[0]), master_weights(expected_checkpoints[-1])
    weights = master_weights(complete_checkpoints(folder)[-1])
    moved = torch.stack([(right[name] - first[name]).norm() for name in right]).norm()
    gap = torch.stack([(right[name] - weights[name]).norm() for name in right]).norm()
    if gap > WEIGHTS_APART * moved:
        problems.append(f"the weights are {gap / moved:.3f} of their way apart")
    return problems[:3]


def told_of_every_start(run: Run) -> list[str]:
    """Each start that trained said where it began, at the newest checkpoint or why not; each restart is recorded."""
    restarts = run.restarts()
    attempts = [path for path in (run.folder / LOGS).iterdir() if path.is_dir()]
    problems = []
    if len(attempts) != run.starts + len(restarts):
        problems.append(f"{len(attempts)} starts, of which the user made {run.starts} and {len(restarts)} are recorded "
                        "as restarts")  # fmt: skip
    begins = list(_begins(_events(run.folder)))
    if len(begins) > len(attempts):
        problems.append(f"{len(begins)} times training began in {len(attempts)} starts")
    if not all(record.get("message") for record in restarts):
        problems.append("a restart is recorded without a reason")
    for number, begin in enumerate(begins, 1):
        problems += [f"start {number} that trained {problem}" for problem in begin.problems(_has_a_gap(run))]
    return problems


class _Begin:
    """A start that came as far as training, with what was saved before and what it did.

    Attributes:
        saved: steps of checkpoints that the run told of before, of the history that this start continues.
    """

    def __init__(self, record: dict[str, Any], saved: set[int]) -> None:
        self.record, self.saved = record, saved
        self.fell_back = False
        self.steps: list[int] = []

    def problems(self, has_a_gap: bool) -> Iterator[str]:
        step, newest = self.record["step"], max(self.saved, default=0)
        if step < newest and not self.fell_back:
            yield f"began at step {step} although step {newest} was saved, and did not say why"
        if (self.record["event"] == "start") != (step == 0):
            yield f"said {self.record['event']!r} at step {step}"
        if any(after != before + 1 for before, after in pairwise([step, *self.steps])) and not has_a_gap:
            yield f"did steps {self.steps} after it began at step {step}"


def _begins(events: Iterable[dict[str, Any]]) -> Iterator[_Begin]:
    saved: set[int] = set()
    current: _Begin | None = None
    for record in events:
        match record["event"]:
            case "start" | "resumed":
                if current is not None:
                    yield current
                current = _Begin(record, set(saved))
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


def left_nothing_behind(run: Run) -> list[str]:
    """No partial checkpoint, no file in shared memory, and on no host a process besides the cluster's daemons."""
    return [f"{path.name} is left in {path.parent.name}" for path in leftovers(run.folder)] + strays(run.cluster)


def strays(cluster: Cluster, patience: float = _GOING) -> list[str]:
    """What is on the hosts that is not the cluster's own, once it has had some time to go."""
    deadline = time.monotonic() + patience
    while (found := _strays(cluster)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def _strays(cluster: Cluster) -> list[str]:
    found = []
    for host in (cluster.login, *cluster.hosts):
        for process in host.processes(f"^(?!{_DAEMONS})"):
            found.append(f"a process is left on {host.name}: {' '.join(process.cmdline())[:120]}")
        for path in host.run(["find", "/dev/shm", "-mindepth", "1"], check=True).stdout.splitlines():
            found.append(f"{path} is left on {host.name}")
    return found


def _has_a_gap(run: Run) -> bool:
    """Whether the run said that its record has one, for want of room on the disk."""
    return "events.jsonl cannot be written and has a gap here" in run.output()


def _events(folder: Path) -> list[dict[str, Any]]:
    return jsonl.read(folder / EVENTS)


def _losses(folder: Path) -> dict[int, float]:
    """By step; of a step that was done again, the last time's."""
    return {record["step"]: record["loss"] for record in _events(folder) if record["event"] == "step"}
