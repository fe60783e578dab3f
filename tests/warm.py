"""Processes that start warm: forked from one that has imported torch, DeepSpeed and the trainer, once."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

PRELOADED = ["deepspeed", "torch.utils.tensorboard", "mixmae.trainer.run.lifecycle", "tests.helpers", "hypothesis"]
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells a rank."""


def start_method() -> str:
    """Multiprocessing's name for such a start; processes that use CUDA cannot be forked, and start cold."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    return "spawn" if torch.cuda.is_available() else "forkserver"


def run_module(module: str, *argv: str, timeout: float = 300, **environment: str) -> "subprocess.CompletedProcess[str]":
    """What `python -m module argv...` did in an environment without a launcher's variables, one thread each.

    Raises:
        subprocess.TimeoutExpired: it took too long, and was killed.
    """
    clean = {key: value for key, value in os.environ.items() if key not in PLACE}
    with tempfile.TemporaryDirectory(prefix="run-module-") as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        arguments = (module, argv, {**clean, **environment}, out, err)
        context: Any = multiprocessing.get_context(start_method())
        process = context.Process(target=_run_module, args=arguments)
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([module, *argv], timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess([module, *argv], process.exitcode, out.read_text(), err.read_text())


def _run_module(module: str, argv: tuple[str, ...], environment: dict[str, str], out: Path, err: Path) -> None:
    for stream, file in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv[1:] = argv
    runpy.run_module(module, run_name="__main__", alter_sys=True)
