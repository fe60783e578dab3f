"""`python -m mixmae.trainer.benchmarks.page`: writes the tables and roofline of docs/performance.md."""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from mixmae.trainer.benchmarks import mixed_conv
from mixmae.trainer.benchmarks.results import RESULTS
from mixmae.trainer.benchmarks.step import comparison

PAGE = Path("docs/performance.md")
PICTURE = Path("docs/roofline.png")
_PUBLISHED, _OURS = "#9a9a9a", "#3b6fb6"
_COLUMNS = (
    "device",
    "model",
    "precision",
    "K or method",
    "batch",
    "variant",
    "images/s",
    "to plain",
    "TFLOP/s",
    "of product",
    "peak GB",
)


def main() -> int:
    PAGE.write_text(with_tables(PAGE.read_text(), RESULTS))
    steps = measurements(RESULTS, "step")
    draw(steps, PICTURE)
    print(f"{PAGE} and {PICTURE} hold {len(steps)} measurements of steps")
    return 0


def measurements(results: Path, kind: str) -> list[dict[str, Any]]:
    """Of all files of a kind, `step` or `methods`."""
    return [found for file in sorted(results.glob(f"{kind}-*.json")) for found in json.loads(file.read_text())]


def with_tables(page: str, results: Path) -> str:
    """The page with each of its tables made anew."""
    layers = [json.loads(file.read_text()) for file in sorted(results.glob("mixed-conv-*.json"))]
    methods = measurements(results, "methods")
    tables = {
        "table": table(measurements(results, "step")),
        "methods": comparison(methods) if methods else "Not measured yet.",
        "mixed convolutions": "\n\n".join(map(mixed_conv.table, layers)),
    }
    for name, content in tables.items():
        page = with_table(page, content, f"<!-- {name}: make performance -->", f"<!-- end of {name} -->")
    return page


def table(steps: list[dict[str, Any]]) -> str:
    """A Markdown table with a row for each measurement."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for found in steps:
        ratio = "" if found["ratio_to_plain"] is None else f"{found['ratio_to_plain']:.2f}"
        memory = f"{found['peak_memory_bytes'] / 1e9:.2f}"
        cells = [
            f"{found['device']}, {found['cores']} cores" if found["device"] == found["cpu"] else found["device"],
            found["model"], found["precision"], str(found["num_images"] or found["method"]), str(found["batch"]),
            found["variant"],
            f"{found['images_per_second']:.2f}", ratio, f"{found['model_tflops']:.3g}",
            f"{found['share_of_product']:.1%}", memory,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(page: str, new: str, begin: str, end: str) -> str:
    """Replaces the table between the markers."""
    head, rest = page.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n\n{new}\n\n{end}{tail}"


def draw(steps: list[dict[str, Any]], file: Path) -> None:
    """A roofline plot: each measurement's share of its machine's peak in the same run, machines and models apart.

    A step is compute-bound by far (hundreds of FLOPs per byte of weights), so its roofline is the peak.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        figsize=(8, 0.24 * (len(steps) + len({_title(found) for found in steps})) + 0.6), layout="constrained"
    )
    marks: dict[int, str] = {}
    row = 0
    for title, together in groupby(steps, _title):
        axes.text(0, row, title, va="center", fontsize=8, fontweight="bold")
        for found in together:
            row += 1
            share, is_plain = found["share_of_product"], found["variant"].startswith("plain")
            axes.barh(row, 1, color="#eeeeee")
            axes.barh(row, share, color=_PUBLISHED if is_plain else _OURS)
            axes.text(share, row, f" {share:.0%}, {found['model_tflops']:.3g} TFLOP/s", va="center", fontsize=7)
            marks[row] = f"{found['variant']}, batch {found['batch']}"
        row += 1
    axes.set_yticks([*marks], [*marks.values()], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 1), ylim=(row - 0.4, -0.6), xlabel="model's operations per second, of a large matrix product's")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    for color, name in ((_PUBLISHED, "published code's way"), (_OURS, "this project's")):
        axes.barh(0, 0, color=color, label=name)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _title(found: dict[str, Any]) -> str:
    chip = found["device"].split("(")[0].strip()
    method = f"K = {found['num_images']}" if found["num_images"] else found["method"]
    return f"{chip}, {found['model'].removeprefix('mixmae_')}, {found['precision']}, {method}"


if __name__ == "__main__":
    sys.exit(main())
