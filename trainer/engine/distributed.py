"""Which rank this is, from the environment of whatever started it; joining and leaving the process group."""

import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mixmae.base import exit_codes
from mixmae.base.errors import UsageError
from mixmae.base.rank_env import RankEnv, read_rank_env
from mixmae.trainer.engine.malloc import keep_freed_memory


class Ranks(RankEnv):
    """This process among its peers, with its device."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


T = TypeVar("T")


def read_ranks(env: Mapping[str, str]) -> Ranks:
    """This process's rank, see `mixmae.base.rank_env.read_rank_env`.

    Raises:
        UsageError: a launcher's variables are set only in part, or are not numbers.
    """
    return Ranks(**asdict(read_rank_env(env)))


def join(ranks: Ranks) -> None:
    """Joins the process group: NCCL where there are GPUs, gloo elsewhere."""
    os.environ.update(ranks.environment())
    if ranks.device.type == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"LOCAL_RANK={ranks.local_rank}, but this host shows {torch.cuda.device_count()} GPUs; start as many "
                "ranks on a host as it has GPUs"
            )
        torch.cuda.set_device(ranks.device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()
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
    if code in (exit_codes.FINISHED, exit_codes.PREEMPTED) and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
