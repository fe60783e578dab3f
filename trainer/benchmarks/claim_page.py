"""`python -m mixmae.trainer.benchmarks.claim_page`: writes the tables and the picture of docs/claim.md."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mixmae.trainer.benchmarks.claim import COMPARED
from mixmae.trainer.benchmarks.page import with_table
from mixmae.trainer.benchmarks.results import RESULTS

PAGE, PICTURE = Path("docs/claim.md"), Path("docs/claim.png")
FIGURES = {
    "kNN": ("probe", "probe_knn"),
    "linear": ("probe", "probe_linear"),
    "1 % of labels": ("finetune_1", "top1"),
    "10 % of labels": ("finetune_10", "top1"),
}
"""By title: kind of run, and name of its figure."""
_LAST = "finetune_10"
"""What is done last with a seed."""
NAMES = {"none": "no pretraining", "mixmae": "MixMAE, K = 2", "simmim": "SimMIM", "mae": "MAE, our reading for Swin"}


def main() -> int:
    found = json.loads((RESULTS / "claim.json").read_text())
    PAGE.write_text(with_tables(PAGE.read_text(), found))
    draw(found, PICTURE)
    print(f"{PAGE} and {PICTURE} hold {len(found['runs'])} runs")
    return 0


def with_tables(page: str, found: dict[str, Any]) -> str:
    """The page with both of its tables made anew: of the methods, and of the ablations."""
    ablations = [start for start in starts_of(found) if start not in COMPARED]
    tables = {
        "methods": table(found, COMPARED),
        "ablations": table(found, ("mixmae", *ablations)) if ablations else "Not measured yet.",
    }
    for title, content in tables.items():
        page = with_table(page, content, f"<!-- {title}: make performance -->", f"<!-- end of {title} -->")
    return page


def starts_of(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["start"] for run in found["runs"]))


def values(found: dict[str, Any], start: str, kind: str, name: str) -> list[float]:
    """A figure of each seed of which all figures are there."""
    own = [run for run in found["runs"] if run["start"] == start]
    seeds = {run["seed"] for run in own if run["kind"] == _LAST}
    return [run[name] for run in own if run["kind"] == kind and run["seed"] in seeds]


def table(found: dict[str, Any], starts: Iterable[str]) -> str:
    """A Markdown table with a row for each start."""
    heads = ["", "seeds", "step (ms)", "steps", "seconds", *FIGURES]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for start in starts:
        steps = values(found, start, "pretrain", "steps")
        seconds = values(found, start, "pretrain", "processor_seconds")
        cells = [
            NAMES.get(start, f"`{start}`"),
            str(len(values(found, start, *FIGURES["10 % of labels"]))),
            f"{1000 * found['step_seconds'][start]:.0f}" if steps else "",
            f"{steps[0]:.0f}" if steps else "0",
            f"{mean(seconds):.0f}" if seconds else "0",
            *(percent(values(found, start, *figure)) for figure in FIGURES.values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(shares: list[float]) -> str:
    """Mean and, of several, standard deviation."""
    if not shares:
        return ""
    spread = f" ± {100 * stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * mean(shares):.1f}{spread}"


def draw(found: dict[str, Any], file: Path) -> None:
    """A panel for each figure: a point for each seed, and a line at their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    starts = [start for start in COMPARED if start in starts_of(found)]
    for number, (title, (kind, name)) in enumerate(FIGURES.items(), 1):
        axes = figure.add_subplot(1, len(FIGURES), number)
        for place, start in enumerate(starts):
            shares = [100 * share for share in values(found, start, kind, name)]
            if not shares:
                continue
            axes.hlines(mean(shares), place - 0.3, place + 0.3, color=f"C{place}", lw=2)
            axes.plot([place] * len(shares), shares, "o", ms=5, color=f"C{place}", alpha=0.6)
        axes.set_xticks(range(len(starts)), [NAMES[start].split(",")[0] for start in starts], rotation=30, ha="right")
        axes.set_xlim(-0.6, len(starts) - 0.4)
        axes.set_title(title if kind == "probe" else f"fine-tuned, {title}", fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("top-1 of held-out images (%)")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
