"""The doctor's main rank: collects the facts of all ranks and coordinates the measurements."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from mixmae.base.ports import is_loopback, listening_address
from mixmae.trainer.doctor.checks import gpus, network, presence
from mixmae.trainer.doctor.cluster import Cluster
from mixmae.trainer.doctor.facts import HostFacts, Network, Plan, ProbeFacts, RankFacts, RunDirFacts
from mixmae.trainer.doctor.follower import (
    MEASURING_SECONDS,
    ProbeLimits,
    form_background_group,
    leave_process_group,
    measure,
    measure_pairs,
    probe_host,
    report_facts,
)
from mixmae.trainer.doctor.message_store import ARRIVAL_SECONDS, MessageStore, NoAnswerError
from mixmae.trainer.doctor.probes.network import Listener, interface_with
from mixmae.trainer.doctor.probes.recipe import probe_recipe
from mixmae.trainer.doctor.probes.run_dir import arrived, probe_folder, unusable
from mixmae.trainer.doctor.protocol.findings import Level
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.engine.interfaces import address_towards

_PROBING_SECONDS = 120.0
"""Timeout of a host's probes in seconds."""
_LEAVING_SECONDS = 10.0


class MainRank:
    """The main rank. `cluster` holds all facts collected so far, so that the checks can run at any time."""

    def __init__(self, ranks: Ranks, limits: ProbeLimits, cluster: Cluster) -> None:
        self.cluster = cluster
        self._ranks, self._limits = ranks, limits
        self._measured = "nccl" if ranks.device.type == "cuda" else "gloo"
        """The backend of the collectives that run now."""

    def run(self, on_timeout: Callable[[], None]) -> None:
        """Collects all facts; calls `on_timeout` from another thread if the measurements hang.

        Raises:
            UnreachableError: the message store cannot listen.
        """
        self._messages = MessageStore(self._ranks)
        with ExitStack() as stack:
            listener = stack.enter_context(self._listener())
            report_facts(self._messages, self._ranks, self.cluster.recipe, listener)
            self._collect_facts()
            self._correct_own_address()
            plan, broken = self._plan(stack)
            self._messages.publish("plan", plan, Plan)
            self._ask_clocks()
            self._probe(plan, broken)
        with self._deadline(on_timeout):
            self._measure()

    def end(self) -> None:
        """Lets the other ranks exit and waits for them: the store ends with this process."""
        self._messages.publish("over", True, bool)
        deadline = time.monotonic() + _LEAVING_SECONDS
        for rank in range(1, self.cluster.world_size):
            try:
                self._messages.receive(f"bye/{rank}", bool, deadline - time.monotonic())
            except NoAnswerError:
                return

    def _record(self, **facts: object) -> None:
        self.cluster = replace(self.cluster, **facts)  # type: ignore[arg-type]

    def _listener(self) -> Listener:
        address = address_towards(self._ranks.master_addr)
        bind = listening_address(self._ranks.master_addr) if is_loopback(address) else address
        return Listener(address, bind)

    def _correct_own_address(self) -> None:
        """Where this host's own name resolves to its loopback interface, others reach it by the route to them."""
        own = next((host for host in self.cluster.hosts if host.rank == self._ranks.rank), None)
        others = [host.listens_at[0] for host in self._other_hosts()]
        elsewhere = next((address for address in others if not is_loopback(address)), None)
        if own is None or elsewhere is None or not is_loopback(own.listens_at[0]):
            return
        address = address_towards(elsewhere)
        corrected = replace(own, listens_at=(address, own.listens_at[1]), interface=interface_with(address))
        self._record(hosts=tuple(corrected if host is own else host for host in self.cluster.hosts))

    def _collect_facts(self) -> None:
        deadline = time.monotonic() + ARRIVAL_SECONDS
        for rank in range(self.cluster.world_size):
            try:
                facts = self._messages.receive(f"rank/{rank}", RankFacts, deadline - time.monotonic())
                self._record(ranks=(*self.cluster.ranks, facts))
                if facts.local_rank == 0:
                    host = self._messages.receive(f"host/{rank}", HostFacts, deadline - time.monotonic())
                    self._record(hosts=(*self.cluster.hosts, host))
            except NoAnswerError:  # `presence.ranks` reports it
                continue

    def _plan(self, stack: ExitStack) -> tuple[Plan, RunDirFacts | None]:
        """The plan, and the facts of the run directory if the main rank cannot write to it."""
        hosts = tuple((host.rank, host.host, *host.listens_at) for host in self.cluster.hosts)
        if self.cluster.recipe is None:
            return Plan(hosts, None, ""), None
        run_dir = self.cluster.recipe.run_dir
        try:
            return Plan(hosts, *stack.enter_context(probe_folder(run_dir))), None
        except OSError as error:
            return Plan(hosts, None, ""), unusable(run_dir, error)

    def _other_hosts(self) -> list[HostFacts]:
        return [host for host in self.cluster.hosts if host.rank != self._ranks.rank]

    def _ask_clocks(self) -> None:
        for host in self._other_hosts():
            try:
                clock = self._messages.ask_clock(host.rank, host.host)
                self._record(clocks=(*self.cluster.clocks, clock))
            except NoAnswerError:
                self._record(unresponsive=(*self.cluster.unresponsive, host.rank))

    def _probe(self, plan: Plan, broken: RunDirFacts | None) -> None:
        own = probe_host(self._ranks, self.cluster.recipe, plan, self._limits)
        self._record_probe(replace(own, run_dir=own.run_dir or broken), plan.folder)
        if self.cluster.recipe is not None:
            self._record(recipe_facts=probe_recipe(self.cluster.recipe, self._ranks))
        deadline = time.monotonic() + _PROBING_SECONDS
        for host in self._other_hosts():
            if host.rank in self.cluster.unresponsive:
                continue
            try:
                found = self._messages.receive(f"probe/{host.rank}", ProbeFacts, deadline - time.monotonic())
                self._record_probe(found, plan.folder)
            except NoAnswerError:
                self._record(unresponsive=(*self.cluster.unresponsive, host.rank))

    def _record_probe(self, found: ProbeFacts, folder: Path | None) -> None:
        """Records a host's probes, and whether its file in the run directory is visible to the main rank."""
        if found.run_dir is not None and found.run_dir.saw and folder is not None:
            found = replace(found, run_dir=replace(found.run_dir, seen=arrived(folder, found.rank)))
        self._record(probes=(*self.cluster.probes, found))

    def _measure(self) -> None:
        backend = self._measured
        sizes = self._limits.reduce[backend] if self._can_join() else ()
        self._messages.publish("sizes", sizes, tuple[int, ...])
        if not sizes:
            return
        try:
            found = Network(backend, measure(self._ranks, sizes))
            self._measured = "gloo"
            form_background_group()
            self._measured = backend
            self._record(network=found)
            members = self._ring() if network.is_slow(self.cluster) else ()
            self._messages.publish("ring", members, tuple[int, ...])
            if members and self.cluster.network is not None:
                pairs = measure_pairs(self._ranks, members, self._names())
                self._record(network=replace(self.cluster.network, pairs=pairs))
            leave_process_group(success=True)
        except RuntimeError as error:  # reported as a finding
            self._record(network=Network(self._measured, failure=str(error).splitlines()[0]))

    def _can_join(self) -> bool:
        """Whether all ranks reported, each with its own device; otherwise the process group would hang."""
        checks = (presence.ranks, presence.hosts_once, gpus.visible)
        found = [finding for check in checks for finding in check(replace(self.cluster, expected_ranks=None))]
        return not self.cluster.unresponsive and not any(finding.level is Level.ERROR for finding in found)

    def _ring(self) -> tuple[int, ...]:
        """One rank of each host, or all ranks of a single host."""
        ranks = self.cluster.hosts if len(self.cluster.hosts) > 1 else self.cluster.ranks
        return tuple(one.rank for one in ranks)

    def _names(self) -> Mapping[int, str]:
        alone = len(self.cluster.hosts) == 1
        return {one.rank: f"rank {one.rank}" if alone else one.host for one in self.cluster.ranks}

    @contextmanager
    def _deadline(self, on_timeout: Callable[[], None]) -> Iterator[None]:
        def time_out() -> None:
            self._record(network=Network(self._measured, failure=self._failure()))
            on_timeout()

        timer = threading.Timer(MEASURING_SECONDS, time_out)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _failure(self) -> str:
        """The error that a rank published before the measurements timed out."""
        for rank in range(1, self.cluster.world_size):
            try:
                return f"rank {rank}: {self._messages.receive(f'failure/{rank}', str, 0.0)}"
            except NoAnswerError:
                continue
        return f"no result within {MEASURING_SECONDS:g} s"
