"""`python -m mixmae.trainer.planning.weak_scaling`: writes table and picture of docs/planning.md, all modelled.

Each GPU keeps its micro-batch, so that the global batch grows with their number; steps are the roofline's, and what of
communication is not hidden is added. Without latency and jitter.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixmae.trainer.benchmarks.page import with_table
from mixmae.trainer.benchmarks.recipe import recipe_of
from mixmae.trainer.engine.deepspeed_engine import deepspeed_config
from mixmae.trainer.planning import traffic
from mixmae.trainer.planning.activation_memory import on_meta
from mixmae.trainer.planning.devices import build_cluster
from mixmae.trainer.planning.roofline import step_model
from mixmae.trainer.planning.states import Limits, count_parameters
from mixmae.trainer.recipe.schema import Recipe

PAGE, PICTURE = Path("docs/planning.md"), Path("docs/weak-scaling.png")
_MARKERS = ("<!-- weak scaling: make performance -->", "<!-- end of weak scaling -->")
_COUNTS = (8, 16, 32, 64, 128, 256, 512)
_CASES = (
    ("mixmae_swin_huge", "a100-80g", "8x200gbps"),
    ("mixmae_swin_huge", "h100", "8x400gbps"),
    ("mixmae_swin_huge", "h100", "200gbps"),
    ("mixmae_swin_base_w14", "a100-80g", "8x200gbps"),
    ("mixmae_swin_base_w14", "a100-80g", "100gbps"),
)
_MICRO_BATCH = 128


@dataclass(frozen=True)
class Scaled:
    """A step on a number of GPUs."""

    gpus: int
    seconds: float
    waiting: float
    """Of it for communication."""

    @property
    def images_per_second(self) -> float:
        return self.gpus * _MICRO_BATCH / self.seconds


def weak_scaling(recipe: Recipe, gpu: str, link: str, counts: Sequence[int] = _COUNTS) -> Iterator[Scaled]:
    """Steps of the recipe's micro-batch at ZeRO 2 with overlap, in nodes of eight GPUs."""
    alone = step_model(recipe, build_cluster(gpu, 1, 8, None).gpu, recipe.train.micro_batch)
    limits = Limits.of(deepspeed_config(recipe, 1, "cuda"))
    parameters = count_parameters(on_meta(recipe), limits)
    parts = traffic.traffic(2, "bf16", parameters, 1, limits)
    unhidden = min(1.0, limits.reduce_bucket / parameters.total)
    for gpus in counts:
        computing = alone.kernels + alone.host + alone.optimizer / gpus
        waiting = traffic.exposed(parts, build_cluster(gpu, gpus, 8, link), 2, computing, unhidden)
        assert waiting is not None, "the link is known"
        yield Scaled(gpus, computing + waiting, waiting)


def main() -> int:
    found = {case: list(weak_scaling(recipe_of(case[0], _MICRO_BATCH, []), *case[1:])) for case in _CASES}
    PAGE.write_text(with_table(PAGE.read_text(), table(found), *_MARKERS))
    draw(found, PICTURE)
    print(f"{PAGE} and {PICTURE} hold {len(found)} cases")
    return 0


_Found = dict[tuple[str, str, str], list[Scaled]]


def table(found: _Found) -> str:
    """A Markdown table: images per second, and efficiency beside eight GPUs."""
    lines = [f"| model, GPU, link of a node | {' | '.join(map(str, _COUNTS))} |", "|---" * (1 + len(_COUNTS)) + "|"]
    for case, steps in found.items():
        cells = [f"{one.images_per_second:,.0f} ({_efficiency(steps, one):.0%})" for one in steps]
        lines.append(f"| {_name(case)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _efficiency(steps: Sequence[Scaled], one: Scaled) -> float:
    return steps[0].seconds / one.seconds


def _name(case: tuple[str, str, str]) -> str:
    return f"{case[0].removeprefix('mixmae_')}, {case[1]}, {case[2]}"


def draw(found: _Found, file: Path) -> None:
    """Efficiency over the number of GPUs."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for case, steps in found.items():
        axes.plot([one.gpus for one in steps], [_efficiency(steps, one) for one in steps], "o-", label=_name(case))
    axes.set_xscale("log", base=2)
    axes.set_xticks(_COUNTS, [str(count) for count in _COUNTS])
    axes.set_ylim(0, 1.05)
    axes.set_xlabel(f"GPUs, of {_MICRO_BATCH} images each")
    axes.set_ylabel("efficiency (modelled)")
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
