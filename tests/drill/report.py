"""Writes docs/reliability.md from the outcomes of the drills."""

import os
import platform
import shutil
import statistics
import subprocess
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mixmae.base.software import versions
from tests.drill.rig import GLOBAL_BATCH, IMAGES, SAVE_EVERY, STEPS
from tests.drill.session import Outcome

_WIDTH = 120

_INTRODUCTION = """\
What happens to a run when something breaks. The fault drill generated this page: it starts real runs with `mixmae
launch`, on one host (local), on two hosts over ssh (hostfile) and as jobs of a real Slurm (slurm), injects a fault,
restarts the run when its user would have to, and checks what must hold once it has finished.
"""

_HOW_TO_READ = """\
**How to read it.** A run here has {steps} steps of {batch} images, {epochs:g} epochs of {images} images, on two
ranks, and saves every {every} steps; it runs at any ZeRO stage. A row is one kind of fault under one backend. *Count*
says how often it was injected: each time at another moment, into another rank or file, drawn by seed. *Such as* is one
example. *How it continued* is what the run, its launcher, Slurm or its user did then. *Ended* is the time from the
fault until the command exited, if its user had to type it again; *training* the time from the last fault until a later
start completed a step. Of several the median and the longest are given. Without a fault it takes {start:.0f} s here
from the command to the first step, most of it for importing torch on two ranks.
"""

_PASSED = "**What held.** All of this was true for {held} of {count} runs once they had finished:"

_MUST_HOLD = (
    "it ended at step {steps} with exit code 0, and its newest checkpoint is complete;",
    "every step used the same samples as in a run without faults, and every epoch used every image once;",
    "losses, weights and both moments of AdamW are those of a run without faults, bit for bit; to rounding if it "
    "continued on another number of ranks or at another ZeRO stage;",
    "each start that trained reported where it resumed: at the newest checkpoint, or why not; each restart is in "
    "`restarts.jsonl` with its reason, or was typed by its user; no start began again from zero in silence;",
    "no process, no file in shared memory and no partial checkpoint was left on any host.",
)


def write_report(file: Path, outcomes: Sequence[Outcome], command: str, start: float) -> None:
    """Writes the page.

    Args:
        command: command line that ran the drills.
        start: seconds from a command to its first step, without faults.
    """
    count, held = len(outcomes), sum(not outcome.problems for outcome in outcomes)
    facts = {"steps": STEPS, "batch": GLOBAL_BATCH, "images": IMAGES, "every": SAVE_EVERY, "start": start}
    parts = [
        "# Reliability",
        _filled(_INTRODUCTION),
        _filled(_HOW_TO_READ.format(epochs=STEPS * GLOBAL_BATCH / IMAGES, **facts)),
        _PASSED.format(held=held, count=count),
        "\n".join(_filled(f"- {item.format(steps=STEPS)}", "  ") for item in _MUST_HOLD),
        _failures(outcomes),
        "## The faults",
        _table(outcomes),
        "## Made on",
        _filled(_machine()),
        f"    {command}",
    ]
    file.write_text("\n\n".join(part for part in parts if part) + "\n")


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(" ".join(text.split()), _WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _failures(outcomes: Sequence[Outcome]) -> str:
    first_lines = [(o, [problem.splitlines()[0] for problem in o.problems]) for o in outcomes if o.problems]
    failed = [f"- {o.backend}, {o.description} ({o.injected}): {'; '.join(problems)}" for o, problems in first_lines]
    return "\n".join(["**What did not hold.**", "", *failed]) if failed else ""


def _table(outcomes: Sequence[Outcome]) -> str:
    groups: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.description, outcome.backend].append(outcome)
    rows = [
        f"| {description} | {backend} | {len(found)} | {found[0].injected} "
        f"| {'; or '.join(dict.fromkeys(o.recovery for o in found))} "
        f"| {_seconds([o.exit_seconds for o in found])} | {_seconds([o.recovery_seconds for o in found])} |"
        for (description, backend), found in groups.items()
    ]
    title = "| what | backend | count | such as | how it continued | ended (s) | training (s) |"
    return "\n".join([title, "|---|---|---|---|---|---|---|", *sorted(rows)])


def _seconds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return "".join(f"{value:.0f}" for value in known)
    return f"{statistics.median(known):.0f}, {max(known):.0f}"


def _machine() -> str:
    found = versions()
    packages = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "deepspeed"))
    return (
        f"{os.cpu_count()} cores of {_processor()}, without GPUs; three hosts as namespaces of one machine "
        f"(`tests/cluster`); Linux {platform.release().split('-')[0]}, Slurm {_slurm()}, {packages}. The command:"
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _slurm() -> str:
    # Slurm's commands print no version without a configuration; its daemons do.
    controller = shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert controller is not None, "the cluster needs slurmctld"
    return subprocess.run([controller, "-V"], capture_output=True, text=True, check=True).stdout.split()[-1]
