"""Do all hosts run the same software?"""

from collections.abc import Iterator

from mixmae.trainer.doctor.checks.compare import describe_hosts, most_common, outliers
from mixmae.trainer.doctor.cluster import Cluster
from mixmae.trainer.doctor.protocol.findings import Finding, Level, abbreviate

_MUST_AGREE = ("python", "torch", "deepspeed", "mixmae", "mixmae's sources", "CUDA", "NCCL", "webdataset", "machine")
"""Ranks that differ in these compute or communicate differently."""
_SHOWN = ("python", "torch", "deepspeed", "timm", "mixmae", "mixmae's sources", "CUDA", "NCCL", "NVIDIA driver")


def software(cluster: Cluster) -> Iterator[Finding]:
    """The same versions everywhere."""
    names = sorted({name for host in cluster.hosts for name in host.versions})
    agreed = True
    for name in names:
        values = {host.host: host.versions.get(name, "not installed") for host in cluster.hosts}
        for value, hosts in outliers(values).items():
            agreed = False
            level = Level.ERROR if name in _MUST_AGREE else Level.WARNING
            yield Finding(
                level, "versions", abbreviate(hosts), f"{name} {value}", most_common(values), _how_to_agree(name)
            )
    if agreed and cluster.hosts:
        versions = cluster.hosts[0].versions
        found = ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)
        yield Finding(Level.OK, "versions", describe_hosts(len(cluster.hosts)), found)


def _how_to_agree(name: str) -> str:
    if name == "mixmae's sources":
        return "update the checkout there, or start all hosts from one on a shared file system"
    if name == "NVIDIA driver":
        return "install the same driver, or take other nodes"
    return "install the same version there, or start all hosts from one environment on a shared file system"


def environment(cluster: Cluster) -> Iterator[Finding]:
    """The same variables everywhere, as far as they change what is computed or sent."""
    names = sorted({name for host in cluster.hosts for name in host.environment})
    for name in names:
        values = {host.host: host.environment.get(name, "unset") for host in cluster.hosts}
        for value, hosts in outliers(values).items():
            level = Level.NOTE if name.endswith("_IFNAME") else Level.WARNING
            advice = "set it alike on all hosts, or unset it; '.deepspeed_env' or the site file carries it there"
            yield Finding(level, "environment", abbreviate(hosts), f"{name}={value}", most_common(values), advice)
