"""What several tests share: ranks as processes, small recipes, small shards."""

import io
import multiprocessing
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from trainer.config import Recipe
from trainer.distributed import join, leave, read_ranks
from trainer.ports import free_port
from trainer.recipes import parse_recipe

RANKS_TIMEOUT = 600


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Calls `function(ranks, *args)` in `world_size` gloo processes; returns what each returned, by rank.

    The function must be importable (a plain function of a test module); results travel by torch.save.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        port = str(free_port())
        processes = [
            context.Process(target=_child, args=(function, rank, world_size, port, folder, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(RANKS_TIMEOUT)
            if process.is_alive() or process.exitcode:
                for other in processes:
                    other.kill()
                raise AssertionError(f"a rank ended with {process.exitcode}; its output is above")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _child(function: Callable[..., Any], rank: int, world_size: int, port: str, folder: str, args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    ranks = read_ranks(os.environ)
    join(ranks)
    torch.save(function(ranks, *args), Path(folder) / f"{rank}.pt")
    leave(0)


def needs_jpegtran() -> None:
    """Skips a test where jpegtran is missing; fails it in CI, which installs it."""
    if shutil.which("jpegtran") is None:
        lacks("needs the program jpegtran: apt-get install libjpeg-turbo-progs")


def lacks(reason: str) -> NoReturn:
    """Ends a test that cannot run on this machine: skipped, or failed in CI, which has all that tests need."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def tar_of(files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of files by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tiny_recipe(**changes: Any) -> Recipe:
    """A recipe that trains in seconds: 64 px images, four cells, a few thousand parameters. Keys are dotted paths."""
    content: dict[str, Any] = {
        "model": {
            "encoder": "mixmae_swin_nano",
            "img_size": 64,
            "num_images": 2,
            "decoder_dim": 16,
            "decoder_depth": 1,
            "decoder_num_heads": 2,
            "sizes": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": [4, 4, 4, 2]},
        },
        "data": {"num_workers": 0},
        "train": {"duration": "8 steps", "global_batch": 8, "micro_batch": 2, "precision": "fp32"},
        "optim": {"base_lr": 3e-2, "warmup": "2 steps"},
        "checkpoint": {"every": "1000 steps"},
        "log": {"every": 1, "pictures": None},
    }
    for path, value in changes.items():
        *sections, key = path.split(".")
        here = content
        for section in sections:
            here = here.setdefault(section, {})
        here[key] = value
    return parse_recipe(content, "tiny")
