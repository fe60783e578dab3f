"""Clocks, cores, memory and resource limits of each host."""

from collections.abc import Iterator
from functools import reduce
from operator import or_

from mixmae.monitoring.watch.text import size
from mixmae.trainer.doctor.checks.compare import describe_hosts
from mixmae.trainer.doctor.checks.storage import checkpoint_bytes
from mixmae.trainer.doctor.cluster import Cluster
from mixmae.trainer.doctor.facts import HostFacts
from mixmae.trainer.doctor.protocol.findings import Finding, Level, abbreviate

_CLOCK_WARNING, _CLOCK_ERROR = 1.0, 300.0
"""Seconds: above the first, logs and alerts are confusing; above the second, Slurm's authentication and S3 fail."""
_MEMORY_PER_RANK = 3 << 29
"""Bytes of a rank's interpreter, libraries and data workers."""
_OPEN_FILES, _OPEN_FILES_PER_RANK = 256, 8
"""Files that a process opens by itself, and connections to each other rank."""


def clocks(cluster: Cluster) -> Iterator[Finding]:
    """Clock offsets of hosts from the main rank's."""
    off = [clock for clock in cluster.clocks if abs(clock.ahead) - clock.uncertainty > _CLOCK_WARNING]
    for clock in off:
        level = Level.ERROR if abs(clock.ahead) > _CLOCK_ERROR else Level.WARNING
        found = f"{abs(clock.ahead):.1f} s {'ahead of' if clock.ahead > 0 else 'behind'} the main rank's host"
        advice = "enable time synchronisation there ('timedatectl set-ntp true', chrony)"
        yield Finding(level, "clock", clock.host, found, f"within {_CLOCK_WARNING:g} s", advice)
    if cluster.clocks and not off:
        widest = max(abs(clock.ahead) + clock.uncertainty for clock in cluster.clocks)
        where = describe_hosts(len(cluster.clocks) + 1)
        yield Finding(Level.OK, "clock", where, f"within {widest * 1000:.2g} ms of the main rank's host")


def cores(cluster: Cluster) -> Iterator[Finding]:
    """A core for each rank and each of its data workers."""
    if cluster.recipe is None:
        return
    workers = cluster.recipe.data.num_workers
    short = False
    for host in cluster.hosts:
        count, usable = len(cluster.ranks_of(host)), _cores(cluster, host)
        if usable < count * (1 + workers):
            short = True
            level = Level.WARNING if host.gpus else Level.NOTE
            found = f"{usable} cores for {count} ranks with {workers} data workers each"
            advice = "ask for more cores (Slurm: --cpus-per-task), or lower data.num_workers"
            yield Finding(level, "cores", host.host, found, f"{count * (1 + workers)}", advice)
    if not short and cluster.hosts:
        least = min(_cores(cluster, host) for host in cluster.hosts)
        yield Finding(Level.OK, "cores", describe_hosts(len(cluster.hosts)), f"at least {least}")


def _cores(cluster: Cluster, host: HostFacts) -> int:
    """Number of cores in the union of the affinities of a host's ranks."""
    return reduce(or_, (rank.cores for rank in cluster.ranks_of(host)), 0).bit_count()


def memory(cluster: Cluster) -> Iterator[Finding]:
    """Memory for the ranks, and for the staging buffers of asynchronous checkpoints."""
    states = _staging_bytes(cluster)
    low = False
    for host in cluster.hosts:
        count = len(cluster.ranks_of(host))
        needed = count * _MEMORY_PER_RANK + states * count // cluster.world_size
        if host.memory_available < needed:
            low = True
            found = f"{size(host.memory_available)} of {size(host.memory)} available"
            advice = "stop other processes there, request more memory (Slurm: --mem=0), or put fewer ranks on a host"
            yield Finding(Level.WARNING, "memory", host.host, found, f"{size(needed)} for {count} ranks", advice)
    if not low and cluster.hosts:
        least = min(host.memory_available for host in cluster.hosts)
        yield Finding(Level.OK, "memory", describe_hosts(len(cluster.hosts)), f"at least {size(least)} available")


def _staging_bytes(cluster: Cluster) -> int:
    """Bytes of host memory for staging asynchronous checkpoints, of all ranks together."""
    if cluster.recipe is None or not cluster.recipe.checkpoint.asynchronous:
        return 0
    return checkpoint_bytes(cluster) or 0


def open_files(cluster: Cluster) -> Iterator[Finding]:
    """`ulimit -n` suffices for connections to all ranks."""
    needed = _OPEN_FILES + _OPEN_FILES_PER_RANK * cluster.world_size
    low = [host for host in cluster.hosts if host.open_files < needed]
    for host in low:
        advice = f"'ulimit -n {needed}' before the start, or nofile in /etc/security/limits.conf there"
        found = f"{host.open_files} open files per process (hard limit {host.open_files_limit})"
        yield Finding(Level.WARNING, "ulimit -n", host.host, found, f"{needed}", advice)
    if not low and cluster.hosts:
        least = min(host.open_files for host in cluster.hosts)
        yield Finding(Level.OK, "ulimit -n", describe_hosts(len(cluster.hosts)), f"at least {least}")


def locked_memory(cluster: Cluster) -> Iterator[Finding]:
    """`ulimit -l` is unlimited where InfiniBand has to register memory."""
    low = [host.host for host in cluster.hosts if host.fabric is not None and host.locked_memory >= 0]
    if low:
        advice = "'ulimit -l unlimited' for whoever starts ranks there (memlock in limits.conf, LimitMEMLOCK of slurmd)"
        yield Finding(Level.WARNING, "ulimit -l", abbreviate(low), "locked memory is limited", "unlimited", advice)


def shared_memory(cluster: Cluster) -> Iterator[Finding]:
    """/dev/shm is large enough for batches of the data workers, and for NCCL."""
    short = False
    for host in cluster.hosts:
        ahead = 0 if cluster.recipe is None else cluster.recipe.batch_bytes_ahead
        needed = len(cluster.ranks_of(host)) * ahead
        if host.shm is None:
            short = True
            advice = "mount a tmpfs on /dev/shm; data workers and NCCL need it"
            yield Finding(Level.ERROR, "/dev/shm", host.host, "not there", advice=advice)
        elif host.shm.free < needed:
            short = True
            found = f"{size(host.shm.free)} of {size(host.shm.size)} free"
            advice = "enlarge it (mount -o remount,size=..., docker --shm-size), or lower data.prefetch_factor"
            yield Finding(Level.ERROR, "/dev/shm", host.host, found, f"{size(needed)} for batches", advice)
        if host.shm is not None and host.shm.left_over:
            found = f"{size(host.shm.left_over)} left by killed ranks"
            advice = "if no other DeepSpeed job runs there: rm /dev/shm/deepspeed_allreduce_buffer_*"
            yield Finding(Level.NOTE, "/dev/shm", host.host, found, "nothing", advice)
    if not short and cluster.hosts:
        least = min(host.shm.free for host in cluster.hosts if host.shm is not None)
        yield Finding(Level.OK, "/dev/shm", describe_hosts(len(cluster.hosts)), f"at least {size(least)} free")


def exporter_port(cluster: Cluster) -> Iterator[Finding]:
    """Whether each node's port for metrics is free."""
    taken = [host.host for host in cluster.hosts if host.exporter_port_free is False]
    if taken and cluster.recipe is not None:
        found = f"port {cluster.recipe.monitoring.port} is taken"
        advice = "metrics get the next free port, which the run directory names; monitoring.port chooses another"
        yield Finding(Level.NOTE, "metrics port", abbreviate(taken), found, "free", advice)
