"""What every rank does: it reports, its host's first rank looks around, and all measure the network together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from mixmae.trainer.doctor.facts import HostFacts, Pair, Plan, ProbeFacts, RankFacts, Reduction
from mixmae.trainer.doctor.gather.bandwidth import measure_reductions, measure_ring
from mixmae.trainer.doctor.gather.host import host_facts, rank_facts
from mixmae.trainer.doctor.gather.network import Listener, address_towards, why_unreachable
from mixmae.trainer.doctor.gather.run_dir import look_at_run_dir
from mixmae.trainer.doctor.gather.shards import look_at_shards
from mixmae.trainer.doctor.meeting import ARRIVAL, Meeting
from mixmae.trainer.engine import distributed
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe

MEASURING = 90.0
"""Seconds in which an all-reduce has to be measured: a broken network never ends by itself."""


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Attributes:
        write: bytes that each host writes into the run directory.
        read: seconds after which no further sample is read.
        reduce: bytes of the all-reduces, by backend.
    """

    write: int
    read: float
    reduce: Mapping[str, tuple[int, ...]]


_MIB = 1 << 20
FULL = Effort(64 * _MIB, 10.0, {"gloo": (_MIB, 4 * _MIB, 16 * _MIB), "nccl": (_MIB, 16 * _MIB, 256 * _MIB)})
SHORT = Effort(4 * _MIB, 2.0, {"gloo": (4 * _MIB,), "nccl": (64 * _MIB,)})


def arrive(meeting: Meeting, ranks: Ranks, recipe: Recipe | None, listener: Listener) -> None:
    """Says who this is; a host's first rank also what its host is."""
    meeting.tell(f"rank/{ranks.rank}", rank_facts(ranks), RankFacts)
    if ranks.local_rank == 0:
        port = recipe.monitoring.port if recipe is not None and recipe.monitoring.enabled else None
        meeting.tell(f"host/{ranks.rank}", host_facts(ranks, port, listener.at), HostFacts)


def look(ranks: Ranks, recipe: Recipe | None, plan: Plan, effort: Effort) -> ProbeFacts:
    """What a host's first rank finds by trying."""
    neighbour = plan.next_to(ranks.rank)
    name, unreachable = (neighbour[0], why_unreachable(*neighbour[1:])) if neighbour is not None else ("", "")
    run_dir = shards = None
    if recipe is not None:
        shards = look_at_shards(recipe, effort.read)
        if plan.folder is not None:
            run_dir = look_at_run_dir(recipe.run_dir, plan.folder, plan.token, ranks.rank, effort.write)
    return ProbeFacts(ranks.rank, name, unreachable, run_dir, shards)


def measure(ranks: Ranks, sizes: Sequence[int]) -> tuple[Reduction, ...]:
    """Joins the process group as training does, and times all-reduces; a collective call."""
    distributed.join(ranks)
    return measure_reductions(ranks, sizes)


def measure_pairs(ranks: Ranks, members: Sequence[int], names: Mapping[int, str]) -> tuple[Pair, ...]:
    """Rates between neighbours; on the main rank those of all pairs, elsewhere nothing. A collective call."""
    mine = measure_ring(ranks, members)
    everybody: list[dict[tuple[int, int], float] | None] | None = [None] * ranks.world_size if ranks.is_main else None
    dist.gather_object(mine, everybody)
    found = [pair for rates in everybody or () if rates is not None for pair in rates.items()]
    return tuple(Pair(names[first], names[second], rate) for (first, second), rate in found)


def part(success: bool) -> None:
    """Leaves the process group, if there is one and all of it got here."""
    if success and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def attend(meeting: Meeting, ranks: Ranks, recipe: Recipe | None, effort: Effort) -> None:
    """All of it for a rank that is not the main one.

    Raises:
        AbsentError, torch.distributed.DistError: the main rank ended early.
    """
    with Listener(address_towards(ranks.master_addr)) as listener:
        arrive(meeting, ranks, recipe, listener)
        plan = meeting.hear("plan", Plan, 2 * ARRIVAL)
        if ranks.rank in (host[0] for host in plan.hosts):
            meeting.answer_clock(ranks.rank)
            meeting.tell(f"probe/{ranks.rank}", look(ranks, recipe, plan, effort), ProbeFacts)
        sizes = meeting.hear("sizes", tuple[int, ...], 2 * ARRIVAL)
    try:
        if sizes:
            measure(ranks, sizes)
            if members := meeting.hear("ring", tuple[int, ...], MEASURING):
                measure_pairs(ranks, members, {})
            part(success=True)
    except RuntimeError as error:  # of the network: the main rank tells it, and says when all is over
        meeting.tell(f"failure/{ranks.rank}", str(error).splitlines()[0], str)
    meeting.hear("over", bool, MEASURING)
    meeting.tell(f"bye/{ranks.rank}", True, bool)
