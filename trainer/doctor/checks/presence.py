"""Whether all ranks are present, and whether the recipe fits them."""

from collections import Counter
from collections.abc import Iterator

from mixmae.trainer.doctor.checks.compare import describe_hosts
from mixmae.trainer.doctor.cluster import Cluster
from mixmae.trainer.doctor.protocol.findings import Finding, Level, abbreviate


def ranks(cluster: Cluster) -> Iterator[Finding]:
    """All requested ranks were started and reported."""
    expected_ranks = cluster.expected_ranks or cluster.world_size
    where = describe_hosts(len(cluster.hosts))
    if cluster.world_size != expected_ranks:
        advice = "correct the hostfile, --nodes or --gpus-per-node; a run never starts at another world size"
        yield Finding(Level.ERROR, "ranks", where, f"{cluster.world_size} started", f"{expected_ranks}", advice)
    here = {rank.rank for rank in cluster.ranks}
    absent = [str(rank) for rank in range(cluster.world_size) if rank not in here]
    if absent:
        found = f"{len(absent)} of {cluster.world_size} did not report: {abbreviate(absent)}"
        advice = "check these ranks' output, and whether their hosts reach the main rank's address"
        yield Finding(Level.ERROR, "ranks", where, found, f"{cluster.world_size} ranks", advice)
    elif cluster.world_size == expected_ranks:
        yield Finding(Level.OK, "ranks", where, f"{expected_ranks} arrived: {_by_host(cluster)}")


def _by_host(cluster: Cluster) -> str:
    counts = Counter(rank.host for rank in cluster.ranks)
    return abbreviate([f"{count} on {host}" for host, count in counts.items()])


def hosts_once(cluster: Cluster) -> Iterator[Finding]:
    """No local rank is started twice on a machine, and no host name is shared by two machines."""
    places = Counter((rank.machine, rank.local_rank) for rank in cluster.ranks)
    names = {rank.machine: rank.host for rank in cluster.ranks}
    for machine in dict.fromkeys(machine for (machine, _), count in places.items() if count > 1):
        advice = "the hostfile lists it under two names or addresses: remove one"
        yield Finding(Level.ERROR, "host twice", names[machine], "local ranks started twice", "once", advice)
    for name, count in Counter(names.values()).items():
        if count > 1:
            advice = "give each host a unique name: logs and metrics are labelled by it"
            yield Finding(Level.WARNING, "host names", name, f"{count} machines have this name", "one", advice)


def answers(cluster: Cluster) -> Iterator[Finding]:
    """Hosts that reported and then stopped responding."""
    for host in cluster.hosts:
        if host.rank in cluster.unresponsive:
            advice = "check its file systems ('df', 'dmesg'): reads of a hung mount block"
            yield Finding(Level.ERROR, "host", host.host, "stopped responding during the checks", "a response", advice)


def interrupted(cluster: Cluster) -> Iterator[Finding]:
    """Whether the launcher terminated the checks."""
    if cluster.interrupted:
        advice = "another rank failed: the launcher's output says which, and why"
        yield Finding(Level.ERROR, "checks", "main rank", "terminated by the launcher", "completed checks", advice)


def recipe(cluster: Cluster) -> Iterator[Finding]:
    """Errors with which training would refuse the recipe, and the batch arithmetic."""
    if cluster.recipe is None or cluster.recipe_facts is None:
        return
    if cluster.recipe_facts.refused:
        yield Finding(
            Level.ERROR,
            "recipe",
            "main rank",
            cluster.recipe_facts.refused,
            advice="fix this before training",
        )
        return
    train, facts = cluster.recipe.train, cluster.recipe_facts
    steps = cluster.recipe.accumulation(cluster.world_size)
    batch = f"{train.global_batch} images = {train.micro_batch} x {cluster.world_size} ranks x {steps} micro-steps"
    size = f"{(facts.parameters or 0) / 1e6:.1f} M parameters"
    found = f"{batch}, {size}, {facts.checkpoints or 'no'} checkpoint{'s'[: facts.checkpoints != 1]} so far"
    yield Finding(Level.OK, "recipe", "main rank", found)
