"""The doctor's work on every rank: report facts, probe the host (its first rank), and measure collectives together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mixmae.trainer.doctor.facts import HostFacts, Pair, Plan, ProbeFacts, RankFacts, Reduction
from mixmae.trainer.doctor.message_store import ARRIVAL_SECONDS, MessageStore
from mixmae.trainer.doctor.probes.bandwidth import measure_reductions, measure_ring
from mixmae.trainer.doctor.probes.host import host_facts, rank_facts
from mixmae.trainer.doctor.probes.network import Listener, why_unreachable
from mixmae.trainer.doctor.probes.run_dir import probe_run_dir
from mixmae.trainer.doctor.probes.shards import probe_shards
from mixmae.trainer.engine import distributed
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.engine.interfaces import address_towards
from mixmae.trainer.recipe.schema import Recipe

MEASURING_SECONDS = 90.0
"""Timeout of the measurements in seconds: on a broken network a collective may hang."""


@dataclass(frozen=True)
class ProbeLimits:
    """Sizes and time limits of the probes.

    Attributes:
        write: bytes that each host writes to the run directory.
        read: seconds after which no further sample is read.
        reduce: sizes of the all-reduces in bytes, by backend.
    """

    write: int
    read: float
    reduce: Mapping[str, tuple[int, ...]]


_MIB = 1 << 20
FULL = ProbeLimits(64 * _MIB, 10.0, {"gloo": (_MIB, 4 * _MIB, 16 * _MIB), "nccl": (_MIB, 16 * _MIB, 256 * _MIB)})
SHORT = ProbeLimits(4 * _MIB, 2.0, {"gloo": (4 * _MIB,), "nccl": (64 * _MIB,)})


def report_facts(messages: MessageStore, ranks: Ranks, recipe: Recipe | None, listener: Listener) -> None:
    """Publishes this rank's facts, and its host's if it is the first rank there."""
    messages.publish(f"rank/{ranks.rank}", rank_facts(ranks), RankFacts)
    if ranks.local_rank == 0:
        port = recipe.monitoring.port if recipe is not None and recipe.monitoring.enabled else None
        messages.publish(f"host/{ranks.rank}", host_facts(ranks, port, listener.at), HostFacts)


def probe_host(ranks: Ranks, recipe: Recipe | None, plan: Plan, limits: ProbeLimits) -> ProbeFacts:
    """Probes a host from its first rank: connection to the next host, run directory, shards."""
    neighbour = plan.next_to(ranks.rank)
    name, unreachable = (neighbour[0], why_unreachable(*neighbour[1:])) if neighbour is not None else ("", "")
    run_dir = shards = None
    if recipe is not None:
        shards = probe_shards(recipe, limits.read)
        if plan.folder is not None:
            run_dir = probe_run_dir(recipe.run_dir, plan.folder, plan.token, ranks.rank, limits.write)
    return ProbeFacts(ranks.rank, name, unreachable, run_dir, shards)


def measure(ranks: Ranks, sizes: Sequence[int]) -> tuple[Reduction, ...]:
    """Joins the process group as training does, and times all-reduces. Collective."""
    distributed.join(ranks)
    return measure_reductions(ranks, sizes)


def form_background_group() -> None:
    """Forms the gloo group that training has beside NCCL's, and uses it. Collective.

    Raises:
        RuntimeError: ranks do not reach each other over the interfaces that gloo took.
    """
    dist.all_reduce(torch.ones(1), group=distributed.background_group())


def measure_pairs(ranks: Ranks, members: Sequence[int], names: Mapping[int, str]) -> tuple[Pair, ...]:
    """Bandwidth between neighbours of the ring; all pairs on the main rank, elsewhere none. Collective."""
    mine = measure_ring(ranks, members)
    everybody = distributed.all_gather(list(mine.items()), list[tuple[tuple[int, int], float]])
    found = [pair for rates in everybody if ranks.is_main for pair in rates]
    return tuple(Pair(names[first], names[second], rate) for (first, second), rate in found)


def leave_process_group(success: bool) -> None:
    """Destroys the process group, if there is one and every rank succeeded."""
    if success and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def follow(messages: MessageStore, ranks: Ranks, recipe: Recipe | None, limits: ProbeLimits) -> None:
    """Runs the doctor on a rank other than the main one.

    Raises:
        NoAnswerError, torch.distributed.DistError: the main rank exited early.
    """
    with Listener(address_towards(ranks.master_addr)) as listener:
        report_facts(messages, ranks, recipe, listener)
        plan = messages.receive("plan", Plan, 2 * ARRIVAL_SECONDS)
        if ranks.rank in (host[0] for host in plan.hosts):
            messages.answer_clock(ranks.rank)
            messages.publish(f"probe/{ranks.rank}", probe_host(ranks, recipe, plan, limits), ProbeFacts)
        sizes = messages.receive("sizes", tuple[int, ...], 2 * ARRIVAL_SECONDS)
    try:
        if sizes:
            measure(ranks, sizes)
            form_background_group()
            if members := messages.receive("ring", tuple[int, ...], MEASURING_SECONDS):
                measure_pairs(ranks, members, {})
            leave_process_group(success=True)
    except RuntimeError as error:  # a network error: the main rank reports it, and publishes when the ranks may exit
        messages.publish(f"failure/{ranks.rank}", str(error).splitlines()[0], str)
    messages.receive("over", bool, MEASURING_SECONDS)
    messages.publish(f"bye/{ranks.rank}", True, bool)
