"""`mixmae curves RUN OUT.png`: the loss, learning rate and gradient norm of a run."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.trainer.run.run_directory import read_events, read_recipe


def draw(run_dir: Path, out: Path) -> None:
    """Draws the logged steps of a run.

    Raises:
        UsageError: not a run directory, or one without logged steps; or matplotlib is not installed.
    """
    read_recipe(run_dir)
    steps = read_events(run_dir, "step")
    if not steps:
        raise UsageError(f"{run_dir} has no logged steps yet")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("curves needs matplotlib; install it with: pip install 'mixmae[plots]'")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    for place, (name, label) in enumerate([("loss", "loss"), ("lr", "learning rate"), ("grad_norm", "gradient norm")]):
        axes = figure.add_subplot(3, 1, place + 1)
        axes.plot([s["step"] for s in steps], [float("nan") if s[name] is None else s[name] for s in steps], lw=1.2)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    axes.set_xlabel("optimizer step")
    figure.suptitle(str(run_dir))
    try:
        figure.savefig(out, dpi=110)
    except ValueError as error:
        raise UsageError(f"{out}: {error}") from error


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="mixmae curves", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("out", type=Path, help="picture to write (.png, .svg, .pdf)")
    args = parser.parse_args(argv)
    draw(args.run, args.out)
    print(args.out)
    return 0
