"""Which rank this is, from the environment of whatever started it; joining and leaving the process group."""

import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer import exits
from trainer.errors import UsageError
from trainer.ports import free_port


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


T = TypeVar("T")
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID")


def read_ranks(env: Mapping[str, str]) -> Ranks:
    """Ranks as DeepSpeed's launcher or torchrun set them, else as srun does, else this process alone.

    Raises:
        UsageError: a launcher's variables are set only in part, or are not numbers.
    """
    if any(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _ranks(env, _LAUNCHER, env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", ""))
    if "SLURM_STEP_ID" in env and env.get("SLURM_STEP_ID", "").isdigit():
        port = 20_000 + (int(env.get("SLURM_JOB_ID", "0")) * 16 + int(env["SLURM_STEP_ID"])) % 20_000
        return _ranks(env, _SLURM, env.get("MASTER_ADDR") or _first_host(env), env.get("MASTER_PORT", str(port)))
    return Ranks(master_port=free_port())


def _ranks(env: Mapping[str, str], names: tuple[str, ...], address: str, port: str) -> Ranks:
    missing = [name for name in names if name not in env]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} not set although {next(name for name in names if name in env)} is; start "
            "the run with deepspeed, torchrun or srun, or unset them all for a single process"
        )
    try:
        rank, world_size, local_rank = (int(env[name]) for name in names[:3])
        return Ranks(rank, world_size, local_rank, address, int(port))
    except ValueError as error:
        raise UsageError(
            f"{', '.join(f'{n}={env[n]}' for n in names[:3])}, MASTER_PORT={port}: expected whole numbers"
        ) from error


def _first_host(env: Mapping[str, str]) -> str:
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    try:
        found = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
        return found.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UsageError(f"scontrol names no first host of {hosts!r} ({error}); set MASTER_ADDR") from error


def join(ranks: Ranks) -> None:
    """Joins the process group: NCCL where there are GPUs, gloo elsewhere."""
    os.environ.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world_size),
        LOCAL_RANK=str(ranks.local_rank),
        MASTER_ADDR=ranks.master_addr,
        MASTER_PORT=str(ranks.master_port),
    )
    if ranks.device.type == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"LOCAL_RANK={ranks.local_rank}, but this host shows {torch.cuda.device_count()} GPUs; start as many "
                "ranks on a host as it has GPUs"
            )
        torch.cuda.set_device(ranks.device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if ranks.device.type == "cpu":
        # An op that DeepSpeed would compile at start-up, that training never calls, and whose shared memory it leaks.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def background_group() -> dist.ProcessGroup:
    """A gloo group of all ranks, for collectives that neither wait for a GPU nor get in between those of training."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup), "all ranks are members"
    return group


def from_main(value: T) -> T:
    """The main rank's value on all ranks; it is pickled."""
    answer = [value]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def peak_memory(ranks: Ranks) -> int:
    """Most bytes this rank ever held: allocated on its GPU, or resident on a machine without one."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def leave(code: int) -> None:
    """Ends this process; without os._exit gloo's threads can abort an interpreter that is already done.

    After success all ranks wait for each other; after a failure nobody waits, since the others may never come.
    """
    if code in (exits.FINISHED, exits.PREEMPTED) and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
