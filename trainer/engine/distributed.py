"""Which rank this is, from the environment of whatever started it; joining and leaving the process group."""

import functools
import json
import multiprocessing
import os
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor
from torch._C._distributed_c10d import Store

from mixmae.base import exit_codes
from mixmae.base.errors import UsageError
from mixmae.base.rank_env import RankEnv, read_rank_env
from mixmae.models.ops.sdpa import pin_attention
from mixmae.trainer.engine.affinity import bind_to_gpu
from mixmae.trainer.engine.interfaces import choose_gloo_interface
from mixmae.trainer.engine.malloc import keep_freed_memory
from mixmae.trainer.engine.rendezvous import choose_interfaces, open_store
from mixmae.trainer.recipe.sections.launch import Launch


class Ranks(RankEnv):
    """This process among its peers, with its device."""

    @property
    def device(self) -> torch.device:
        """The GPU of its number on this host, or the only one that its task may see (Slurm's --gpus-per-task)."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", 0 if torch.cuda.device_count() == 1 else self.local_rank)


T = TypeVar("T")
_ACCELERATOR = "DS_ACCELERATOR"
_PATIENCE = 4.0
"""Times `launch.stuck_seconds` that a rank waits for the others in a collective: the supervisor, which names the late
rank, gives up first, after thrice that where a run starts or saves."""


def read_ranks(env: Mapping[str, str]) -> Ranks:
    """This process's rank, see `mixmae.base.rank_env.read_rank_env`.

    Raises:
        UsageError: a launcher's variables are set only in part, or are not numbers.
    """
    return Ranks(**asdict(read_rank_env(env)))


def join(ranks: Ranks, stuck_seconds: float = Launch().stuck_seconds, deterministic: bool = False) -> None:
    """Joins the process group: NCCL where there are GPUs, gloo elsewhere.

    Args:
        stuck_seconds: the recipe's, after which a supervisor takes a run for stuck.
        deterministic: the recipe's; on GPUs, whose libraries read it when they are first used.

    Raises:
        UsageError: this rank has no GPU of its own although there are some, or the environment names another
            accelerator.
    """
    os.environ.update(ranks.environment())
    _choose_accelerator(ranks.device.type)
    if ranks.device.type == "cuda":
        _take_gpu(ranks)
        if deterministic:
            compute_deterministically()
    else:
        keep_freed_memory()
    import deepspeed

    if ranks.device.type == "cpu":
        # An op that DeepSpeed would compile at start-up, that training never calls, and whose shared memory it leaks.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=_PATIENCE * stuck_seconds)
    # DeepSpeed forms its own group of all ranks, and names no timeout.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(dist.distributed_c10d, name, timeout)
    if not dist.is_initialized():
        choose_interfaces(ranks)
        store = open_store(ranks, timeout)
        choose_gloo_interface(ranks, store)
        if ranks.device.type == "cuda":
            _refuse_shared_gpu(ranks, store)
        device = ranks.device if ranks.device.type == "cuda" and ranks.world_size > 1 else None  # as DeepSpeed does
        dist.init_process_group(
            backend, timeout=timeout, store=store, rank=ranks.rank, world_size=ranks.world_size, device_id=device
        )
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def _choose_accelerator(kind: str) -> None:
    """Has DeepSpeed take the kind of device that torch found."""
    if (given := os.environ.get(_ACCELERATOR) or kind) != kind:
        raise UsageError(f"{_ACCELERATOR}={given}, but torch computes on {kind} here; unset it")
    os.environ[_ACCELERATOR] = kind


def _take_gpu(ranks: Ranks) -> None:
    index, count = ranks.device.index, torch.cuda.device_count()
    if index >= count:
        raise UsageError(
            f"LOCAL_RANK={ranks.local_rank}, but this host shows {count} GPUs; start as many ranks on a host as it has "
            "GPUs"
        )
    os.environ["LOCAL_RANK"] = str(index)  # by which DeepSpeed chooses the device
    torch.cuda.set_device(ranks.device)
    bind_to_gpu(torch.cuda.get_device_properties(ranks.device))
    pin_attention()
    torch.backends.cudnn.allow_tf32 = False  # as cuBLAS has it: fp32 of convolutions is fp32


def compute_deterministically() -> None:
    """Has GPUs compute and sum over ranks in one order: kernels that add by atomics give way to others, cuBLAS keeps
    its workspaces, NCCL sums along rings whatever the size."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    # Nothing reads it, and each new tensor would be written once more.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def _refuse_shared_gpu(ranks: Ranks, store: Store) -> None:
    """Before NCCL connects, which a group that is told its device does at once, and which would name no remedy."""
    gpu = str(torch.cuda.get_device_properties(ranks.device).uuid)
    if store.add(f"mixmae/gpu/{gpu}", 1) > 1:
        raise UsageError(
            f"rank {ranks.rank} (LOCAL_RANK={ranks.local_rank}) sees one GPU, {gpu}, which another rank has taken; "
            "start as many ranks on a host as it has GPUs, or bind one to each task"
        )


