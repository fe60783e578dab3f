"""The main rank's side: it waits for the others, asks, and keeps what is known so far."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from mixmae.trainer.doctor.checks import gpus, network, presence
from mixmae.trainer.doctor.cluster import Cluster
from mixmae.trainer.doctor.facts import HostFacts, Network, Plan, ProbeFacts, RankFacts, RunDirFacts
from mixmae.trainer.doctor.gather.network import Listener, address_towards
from mixmae.trainer.doctor.gather.recipe import look_at_recipe
from mixmae.trainer.doctor.gather.run_dir import arrived, probe_folder, unusable
from mixmae.trainer.doctor.meeting import ARRIVAL, AbsentError, Meeting
from mixmae.trainer.doctor.protocol.findings import Level
from mixmae.trainer.doctor.rank_job import MEASURING, Effort, arrive, look, measure, measure_pairs, part
from mixmae.trainer.engine.distributed import Ranks

_PROBING = 120.0
"""Seconds in which a host has to read and write its probes."""
_PARTING = 10.0


class Lead:
    """The main rank. `cluster` grows with what is learnt, so that it can be judged whenever all has to end."""

    def __init__(self, ranks: Ranks, effort: Effort, cluster: Cluster) -> None:
        self.cluster = cluster
        self._ranks, self._effort = ranks, effort

    def run(self, late: Callable[[], None]) -> None:
        """Asks everybody everything; calls `late` from another thread if the network never answers.

        Raises:
            MeetingError: nobody could come here.
        """
        self._meeting = Meeting(self._ranks)
        with ExitStack() as stack:
            listener = stack.enter_context(Listener(address_towards(self._ranks.master_addr)))
            arrive(self._meeting, self._ranks, self.cluster.recipe, listener)
            self._wait_for_all()
            plan, broken = self._plan(stack)
            self._meeting.tell("plan", plan, Plan)
            self._ask_clocks()
            self._probe(plan, broken)
        with self._deadline(late):
            self._measure()

    def end(self) -> None:
        """Lets the others go, and waits for them: the store ends with this process."""
        self._meeting.tell("over", True, bool)
        deadline = time.monotonic() + _PARTING
        for rank in range(1, self.cluster.world_size):
            try:
                self._meeting.hear(f"bye/{rank}", bool, deadline - time.monotonic())
            except AbsentError:
                return

    def _learn(self, **facts: object) -> None:
        self.cluster = replace(self.cluster, **facts)  # type: ignore[arg-type]

    def _wait_for_all(self) -> None:
        deadline = time.monotonic() + ARRIVAL
        for rank in range(self.cluster.world_size):
            try:
                facts = self._meeting.hear(f"rank/{rank}", RankFacts, deadline - time.monotonic())
                self._learn(ranks=(*self.cluster.ranks, facts))
                if facts.local_rank == 0:
                    host = self._meeting.hear(f"host/{rank}", HostFacts, deadline - time.monotonic())
                    self._learn(hosts=(*self.cluster.hosts, host))
            except AbsentError:  # a check names the rank
                continue

    def _plan(self, stack: ExitStack) -> tuple[Plan, RunDirFacts | None]:
        """What to look at; and what is wrong with the run directory if the main rank cannot even write there."""
        hosts = tuple((host.rank, host.host, *host.listens_at) for host in self.cluster.hosts)
        if self.cluster.recipe is None:
            return Plan(hosts, None, ""), None
        run_dir = self.cluster.recipe.run_dir
        try:
            return Plan(hosts, *stack.enter_context(probe_folder(run_dir))), None
        except OSError as error:
            return Plan(hosts, None, ""), unusable(run_dir, error)

    def _others(self) -> list[HostFacts]:
        return [host for host in self.cluster.hosts if host.rank != self._ranks.rank]

    def _ask_clocks(self) -> None:
        for host in self._others():
            try:
                clock = self._meeting.ask_clock(host.rank, host.host)
                self._learn(clocks=(*self.cluster.clocks, clock))
            except AbsentError:
                self._learn(lost=(*self.cluster.lost, host.rank))

    def _probe(self, plan: Plan, broken: RunDirFacts | None) -> None:
        own = look(self._ranks, self.cluster.recipe, plan, self._effort)
        self._keep(replace(own, run_dir=own.run_dir or broken), plan.folder)
        if self.cluster.recipe is not None:
            self._learn(recipe_facts=look_at_recipe(self.cluster.recipe, self._ranks))
        deadline = time.monotonic() + _PROBING
        for host in self._others():
            if host.rank in self.cluster.lost:
                continue
            try:
                found = self._meeting.hear(f"probe/{host.rank}", ProbeFacts, deadline - time.monotonic())
                self._keep(found, plan.folder)
            except AbsentError:
                self._learn(lost=(*self.cluster.lost, host.rank))

    def _keep(self, found: ProbeFacts, folder: Path | None) -> None:
        """Remembers what a host found, and whether what it wrote is seen here."""
        if found.run_dir is not None and found.run_dir.saw and folder is not None:
            found = replace(found, run_dir=replace(found.run_dir, seen=arrived(folder, found.rank)))
        self._learn(probes=(*self.cluster.probes, found))

    def _measure(self) -> None:
        backend = "nccl" if self._ranks.device.type == "cuda" else "gloo"
        sizes = self._effort.reduce[backend] if self._can_join() else ()
        self._meeting.tell("sizes", sizes, tuple[int, ...])
        if not sizes:
            return
        try:
            self._learn(network=Network(backend, measure(self._ranks, sizes)))
            members = self._ring() if network.is_slow(self.cluster) else ()
            self._meeting.tell("ring", members, tuple[int, ...])
            if members and self.cluster.network is not None:
                pairs = measure_pairs(self._ranks, members, self._names())
                self._learn(network=replace(self.cluster.network, pairs=pairs))
            part(success=True)
        except RuntimeError as error:  # a finding, not the end
            self._learn(network=Network(backend, failure=str(error).splitlines()[0]))

    def _can_join(self) -> bool:
        """Whether all ranks are there, each with a device of its own; without that a process group never forms."""
        checks = (presence.ranks, presence.hosts_once, gpus.visible)
        found = [finding for check in checks for finding in check(replace(self.cluster, asked=None))]
        return not self.cluster.lost and not any(finding.level is Level.ERROR for finding in found)

    def _ring(self) -> tuple[int, ...]:
        """One rank of each host, or all ranks of a host that is alone."""
        ranks = self.cluster.hosts if len(self.cluster.hosts) > 1 else self.cluster.ranks
        return tuple(one.rank for one in ranks)

    def _names(self) -> Mapping[int, str]:
        alone = len(self.cluster.hosts) == 1
        return {one.rank: f"rank {one.rank}" if alone else one.host for one in self.cluster.ranks}

    @contextmanager
    def _deadline(self, late: Callable[[], None]) -> Iterator[None]:
        def give_up() -> None:
            backend = "nccl" if self._ranks.device.type == "cuda" else "gloo"
            self._learn(network=Network(backend, failure=self._why_not()))
            late()

        timer = threading.Timer(MEASURING, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _why_not(self) -> str:
        """What ranks said of a measurement that never ended."""
        for rank in range(1, self.cluster.world_size):
            try:
                return f"rank {rank}: {self._meeting.hear(f'failure/{rank}', str, 0.0)}"
            except AbsentError:
                continue
        return f"nothing came back for {MEASURING:g} s"
