"""A real run of two ranks with faults that files turn on, on GPUs as far as monitoring knows."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from mixmae.base.ports import free_port
from mixmae.trainer.data.batch_reader import Batch
from mixmae.trainer.engine.deepspeed_engine import build_engine
from mixmae.trainer.engine.distributed import Ranks, join, leave, read_ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.checking import check
from mixmae.trainer.run.loop import fit
from mixmae.trainer.run.preparing import prepare
from mixmae.trainer.telemetry.observer import Observer

DRIVERS = Path(__file__).parent / "drivers"
"""Where Python finds a `pynvml` that needs no GPU."""


class Control:
    """Which faults are on: files that any process can make and remove."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on(self, fault: str) -> bool:
        return (self._folder / fault).exists()

    def set(self, fault: str, on: bool) -> None:
        (self._folder / fault).touch() if on else (self._folder / fault).unlink()

    def wait_while(self, fault: str) -> None:
        while self.on(fault):
            time.sleep(0.05)


class FaultyStream:
    """A stream whose batches come late on all ranks (`slow`), or not at all on one (`no-data-1`)."""

    def __init__(self, stream: Any, control: Control, rank: int) -> None:
        self._stream, self._control, self._rank = stream, control, rank

    def __next__(self) -> Batch:
        if self._control.on("slow"):
            time.sleep(0.2)
        self._control.wait_while(f"no-data-{self._rank}")
        batch: Batch = next(self._stream)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def train_with_faults(rank: int, port: int, recipe: Recipe, control: Control) -> None:
    """Trains as the main job does; `no-engine-1` holds up rank 1 while it starts, `nan` and `steep` spoil losses,
    `collapse` the features that are probed."""
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in env.items()})
    ranks = read_ranks(os.environ)
    job = check(recipe, ranks)
    join(ranks)

    def held(*given: Any) -> Any:
        control.wait_while(f"no-engine-{rank}")
        return build_engine(*given)

    pretend_drivers()
    with mock.patch("mixmae.trainer.run.preparing.build_engine", held):
        run = prepare(job, ranks)
    pretend_device(run.observer, control)
    run.batches = FaultyStream(run.batches, control, rank)  # type: ignore[assignment]
    model = run.engine.module
    forward: Callable[..., Any] = model.forward

    def faulty(*inputs: Any) -> Any:
        loss = forward(*inputs)
        if control.on("nan"):
            loss = loss * float("nan")
        return loss * 20 if control.on("steep") else loss

    encode: Callable[..., Any] = model.encoder.forward

    def collapsed(*inputs: Any) -> Any:
        features = encode(*inputs)
        return features * 0 if control.on("collapse") and not model.training else features

    model.forward, model.encoder.forward = faulty, collapsed
    fit(run)
    leave(0)


class OnGpus(Ranks):
    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank)


def pretend_drivers() -> None:
    """Processes that this one starts, of which its exporter is one, find an NVML."""
    paths = [str(DRIVERS), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def pretend_device(observer: Observer, control: Control) -> None:
    """The observer takes its rank for one on a GPU of 80 GiB, half of which is held, or nearly all (`full-device`)."""
    gib = 2**30

    def held(device: torch.device) -> int:
        return 78 * gib if control.on("full-device") else 40 * gib

    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        mock.patch.object(torch.cuda, name, held).start()
    properties = SimpleNamespace(total_memory=80 * gib)
    mock.patch.object(torch.cuda, "get_device_properties", return_value=properties).start()
    observer.ranks = OnGpus(**asdict(observer.ranks))


@contextmanager
def faulty_run(recipe: Recipe, control: Control) -> Iterator[list[SpawnProcess]]:
    """The two ranks, until the end of the context."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    ranks = [
        context.Process(target=train_with_faults, args=(rank, port, recipe, control), daemon=False) for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
