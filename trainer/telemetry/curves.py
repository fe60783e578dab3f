"""`mixmae curves RUN ... OUT.png`: loss, learning rate and gradient norm of runs, and what their tasks measured.

Several runs, or a folder of runs, are drawn over one another.
"""

import argparse
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import EVENTS, runs_below
from mixmae.trainer.telemetry.events import read_events

TRAINING = {"loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm"}

_LARGEST = 1e300
"""More is no measurement, and breaks axes."""

_WHOLE: dict[str, Any] = {"lw": 1.2, "alpha": 1.0, "zorder": 3}
_OF_CLASS: dict[str, Any] = {"lw": 0.8, "alpha": 0.4, "zorder": 2}

Curves = dict[str, tuple[list[int], list[float]]]
"""Steps and values by label."""


def draw(run_dirs: Sequence[Path], out: Path) -> None:
    """Draws the logged steps and evaluations of runs, a panel for each kind of value, in which those of single classes
    (`box_ap/dog`) stand pale behind that of all.

    Raises:
        UsageError: not a run directory, or one without logged steps; or matplotlib is not installed.
    """
    runs = {name: _curves(run_dir) for name, run_dir in zip(_names(run_dirs), run_dirs, strict=True)}
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("curves needs matplotlib; install it with: pip install 'mixmae[plots]'")
    from matplotlib.figure import Figure

    panels: dict[str, list[str]] = {}
    for label in dict.fromkeys(label for curves in runs.values() for label in curves):
        panels.setdefault("/".join(label.split("/")[:2]), []).append(label)
    figure = Figure(figsize=(8, 2 * len(panels)), layout="constrained")
    for number, (panel, labels) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(len(panels), 1, number)
        for color, (name, curves) in enumerate(runs.items()):
            for label in labels:
                at, values = curves.get(label, ([], []))
                named = name if label == labels[0] else None
                style = _WHOLE if label == panel else _OF_CLASS
                axes.plot(at, values, marker="." if len(at) < 50 else "", color=f"C{color}", label=named, **style)
        axes.set_ylabel(panel, parse_math=False)
        axes.grid(alpha=0.3)
    axes.set_xlabel("optimizer step")
    if len(runs) > 1:
        legend = figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=min(3, len(runs)))
        for text in legend.get_texts():
            text.set_parse_math(False)
    else:
        figure.suptitle(str(run_dirs[0]), parse_math=False)
    try:
        figure.savefig(out, dpi=110)
    except ValueError as error:
        raise UsageError(f"{out}: {error}") from error


def _curves(run_dir: Path) -> Curves:
    """Of the logged steps, then one for each metric that the task measured, in the order in which they came up."""
    if not (run_dir / EVENTS).is_file():
        raise UsageError(f"{run_dir} is not a run directory: it has no {EVENTS}")
    steps = read_events(run_dir, "step")
    if not steps:
        raise UsageError(f"{run_dir} has no logged steps yet")
    events = [event for event in read_events(run_dir, "evaluation") if isinstance(event.get("metrics"), dict)]
    measured = [{**event["metrics"], "step": event["step"]} for event in events]
    names = dict.fromkeys(name for record in measured for name in record if name != "step")
    return {label: _curve(steps, name) for name, label in TRAINING.items()} | {
        f"eval/{name}": _curve([record for record in measured if name in record], name) for name in names
    }


def _curve(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    return [record["step"] for record in records], [_number(record.get(name)) for record in records]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < _LARGEST else math.nan


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Their paths, without the folder that all of them share."""
    if len(run_dirs) == 1:
        return [run_dirs[0].name]
    shared = os.path.commonpath([path.absolute() for path in run_dirs])
    return [str(path.absolute().relative_to(shared)) for path in run_dirs]


def _runs(paths: Sequence[Path]) -> list[Path]:
    found = []
    for path in paths:
        try:
            runs = runs_below(path)
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        if not runs:
            raise UsageError(f"{path} is neither a run directory nor a folder of them")
        found += runs
    return list(dict.fromkeys(found))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae curves", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory, or a folder of them")
    parser.add_argument("out", type=Path, metavar="OUT", help="picture to write (.png, .svg, .pdf)")
    args = parser.parse_intermixed_args(argv)
    if args.out.is_dir():
        raise UsageError(f"{args.out} is a directory; name the picture to write last, such as curves.png")
    draw(_runs(args.runs), args.out)
    print(args.out)
    return 0
