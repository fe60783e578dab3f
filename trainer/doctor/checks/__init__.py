"""The checks: each is a function from a cluster's known facts to findings, and probes nothing itself.

A new check is one more function here; `CHECKS` below has all of them, in the order in which they are shown.
"""

from collections.abc import Callable, Iterator

from mixmae.trainer.doctor.checks import data, gpus, hosts, network, presence, storage, versions
from mixmae.trainer.doctor.cluster import Cluster
from mixmae.trainer.doctor.protocol.findings import Finding

CHECKS: tuple[Callable[[Cluster], Iterator[Finding]], ...] = (
    presence.ranks,
    presence.hosts_once,
    presence.answers,
    presence.interrupted,
    presence.recipe,
    versions.software,
    versions.environment,
    hosts.clocks,
    hosts.cores,
    hosts.memory,
    hosts.open_files,
    hosts.locked_memory,
    hosts.shared_memory,
    hosts.exporter_port,
    gpus.visible,
    gpus.alike,
    gpus.free_memory,
    gpus.errors,
    gpus.speed,
    storage.shared,
    storage.space,
    storage.writing,
    data.same_shards,
    data.readable,
    network.own_names,
    network.neighbours,
    network.all_reduce,
)


def run_checks(cluster: Cluster) -> list[Finding]:
    """The findings of all checks."""
    return [finding for check in CHECKS for finding in check(cluster)]
