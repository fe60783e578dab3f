"""The checks: each is a pure function from a cluster's facts to findings.

To add a check, write a function here and append it to `CHECKS`, which also sets the order of the report.
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
    network.neighbours,
    network.all_reduce,
)


def run_checks(cluster: Cluster) -> list[Finding]:
    """The findings of all checks, in order."""
    return [finding for check in CHECKS for finding in check(cluster)]