def background_group() -> dist.ProcessGroup:
    """A gloo group of all ranks, for collectives that neither wait for a GPU nor get in between those of training."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup), "all ranks are members"
    return group


def from_main(value: T, kind: Any = None) -> T:
    """The main rank's value on all ranks.

    Values travel as JSON of their type: torch's own object collectives unpickle, and so run, whatever arrives.

    Args:
        kind: the type, as pydantic takes it; without one, what JSON has: lists for tuples, text for keys.
    """
    content = _as_bytes(_encode(value, kind), None)
    size = torch.tensor([len(content)], device=content.device)
    dist.broadcast(size, src=0)
    if len(content) != size.item():
        content = torch.empty(int(size), dtype=torch.uint8, device=size.device)
    dist.broadcast(content, src=0)
    found: T = _decode(content, kind)
    return found


def all_gather(value: T, kind: Any = None, group: dist.ProcessGroup | None = None) -> list[T]:
    """All ranks' values, by rank; as JSON, see `from_main`."""
    return [_decode(part, kind) for part in _gather_bytes(value, kind, group)]


def gather_to_main(value: T, kind: Any = None) -> list[T] | None:
    """All ranks' values, by rank, on the main rank; None on the others, which do not read them."""
    parts = _gather_bytes(value, kind, None)
    return [_decode(part, kind) for part in parts] if dist.get_rank() == 0 else None


def _gather_bytes(value: Any, kind: Any, group: dist.ProcessGroup | None) -> list[Tensor]:
    """uint8 [N] of each rank."""
    content = _as_bytes(_encode(value, kind), group)
    size, world_size = torch.tensor([len(content)], device=content.device), dist.get_world_size(group)
    sizes = [torch.empty_like(size) for _ in range(world_size)]
    dist.all_gather(sizes, size, group=group)
    longest = int(max(sizes))
    parts = [torch.empty(longest, dtype=torch.uint8, device=content.device) for _ in range(world_size)]
    dist.all_gather(parts, torch.nn.functional.pad(content, (0, longest - len(content))), group=group)
    return [part[: int(own)] for part, own in zip(parts, sizes, strict=True)]


def _encode(value: Any, kind: Any) -> bytes:
    return json.dumps(value).encode() if kind is None else _adapter(kind).dump_json(value)


def _decode(content: Tensor, kind: Any) -> Any:
    text = content.cpu().numpy().tobytes()
    return json.loads(text) if kind is None else _adapter(kind).validate_json(text)


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _as_bytes(content: bytes, group: dist.ProcessGroup | None) -> Tensor:
    """uint8 [N], where the group's backend can send it from."""
    tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return tensor.cuda() if dist.get_backend(group) == "nccl" else tensor


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_reduce_max(value: int, ranks: Ranks) -> int:
    """The largest of all ranks' numbers, for which the host waits."""
    if not dist.is_initialized():
        return value
    found = torch.tensor(value, device=ranks.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def peak_memory(ranks: Ranks) -> int:
    """Most bytes this rank ever held: allocated on its GPU, or resident on a machine without one."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def leave(code: int) -> NoReturn:
    """Ends this process and its data workers; without os._exit gloo's threads can abort an interpreter that is done.

    After success all ranks wait for each other; after a failure nobody waits, since the others may never come.
    """
    try:
        if code in (exit_codes.FINISHED, exit_codes.PREEMPTED) and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except Exception as error:
        code = exit_codes.FAILED
        print(f"mixmae: error: another rank was lost at the end: {error}", file=sys.stderr)
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()  # they do not heed SIGTERM
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads any more
                stream.flush()
        os._exit(code)
