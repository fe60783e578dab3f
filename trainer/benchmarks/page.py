"""`python -m mixmae.trainer.benchmarks.page`: docs/performance.md's table and roofline, from benchmarks/results."""

import json
import sys
from pathlib import Path
from typing import Any

from mixmae.trainer.benchmarks.results import RESULTS

PAGE = Path("docs/performance.md")
PICTURE = Path("docs/roofline.png")
_BEGIN, _END = "<!-- table: make performance -->", "<!-- end of table -->"
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
    "MFU",
    "peak GB",
)


def main() -> int:
    steps = [found for file in sorted(RESULTS.glob("step-*.json")) for found in json.loads(file.read_text())]
    PAGE.write_text(with_table(PAGE.read_text(), table(steps)))
    draw(steps, PICTURE)
    print(f"{PAGE} and {PICTURE} hold {len(steps)} measurements")
    return 0


def table(steps: list[dict[str, Any]]) -> str:
    """A row for each measurement."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for found in steps:
        ratio = "" if found["ratio_to_plain"] is None else f"{found['ratio_to_plain']:.2f}"
        memory = f"{found['peak_memory_bytes'] / 1e9:.2f}"
        cells = [
            f"{found['device']}, {found['cores']} cores" if found["device"] == found["cpu"] else found["device"],
            found["model"], found["precision"], str(found["num_images"] or found["method"]), str(found["batch"]),
            found["variant"],
            f"{found['images_per_second']:.2f}", ratio, f"{found['model_tflops']:.3g}", f"{found['mfu']:.1%}", memory,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(page: str, new: str) -> str:
    """The page with this table between its marks."""
    head, rest = page.split(_BEGIN)
    _, tail = rest.split(_END)
    return f"{head}{_BEGIN}\n\n{new}\n\n{_END}{tail}"


def _name(found: dict[str, Any]) -> str:
    chip = found["device"].split("(")[0].strip()
    model = found["model"].removeprefix("mixmae_")
    return f"{chip}, {model} {found['precision']}, batch {found['batch']}, {found['variant']}"


def draw(steps: list[dict[str, Any]], file: Path) -> None:
    """Each measurement under its roof: what share of the peak its machine reached while it ran.

    A step is compute-bound by far (hundreds of operations for a byte of its weights), so that its roof is the peak.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.36 * len(steps) + 1.2), layout="constrained")
    names = [_name(found) for found in steps]
    places = range(len(steps))
    axes.barh(
        places, [found["peak_tflops"] for found in steps], color="#e4e4e4", label="large matrix product, same run"
    )
    axes.barh(places, [found["model_tflops"] for found in steps], color="#3b6fb6", label="model")
    for place, found in zip(places, steps, strict=True):
        axes.text(found["model_tflops"], place, f" {found['mfu']:.0%}", va="center", fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")  # CPUs and GPUs are three orders apart
    axes.set_xlabel("TFLOP/s")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
