"""All facts collected about a cluster: the input of the checks. No torch."""

from dataclasses import dataclass
from functools import cached_property

from mixmae.trainer.doctor.facts import Clock, HostFacts, Network, ProbeFacts, RankFacts, RecipeFacts
from mixmae.trainer.recipe.schema import Recipe


@dataclass(frozen=True)
class Cluster:
    """All facts collected, for the checks.

    Attributes:
        expected_ranks: requested number of ranks; None if unknown.
        world_size: number of ranks that the launcher started.
        ranks: facts of the ranks that reported.
        unresponsive: first ranks of the hosts that reported and then timed out.
        interrupted: whether the launcher terminated the ranks before all checks were done.
        link: expected network bandwidth given by the user, bytes per second.
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
