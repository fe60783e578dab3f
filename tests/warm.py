"""Processes that start warm: forked from one that has imported torch, DeepSpeed and the trainer once."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PRELOADED = [
    "deepspeed",
    "torch.utils.tensorboard",
    "mixmae.trainer.run.lifecycle",
    "tests.helpers",
    "hypothesis",
]
ROOT = Path(__file__).parents[1]
TIMEOUT = 600.0
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells a rank."""


def start_method() -> str:
    """Multiprocessing's name for such a start; processes that use CUDA cannot be forked, and start cold."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    return "spawn" if torch.cuda.is_available() else "forkserver"


class WarmProcess:
    """`python -m module argv...` or `python script argv...` with one thread, and as much of Popen as tests need."""

    def __init__(self, program: str, *argv: str, env: Mapping[str, str]) -> None:
        self.args = [program, *argv]
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self._outputs = [Path(self._folder.name) / name for name in ("out", "err")]
        for file in self._outputs:
            file.touch()
        context: Any = multiprocessing.get_context(start_method())
        self._process = context.Process(target=_run, args=(program, argv, dict(env), self._outputs))
        self._process.start()

    def __enter__(self) -> "WarmProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.join()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote, once it has ended; raises TimeoutExpired if it has not in time."""
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        out, err = (file.read_text() for file in self._outputs)
        return out, err


def run_module(module: str, *argv: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """What `python -m module argv...` did, in an environment that no launcher made."""
    clean = {key: value for key, value in os.environ.items() if key not in PLACE}
    process = WarmProcess(module, *argv, env={**clean, **environment})
    try:
        out, err = process.communicate(TIMEOUT)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode or 0, out, err)


def _run(program: str, argv: tuple[str, ...], environment: dict[str, str], outputs: list[Path]) -> None:
    for stream, file in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(file, os.O_WRONLY), stream.fileno())
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv[1:] = argv
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    run(program, run_name="__main__")
