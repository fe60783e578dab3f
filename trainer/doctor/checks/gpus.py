"""GPUs: visible, of one model, free and healthy."""

from collections.abc import Iterator

from mixmae.monitoring.watch.text import size
from mixmae.trainer.doctor.checks.compare import describe_hosts, most_common, outliers
from mixmae.trainer.doctor.cluster import Cluster
from mixmae.trainer.doctor.facts import Gpu, HostFacts, RankFacts
from mixmae.trainer.doctor.protocol.findings import Finding, Level, abbreviate

_FREE = 0.95
"""Fraction of its memory that must be free on an idle GPU."""


def _all(cluster: Cluster) -> Iterator[tuple[HostFacts, Gpu]]:
    return ((host, gpu) for host in cluster.hosts for gpu in host.gpus)


def _name(host: HostFacts, gpu: Gpu) -> str:
    return f"{host.host} GPU {gpu.index}"


def visible(cluster: Cluster) -> Iterator[Finding]:
    """A GPU for each rank, on all hosts or on none."""
    for host in cluster.hosts:
        ranks = cluster.ranks_of(host)
        least, most = min(rank.gpus for rank in ranks), max(rank.local_rank for rank in ranks)
        if host.gpus and not least:
            advice = "install a torch built for this driver's CUDA, and check CUDA_VISIBLE_DEVICES"
            yield Finding(
                Level.ERROR, "GPUs", host.host, f"{len(host.gpus)}, of which torch sees none", "all of them", advice
            )
        elif least > 1 and most >= least:  # a task that sees one GPU uses that, see `_shared_gpus`
            advice = "start no more ranks on a host than it has GPUs: slots in the hostfile, --gpus-per-node"
            yield Finding(Level.ERROR, "GPUs", host.host, f"{least} for {most + 1} ranks", f"{most + 1}", advice)
    with_gpus = [rank.host for rank in cluster.ranks if rank.gpus]
    without = dict.fromkeys(rank.host for rank in cluster.ranks if not rank.gpus)
    if with_gpus and without:
        advice = "ranks compute on GPUs everywhere or nowhere: take these hosts out, or fix their driver"
        yield Finding(Level.ERROR, "GPUs", abbreviate(list(without)), "none", "GPUs, as on the other hosts", advice)
    if cluster.ranks and not with_gpus and not any(host.gpus for host in cluster.hosts):
        yield Finding(Level.NOTE, "GPUs", describe_hosts(len(cluster.hosts)), "none: ranks compute on the hosts' cores")
    yield from _shared_gpus(cluster)


def _shared_gpus(cluster: Cluster) -> Iterator[Finding]:
    ranks_of: dict[str, list[RankFacts]] = {}
    for rank in cluster.ranks:
        if rank.gpu:
            ranks_of.setdefault(rank.gpu, []).append(rank)
    for gpu, ranks in ranks_of.items():
        if len(ranks) > 1:
            found = f"ranks {abbreviate([str(rank.rank) for rank in ranks])} share {gpu}"
            advice = "give each rank its own GPU; check CUDA_VISIBLE_DEVICES and hosts listed twice"
            yield Finding(Level.ERROR, "GPUs", ranks[0].host, found, "a GPU for each", advice)


def alike(cluster: Cluster) -> Iterator[Finding]:
    """All GPUs have the same model and memory: the slowest one limits the throughput."""
    kinds = {_name(host, gpu): (gpu.name, round(gpu.memory / 2**30)) for host, gpu in _all(cluster)}
    if not kinds:
        return
    name, memory = most_common(kinds)
    for (other, its_memory), where in outliers(kinds).items():
        advice = "take equal nodes (Slurm: --constraint), or plan for the slowest and smallest"
        expected = f"{name}, {memory} GiB"
        yield Finding(Level.WARNING, "GPUs", abbreviate(where), f"{other}, {its_memory} GiB", expected, advice)
    if len(set(kinds.values())) == 1:
        yield Finding(Level.OK, "GPUs", describe_hosts(len(cluster.hosts)), f"{len(kinds)} x {name}, {memory} GiB")


def free_memory(cluster: Cluster) -> Iterator[Finding]:
    """GPU memory is not used by other processes."""
    for host, gpu in _all(cluster):
        if gpu.free is not None and gpu.free < _FREE * gpu.memory:
            users = f" by processes {abbreviate([str(pid) for pid in gpu.used_by])}" if gpu.used_by else ""
            found = f"{size(gpu.memory - gpu.free)} of {size(gpu.memory)} in use{users}"
            advice = "kill processes left by an earlier job (see 'nvidia-smi'), or use another node"
            yield Finding(Level.WARNING, "GPU memory", _name(host, gpu), found, f"{_FREE:.0%} free", advice)


def errors(cluster: Cluster) -> Iterator[Finding]:
    """Memory errors; and hosts where NVML is unavailable."""
    for host, gpu in _all(cluster):
        if gpu.ecc_uncorrected or gpu.pending_repair:
            pending = ", row remapping pending until a reset" if gpu.pending_repair else ""
            found = f"{gpu.ecc_uncorrected or 0} uncorrected memory errors{pending}"
            advice = "drain the node and reset the GPU ('nvidia-smi --gpu-reset'); replace it if they recur"
            yield Finding(Level.ERROR, "GPU errors", _name(host, gpu), found, "none", advice)
    blind = [host.host for host in cluster.hosts if host.nvml and host.gpus]
    if blind:
        reason = next(host.nvml for host in cluster.hosts if host.nvml and host.gpus)
        advice = "pip install 'mixmae[gpu]' there"
        found = f"free memory, errors and throttling not checked: {reason}"
        yield Finding(Level.NOTE, "GPU errors", abbreviate(blind), found, advice=advice)


def speed(cluster: Cluster) -> Iterator[Finding]:
    """Throttled clocks, clock limits below those of other GPUs, and missing PCIe lanes."""
    limits = {_name(host, gpu): gpu.clock_limit_mhz for host, gpu in _all(cluster) if gpu.clock_limit_mhz}
    for host, gpu in _all(cluster):
        where = _name(host, gpu)
        if gpu.throttled:
            advice = "check cooling and power of this node, or use another"
            found = f"clock throttled: {', '.join(gpu.throttled)}"
            yield Finding(Level.WARNING, "GPU speed", where, found, "full clock", advice)
        if gpu.pcie_width is not None and gpu.pcie_width[0] < gpu.pcie_width[1]:
            advice = "reseat the card, or use another node"
            lanes, expected = (f"{width} PCIe lanes" for width in gpu.pcie_width)
            yield Finding(Level.WARNING, "GPU speed", where, lanes, expected, advice)
    for limit, hosts in outliers(limits).items() if limits else ():
        advice = "lift the limit ('nvidia-smi --reset-gpu-clocks'), or take equal nodes"
        expected = f"{most_common(limits)} MHz"
        yield Finding(Level.WARNING, "GPU speed", abbreviate(hosts), f"clock limit {limit} MHz", expected, advice)
