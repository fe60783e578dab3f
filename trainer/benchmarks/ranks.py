"""Starts several ranks as processes on this machine."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mixmae.base.ports import free_port
from mixmae.trainer.engine.distributed import join, leave, read_ranks


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    threads: int = 1,
    timeout: float | None = None,
    start_method: str = "spawn",
) -> list[Any]:
    """Calls `function(ranks, *args)` in `world_size` joined processes; returns the results by rank.

    The function must be importable (a plain function of a module); results are passed by torch.save.

    Args:
        threads: torch's threads in each process.
        timeout: seconds that a rank may take to exit after those before it.
        start_method: multiprocessing's.

    Raises:
        RuntimeError: a rank failed or timed out; all are killed.
    """
    context: Any = multiprocessing.get_context(start_method)
    with tempfile.TemporaryDirectory(prefix="mixmae-ranks-") as folder:
        port = str(free_port())
        processes = [
            context.Process(target=_rank, args=(function, rank, world_size, port, threads, folder, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
            if process.is_alive() or process.exitcode:
                for other in processes:
                    other.kill()
                raise RuntimeError(f"a rank exited with code {process.exitcode}; see its output above")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, port: str, threads: int, folder: str, args: Any
) -> None:
    torch.set_num_threads(threads)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    ranks = read_ranks(os.environ)
    join(ranks)
    torch.save(function(ranks, *args), Path(folder) / f"{rank}.pt")
    leave(0)
