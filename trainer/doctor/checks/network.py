"""Whether hosts reach each other, over which interface, and how fast."""

from collections.abc import Iterator

from mixmae.trainer.doctor.checks.compare import describe_hosts
from mixmae.trainer.doctor.cluster import Cluster
from mixmae.trainer.doctor.facts import HostFacts, Network, Reduction
from mixmae.trainer.doctor.protocol.findings import Finding, Level

_CHOSEN = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_ENOUGH = 0.5
"""Fraction of the link's bandwidth below which an all-reduce is slow."""


def neighbours(cluster: Cluster) -> Iterator[Finding]:
    """Each host reaches a port of the next one."""
    names = {host.rank: host.host for host in cluster.hosts}
    failed = [probe for probe in cluster.probes if probe.unreachable]
    for probe in failed:
        found = f"cannot reach {probe.neighbour}: {probe.unreachable}"
        advice = "open the hosts' firewalls to each other (TCP, all ports above 1023), and check routes"
        yield Finding(Level.ERROR, "ports", names[probe.rank], found, "a connection", advice)
    if len(cluster.probes) > 1 and not failed:
        yield Finding(Level.OK, "ports", describe_hosts(len(cluster.probes)), "each host reaches the next one")


def all_reduce(cluster: Cluster) -> Iterator[Finding]:
    """The measured bus bandwidth, compared with the link's."""
    network = cluster.network
    if network is None:
        return
    where = f"{cluster.world_size} ranks on {describe_hosts(len(cluster.hosts)).removeprefix('all ')}"
    if network.failure:
        advice = f"choose the interface with {network.backend.upper()}_SOCKET_IFNAME"
        advice += ", and run again with NCCL_DEBUG=INFO" if network.backend == "nccl" else "; check host names, ports"
        yield Finding(Level.ERROR, "all-reduce", where, f"{network.backend}: {network.failure}", "a result", advice)
        return
    measured = fastest(cluster)
    if measured is None:
        return
    found = f"{network.backend}{_over(cluster)}: {_speed(measured)} bus bandwidth ({_by_size(cluster, network)})"
    link = expected_link(cluster)
    if link is None and len(cluster.hosts) > 1:
        advice = "give the expected bandwidth to check it against, such as --link 200gbps"
        yield Finding(Level.NOTE, "all-reduce", where, found, advice=advice)
        return
    if link is None:
        yield Finding(Level.OK, "all-reduce", where, found)
        return
    rate, source = link
    expected = f"{_speed(rate)} ({source})"
    if is_slow(cluster):
        yield Finding(Level.WARNING, "all-reduce", where, found, expected, _slow_advice(network))
    else:
        yield Finding(Level.OK, "all-reduce", where, found, expected)


def bus_bandwidth(reduction: Reduction, world_size: int) -> float:
    """Bytes per second through each rank's link (bus bandwidth of nccl-tests), comparable to the link's speed."""
    return reduction.bytes / reduction.seconds * 2 * (world_size - 1) / world_size


def fastest(cluster: Cluster) -> float | None:
    """The highest bus bandwidth over the measured sizes."""
    if cluster.network is None or cluster.world_size < 2:
        return None
    found = [bus_bandwidth(one, cluster.world_size) for one in cluster.network.reductions]
    return max(found, default=None)


def is_slow(cluster: Cluster) -> bool:
    """Whether the all-reduce reached less than half of the link's bandwidth."""
    measured, link = fastest(cluster), expected_link(cluster)
    return measured is not None and link is not None and measured < _ENOUGH * link[0]


def expected_link(cluster: Cluster) -> tuple[float, str] | None:
    """Bandwidth of the slowest link of the ring in bytes per second, and its source; None if unknown."""
    if cluster.link is not None:
        return cluster.link, "--link"
    if len(cluster.hosts) > 1:
        links = [_network_of(host, cluster) for host in cluster.hosts]
    else:
        links = [(gpu.link, gpu.link_kind) if gpu.link else None for host in cluster.hosts for gpu in host.gpus]
    known = [link for link in links if link is not None]
    return min(known) if known and len(known) == len(links) else None


def _network_of(host: HostFacts, cluster: Cluster) -> tuple[float, str] | None:
    if cluster.network is not None and cluster.network.backend == "nccl" and host.fabric is not None:
        return host.fabric, f"InfiniBand or RoCE of {host.host}"
    if host.interface is not None and host.interface.speed is not None:
        return host.interface.speed, f"{host.interface.name} of {host.host}"
    return None


def _over(cluster: Cluster) -> str:
    """The interfaces used, as far as known."""
    if len(cluster.hosts) < 2:
        return ""
    if cluster.network is not None and cluster.network.backend == "nccl" and any(h.fabric for h in cluster.hosts):
        return " over InfiniBand or RoCE"
    chosen = {host.environment.get(name) for host in cluster.hosts for name in _CHOSEN} - {None}
    names = {host.interface.name for host in cluster.hosts if host.interface is not None}
    return f" over {', '.join(sorted(map(str, chosen or names)))}" if chosen or names else ""


def _slow_advice(network: Network) -> str:
    advice = "check that NCCL takes the fast interface (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, NCCL_IB_HCA)"
    if network.backend == "gloo":
        advice = "check that the fast interface is taken (GLOO_SOCKET_IFNAME)"
    if not network.pairs:
        return advice
    by_rate = sorted(network.pairs, key=lambda pair: pair.rate)
    slowest, best = by_rate[0], _speed(by_rate[-1].rate)
    pair = f"slowest pair: {slowest.first} - {slowest.second} with {_speed(slowest.rate)}, best {best}"
    return f"{pair}; {advice}"


def _by_size(cluster: Cluster, network: Network) -> str:
    speeds = [(one.bytes, bus_bandwidth(one, cluster.world_size)) for one in network.reductions]
    return ", ".join(f"{count / 2**20:g} MiB: {_speed(rate)}" for count, rate in speeds)


def _speed(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"
