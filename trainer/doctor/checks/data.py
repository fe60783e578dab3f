"""Whether all hosts see the same shards and can read them."""

from collections.abc import Iterator

from mixmae.trainer.doctor.checks.compare import describe_hosts, most_common, outliers
from mixmae.trainer.doctor.cluster import Cluster
from mixmae.trainer.doctor.facts import ShardFacts
from mixmae.trainer.doctor.protocol.findings import Finding, Level, abbreviate


def _probed(cluster: Cluster) -> dict[str, ShardFacts]:
    names = {host.rank: host.host for host in cluster.hosts}
    return {names[probe.rank]: probe.shards for probe in cluster.probes if probe.shards is not None}


def same_shards(cluster: Cluster) -> Iterator[Finding]:
    """All hosts see the same index."""
    probed = _probed(cluster)
    for host, facts in probed.items():
        if facts.refused:
            advice = "make the same shards visible on every host, at the same path"
            yield Finding(Level.ERROR, "shards", host, facts.refused, "shards that can be read", advice)
    opened = {host: facts.fingerprint for host, facts in probed.items() if facts.fingerprint}
    if not opened:
        return
    for fingerprint, hosts in outliers(opened).items():
        advice = "copy the shards with their index again, or let all hosts read one copy"
        found = f"other shards: fingerprint {fingerprint[:12]}"
        yield Finding(Level.ERROR, "shards", abbreviate(hosts), found, most_common(opened)[:12], advice)
    if len(set(opened.values())) == 1 and not any(facts.refused for facts in probed.values()):
        images = next(iter(probed.values())).images
        found = f"{images:,} images, fingerprint {most_common(opened)[:12]}"
        yield Finding(Level.OK, "shards", describe_hosts(len(opened)), found)


def readable(cluster: Cluster) -> Iterator[Finding]:
    """The first and last samples of some shards match the index; with the read throughput."""
    probed = _probed(cluster)
    for host, facts in probed.items():
        if facts.unreadable:
            found = (
                f"{len(facts.unreadable)} of {facts.tried} tried samples cannot be read: {abbreviate(facts.unreadable)}"
            )
            advice = "run 'mixmae shards check' there; check its disk, mount or network"
            yield Finding(Level.ERROR, "samples", host, found, "samples as indexed", advice)
        if facts.note:
            yield Finding(Level.NOTE, "samples", host, facts.note)
    good = [facts for facts in probed.values() if facts.seconds and not facts.unreadable]
    if good:
        slowest = min(good, key=lambda facts: facts.read / facts.seconds)
        rate = f"{slowest.read / slowest.seconds / 1e6:,.0f} MB/s, {slowest.tried / slowest.seconds:,.0f} samples/s"
        found = f"{slowest.tried} read, one after the other, on the slowest host at {rate}"
        yield Finding(Level.OK, "samples", describe_hosts(len(good)), found)
