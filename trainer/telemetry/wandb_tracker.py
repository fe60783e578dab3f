"""A run's record on Weights & Biases, which DeepSpeed's monitor writes; the package is the extra `wandb`."""

import importlib.util
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from mixmae.base.errors import UsageError
from mixmae.base.files import atomic_write
from mixmae.base.run_directory import WANDB
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe

_ID = "id"


def check_wandb(recipe: Recipe) -> None:
    """Raises UsageError if the recipe asks for Weights & Biases and the package is not installed."""
    if recipe.log.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UsageError(
            f"log.wandb.project={recipe.log.wandb.project}, but the package wandb is not installed: pip install "
            "'mixmae[wandb]', or log.wandb=null"
        )


def prepare_wandb(recipe: Recipe, ranks: Ranks) -> None:
    """Names the W&B run after the run directory and keeps its files there; all attempts at a run are one W&B run.

    To be called before the engine is made, which makes DeepSpeed's monitor.
    """
    if recipe.log.wandb is None or not ranks.is_main:
        return
    folder = recipe.run_dir / WANDB
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {"NAME": recipe.run_dir.resolve().name, "DIR": str(recipe.run_dir), "RESUME": "allow"}
    for name, value in {**defaults, "RUN_ID": _run_id(folder / _ID)}.items():
        os.environ.setdefault(f"WANDB_{name}", value)


@contextmanager
def explain_wandb_errors(recipe: Recipe) -> Iterator[None]:
    """Turns what W&B refuses while the engine is built (no key, no such entity, no network) into a UsageError."""
    if recipe.log.wandb is None:
        yield
        return
    import wandb

    try:
        yield
    except wandb.errors.Error as error:
        why = " ".join(str(error).split())
        raise UsageError(f"log.wandb: {why}; log in with 'wandb login', or set WANDB_MODE=offline") from error


def _run_id(file: Path) -> str:
    if not file.is_file():
        atomic_write(file, uuid.uuid4().hex[:12] + "\n")
    return file.read_text().strip()


class Tracker:
    """DeepSpeed's monitor, which logs a run's scalars by samples seen, as it does its own learning rate."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    @classmethod
    def of(cls, engine: Any) -> Self | None:
        """None where the recipe asks for no tracking."""
        return cls(engine.monitor) if engine.monitor.enabled else None

    def scalars(self, samples: int, values: Iterable[tuple[str, float]]) -> None:
        self._monitor.write_events([(name, value, samples) for name, value in values])

    def close(self, clean: bool) -> None:
        """Ends the W&B run here: its exit hook would not run, since ranks leave without interpreter shutdown."""
        import wandb

        wandb.finish(exit_code=0 if clean else 1)
