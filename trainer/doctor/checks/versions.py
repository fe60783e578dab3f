"""Whether all hosts run the same software."""

from collections.abc import Iterator

from mixmae.trainer.doctor.checks.compare import describe_hosts, most_common, outliers
from mixmae.trainer.doctor.cluster import Cluster
from mixmae.trainer.doctor.protocol.findings import Finding, Level, abbreviate

_MUST_AGREE = ("python", "torch", "deepspeed", "mixmae", "mixmae's sources", "CUDA", "NCCL", "webdataset", "machine")
"""A difference in these changes computation or communication."""
_SHOWN = ("python", "torch", "deepspeed", "timm", "mixmae", "mixmae's sources", "CUDA", "NCCL", "NVIDIA driver")


def software(cluster: Cluster) -> Iterator[Finding]:
    """All hosts have the same versions."""
    names = sorted({name for host in cluster.hosts for name in host.versions})
    agreed = True
    for name in names:
        values = {host.host: host.versions.get(name, "not installed") for host in cluster.hosts}
        for value, hosts in outliers(values).items():
            agreed = False
            level = Level.ERROR if name in _MUST_AGREE else Level.WARNING
            yield Finding(level, "versions", abbreviate(hosts), f"{name} {value}", most_common(values), _advice(name))
    if agreed and cluster.hosts:
        versions = cluster.hosts[0].versions
        found = ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)
        yield Finding(Level.OK, "versions", describe_hosts(len(cluster.hosts)), found)


def _advice(name: str) -> str:
    if name == "mixmae's sources":
        return "update the checkout there, or start all hosts from one on a shared file system"
    if name == "NVIDIA driver":
        return "install the same driver, or take other nodes"
    return "install the same version there, or start all hosts from one environment on a shared file system"


def environment(cluster: Cluster) -> Iterator[Finding]:
    """All hosts have the same values of variables that affect computation or communication."""
    names = sorted({name for host in cluster.hosts for name in host.environment})
    for name in names:
        values = {host.host: host.environment.get(name, "unset") for host in cluster.hosts}
        for value, hosts in outliers(values).items():
            level = Level.NOTE if name.endswith("_IFNAME") else Level.WARNING
            advice = "set it to the same value on all hosts, or unset it; '.deepspeed_env' or the site file exports it"
            yield Finding(level, "environment", abbreviate(hosts), f"{name}={value}", most_common(values), advice)
