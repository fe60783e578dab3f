"""Network bandwidth: all-reduces of all ranks, and point-to-point between pairs of neighbours if those are slow."""

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from mixmae.trainer.doctor.facts import Reduction
from mixmae.trainer.engine.distributed import Ranks

_REPEATS = 5
_PAIR_BYTES = 16 << 20


class WrongSumError(RuntimeError):
    """An all-reduce gave a wrong sum."""


def measure_reductions(ranks: Ranks, sizes: Sequence[int]) -> tuple[Reduction, ...]:
    """Times all-reduces of these sizes in bytes. Collective.

    Raises:
        WrongSumError: data is corrupted in transit.
    """
    return tuple(Reduction(size, _reduction(ranks, size)) for size in sizes)


def _reduction(ranks: Ranks, size: int) -> float:
    values = torch.ones(size // 4, device=ranks.device)
    dist.all_reduce(values)
    low, high = values.min().item(), values.max().item()
    if not low == high == ranks.world_size:
        raise WrongSumError(f"all-reduce of ones over {ranks.world_size} ranks gave {low:g} to {high:g}")
    values.zero_()
    seconds = _time(ranks, lambda: [dist.all_reduce(values) for _ in range(_REPEATS)])
    slowest = torch.tensor(seconds / _REPEATS, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def _time(ranks: Ranks, work: Callable[[], object]) -> float:
    """Duration of some work in seconds, with the device synchronised before and after."""
    _synchronize(ranks)
    started = time.perf_counter()
    work()
    _synchronize(ranks)
    return time.perf_counter() - started


def _synchronize(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)


def measure_ring(ranks: Ranks, members: Sequence[int]) -> dict[tuple[int, int], float]:
    """Bandwidth between neighbours of a ring, in bytes per second and one direction at a time. Collective.

    Pairs without a common rank are measured at the same time.

    Returns:
        the pairs of which this rank is the first.
    """
    rates = {}
    for turn in turns(members):
        dist.barrier()
        for first, second in turn:
            if ranks.rank in (first, second):
                seconds = _exchange(ranks, first, second)
                if ranks.rank == first:
                    rates[first, second] = 2 * _REPEATS * _PAIR_BYTES / seconds
    dist.barrier()
    return rates


def turns(members: Sequence[int]) -> list[list[tuple[int, int]]]:
    """The pairs of neighbours of a ring, in groups of pairs without a common rank."""
    pairs = [(a, b) for a, b in zip(members, [*members[1:], members[0]], strict=True) if a != b]
    if len(members) == 2:
        pairs = pairs[:1]
    last = [pairs.pop()] if len(pairs) > 1 and len(pairs) % 2 else []
    return [turn for turn in (pairs[::2], pairs[1::2], last) if turn]


def _exchange(ranks: Ranks, first: int, second: int) -> float:
    values = torch.zeros(_PAIR_BYTES // 4, device=ranks.device)
    there, back = (dist.send, dist.recv) if ranks.rank == first else (dist.recv, dist.send)
    other = second if ranks.rank == first else first

    def trips() -> None:
        for _ in range(_REPEATS):
            there(values, other)
            back(values, other)

    trips()  # warm-up: opens the connection
    return _time(ranks, trips)
