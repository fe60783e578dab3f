"""Ranks on this machine alone, under DeepSpeed's launcher."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.launch.backends.job_spec import Attempt, Command, JobSpec
from mixmae.launch.backends.module_path import module_path
from mixmae.launch.supervision.token import TOKEN


@dataclass(frozen=True)
class LocalBackend:
    """A number of ranks on this machine, whatever hostfile it has."""

    ranks: int
    address = "127.0.0.1"

    def command(self, job: JobSpec, attempt: Attempt, environment: Mapping[str, str]) -> Command:
        """The command that starts the ranks.

        Args:
            environment: this process's; CUDA_VISIBLE_DEVICES chooses the accelerators.

        Raises:
            UsageError: it names fewer accelerators than ranks.
        """
        runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", "--hostfile", os.devnull]
        here = [*_devices(self.ranks, environment), "--master_port", str(attempt.port), "--no_local_rank"]
        rank = job.rank_arguments(self.ranks, attempt.name, str(attempt.port), launcher=True)
        return Command(
            [*runner, *here, "--module", "mixmae.launch.supervision.rank", *rank],
            {**module_path(environment), TOKEN: attempt.secret},
            private=job.private,
        )

    def distribute(self, files: Mapping[Path, str]) -> None:
        """Nothing to do: there are no other hosts."""

    def kill_leftovers(self, attempt: Attempt) -> None:
        """Nothing to do: processes here end with the one that started them."""


def _devices(ranks: int, environment: Mapping[str, str]) -> list[str]:
    """The runner's options; given a number of accelerators alone it would ignore which ones the user chose."""
    chosen = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if not chosen:
        return ["--num_gpus", str(ranks)]
    shown = f"CUDA_VISIBLE_DEVICES={','.join(chosen)}"
    if len(chosen) < ranks:
        raise UsageError(f"{shown} names {len(chosen)} devices, fewer than --local {ranks}; name more, or unset it")
    if not all(name.isdecimal() for name in chosen):
        raise UsageError(f"{shown}: DeepSpeed's launcher takes numbers only; name devices by their numbers")
    return ["--include", f"localhost:{','.join(chosen[:ranks])}"]
