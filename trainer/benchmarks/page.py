"""`python -m mixmae.trainer.benchmarks.page`: writes the tables and roofline of docs/performance.md."""

import json
import sys
from pathlib import Path
from typing import Any

from mixmae.trainer.benchmarks import mixed_conv
from mixmae.trainer.benchmarks.results import RESULTS
from mixmae.trainer.benchmarks.step import comparison

PAGE = Path("docs/performance.md")
PICTURE = Path("docs/roofline.png")
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


def _name(found: dict[str, Any]) -> str:
    chip = found["device"].split("(")[0].strip()
    model = found["model"].removeprefix("mixmae_")
    return f"{chip}, {model} {found['precision']}, batch {found['batch']}, {found['variant']}"


def draw(steps: list[dict[str, Any]], file: Path) -> None:
    """A roofline plot: model FLOP/s of each measurement, and the peak of its machine in the same run.

    A step is compute-bound by far (hundreds of FLOPs per byte of weights), so its roofline is the peak.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.36 * len(steps) + 1.2), layout="constrained")
    names = [_name(found) for found in steps]
    rows = range(len(steps))
    axes.barh(rows, [found["peak_tflops"] for found in steps], color="#e4e4e4", label="large matrix product, same run")
    axes.barh(rows, [found["model_tflops"] for found in steps], color="#3b6fb6", label="model")
    for row, found in zip(rows, steps, strict=True):
        axes.text(found["model_tflops"], row, f" {found['share_of_product']:.0%}", va="center", fontsize=8)
    axes.set_yticks(rows, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")  # CPUs and GPUs differ by three orders of magnitude
    axes.set_xlabel("TFLOP/s")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
