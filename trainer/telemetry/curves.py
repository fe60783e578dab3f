"""`mixmae curves RUN OUT.png`: the loss, learning rate and gradient norm of a run, and what its task measured."""

import argparse
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import EVENTS
from mixmae.trainer.telemetry.events import read_events

TRAINING = {"loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm"}

_LARGEST = 1e300
"""More is no measurement, and breaks axes."""

Curve = tuple[str, list[int], list[float]]
"""Label, steps and values."""


def draw(run_dir: Path, out: Path) -> None:
    """Draws the logged steps and evaluations of a run.

    Raises:
        UsageError: not a run directory, or one without logged steps; or matplotlib is not installed.
    """
    if not (run_dir / EVENTS).is_file():
        raise UsageError(f"{run_dir} is not a run directory: it has no {EVENTS}")
    steps = read_events(run_dir, "step")
    if not steps:
        raise UsageError(f"{run_dir} has no logged steps yet")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("curves needs matplotlib; install it with: pip install 'mixmae[plots]'")
    from matplotlib.figure import Figure

    curves = [_curve(steps, name, label) for name, label in TRAINING.items()] + _evaluation_curves(run_dir)
    figure = Figure(figsize=(8, 2 * len(curves)), layout="constrained")
    for number, (label, at, values) in enumerate(curves, 1):
        axes = figure.add_subplot(len(curves), 1, number)
        axes.plot(at, values, lw=1.2, marker="." if len(at) < 50 else "")
        axes.set_ylabel(label, parse_math=False)
        axes.grid(alpha=0.3)
    axes.set_xlabel("optimizer step")
    figure.suptitle(str(run_dir), parse_math=False)
    try:
        figure.savefig(out, dpi=110)
    except ValueError as error:
        raise UsageError(f"{out}: {error}") from error


def _curve(records: Sequence[Mapping[str, Any]], name: str, label: str) -> Curve:
    return label, [record["step"] for record in records], [_number(record.get(name)) for record in records]


def _evaluation_curves(run_dir: Path) -> list[Curve]:
    """One for each metric that the task measured, in the order in which they came up."""
    events = [event for event in read_events(run_dir, "evaluation") if isinstance(event.get("metrics"), dict)]
    measured = [{**event["metrics"], "step": event["step"]} for event in events]
    names = dict.fromkeys(name for record in measured for name in record if name != "step")
    return [_curve([record for record in measured if name in record], name, f"eval/{name}") for name in names]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < _LARGEST else math.nan


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae curves", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("out", type=Path, help="picture to write (.png, .svg, .pdf)")
    args = parser.parse_args(argv)
    draw(args.run, args.out)
    print(args.out)
    return 0
