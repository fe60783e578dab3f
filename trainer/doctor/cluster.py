"""All known facts of a cluster: the input of the checks. No torch."""

from dataclasses import dataclass
from functools import cached_property

from mixmae.trainer.doctor.facts import Clock, HostFacts, Network, ProbeFacts, RankFacts, RecipeFacts
from mixmae.trainer.recipe.schema import Recipe


@dataclass(frozen=True)
class Cluster:
    """All known facts, for the checks.

    Attributes:
        expected_ranks: ranks asked for; None where that is unknown.
        world_size: ranks that the launcher started.
        ranks: those that arrived.
        unresponsive: hosts, by their first rank, that arrived and then did not answer in time.
        interrupted: whether the launcher ended the ranks before all checks were done.
        link: expected network bandwidth, as the user gave it.
    """

    expected_ranks: int | None
    world_size: int
    ranks: tuple[RankFacts, ...]
    hosts: tuple[HostFacts, ...]
    recipe: Recipe | None = None
    recipe_facts: RecipeFacts | None = None
    clocks: tuple[Clock, ...] = ()
    probes: tuple[ProbeFacts, ...] = ()
    unresponsive: tuple[int, ...] = ()
    interrupted: bool = False
    network: Network | None = None
    link: float | None = None

    def ranks_of(self, host: HostFacts) -> tuple[RankFacts, ...]:
        """The ranks on a host."""
        machine = self._machine[host.rank]
        return tuple(rank for rank in self.ranks if rank.machine == machine)

    @cached_property
    def _machine(self) -> dict[int, str]:
        return {rank.rank: rank.machine for rank in self.ranks}
