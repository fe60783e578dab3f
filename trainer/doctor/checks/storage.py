"""Whether all hosts share the run directory, and whether checkpoints fit."""

from collections.abc import Iterator

from mixmae.monitoring.watch.text import duration, size
from mixmae.trainer.doctor.checks.compare import describe_hosts
from mixmae.trainer.doctor.cluster import Cluster
from mixmae.trainer.doctor.facts import RunDirFacts
from mixmae.trainer.doctor.protocol.findings import Finding, Level

_BYTES_PER_PARAMETER = 12
"""fp32 master weight and two AdamW moments."""
_MARGIN = 1.05
_SLOW = 300.0
"""Seconds per checkpoint above which a warning is given."""
_IN_MEMORY = ("tmpfs", "ramfs")


def checkpoint_bytes(cluster: Cluster) -> int | None:
    """Upper estimate of a checkpoint's size; None without a model."""
    if cluster.recipe_facts is None or cluster.recipe_facts.parameters is None:
        return None
    return int(cluster.recipe_facts.parameters * _BYTES_PER_PARAMETER * _MARGIN)


def _probed(cluster: Cluster) -> list[tuple[str, RunDirFacts]]:
    """Host names with their view of the run directory; the main rank's first."""
    names = {host.rank: host.host for host in cluster.hosts}
    return [(names[probe.rank], probe.run_dir) for probe in cluster.probes if probe.run_dir is not None]


def shared(cluster: Cluster) -> Iterator[Finding]:
    """Files that one host writes are visible to the others."""
    probed = _probed(cluster)
    if cluster.recipe is None or not probed:
        return
    run_dir, apart = cluster.recipe.run_dir, False
    for host, facts in probed:
        if facts.saw and (facts.seen or facts.problem):
            continue
        apart = True
        seen = "does not show the main rank's files" if not facts.saw else "is not visible to the main rank"
        found = f"{facts.resolved} ({facts.filesystem}) {seen}"
        advice = f"put run_dir={run_dir} on a file system that all hosts mount at the same path"
        yield Finding(Level.ERROR, "run directory", host, found, "one directory on all hosts", advice)
    if not apart:
        _, main = probed[0]
        found = f"{main.resolved} ({main.filesystem}) is one directory"
        yield Finding(Level.OK, "run directory", describe_hosts(len(probed)), found)
    if any(facts.filesystem in _IN_MEMORY for _, facts in probed):
        advice = "files there are lost when the host restarts; set run_dir to a path on disk"
        yield Finding(Level.WARNING, "run directory", probed[0][0], f"{run_dir} is in memory", "a disk", advice)


def space(cluster: Cluster) -> Iterator[Finding]:
    """Free space for all checkpoints that are kept, plus the one being written."""
    one = checkpoint_bytes(cluster)
    probed = _probed(cluster)
    if cluster.recipe is None or cluster.recipe_facts is None or one is None or not probed:
        return
    settings, there = cluster.recipe.checkpoint, cluster.recipe_facts.checkpoints
    kept = settings.keep + settings.keep_best + 1
    needed = max(1, kept - there) * one
    host, facts = min(probed, key=lambda entry: entry[1].free)
    expected = f"{size(needed)} for {max(1, kept - there)} checkpoints of {size(one)}"
    if facts.free < needed:
        advice = "free space, set another run_dir, or lower checkpoint.keep"
        yield Finding(Level.ERROR, "disk space", host, f"{size(facts.free)} free", expected, advice)
    else:
        yield Finding(Level.OK, "disk space", host, f"{size(facts.free)} free", expected)


def writing(cluster: Cluster) -> Iterator[Finding]:
    """Whether hosts can write, and the time for a checkpoint at their aggregate throughput."""
    probed = _probed(cluster)
    for host, facts in probed:
        if facts.problem:
            advice = "free space, raise the quota, or fix the directory's permissions"
            yield Finding(Level.ERROR, "writing", host, f"{facts.resolved}: {facts.problem}", "a writable path", advice)
    timed = [facts for _, facts in probed if facts.seconds]
    if not timed:
        return
    rate = sum(facts.wrote for facts in timed) / max(facts.seconds for facts in timed)
    where, found = describe_hosts(len(timed)), f"{rate / 1e6:,.0f} MB/s together"
    one = checkpoint_bytes(cluster)
    if one is None:
        yield Finding(Level.OK, "writing", where, found)
    elif one / rate > _SLOW:
        advice = "use a faster file system for run_dir, or save less often (checkpoint.every)"
        found += f", {duration(one / rate)} for a checkpoint of {size(one)}"
        yield Finding(Level.WARNING, "writing", where, found, f"less than {duration(_SLOW)}", advice)
    else:
        yield Finding(Level.OK, "writing", where, f"{found}, {duration(one / rate)} for a checkpoint of {size(one)}")
