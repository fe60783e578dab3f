"""A cluster in good health, made up, and ways to make it ill."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixmae.trainer.doctor.checks import run_checks
from mixmae.trainer.doctor.cluster import Cluster
from mixmae.trainer.doctor.facts import (
    Clock,
    Gpu,
    HostFacts,
    Interface,
    Network,
    ProbeFacts,
    RankFacts,
    RecipeFacts,
    Reduction,
    RunDirFacts,
    ShardFacts,
    SharedMemory,
)
from mixmae.trainer.doctor.protocol.findings import Finding, Level
from tests.helpers import tiny_recipe

GIB = 1 << 30
VERSIONS = {"python": "3.11.2", "torch": "2.15.0", "timm": "1.0.31", "mixmae's sources": "0123456789ab"}


def gpu(index: int = 0, host: int = 1) -> Gpu:
    return Gpu(
        index, f"{host}-{index}", "A100", 80 * GIB, 79 * GIB, (), 0, False, (), 1410, (16, 16), 250e9, "12 NVLinks"
    )


def host_facts(number: int = 1, rank: int = 0) -> HostFacts:
    return HostFacts(
        rank=rank,
        host=f"node{number}",
        versions=VERSIONS,
        environment={"OMP_NUM_THREADS": "8"},
        memory=512 * GIB,
        memory_available=400 * GIB,
        open_files=65536,
        open_files_limit=65536,
        locked_memory=-1,
        shm=SharedMemory(64 * GIB, 60 * GIB, 0),
        interface=Interface("eth0", f"10.0.0.{number}", 12.5e9),
        fabric=25e9,
        gpus=(gpu(0, number), gpu(1, number)),
        nvml="",
        exporter_port_free=True,
        listens_at=(f"10.0.0.{number}", 40000),
    )


def rank_facts(rank: int) -> RankFacts:
    number, local = 1 + rank // 2, rank % 2
    return RankFacts(rank, local, 4, f"node{number}", f"machine{number}", (1 << 32) - 1, f"{number}-{local}", 2)


def probe_facts(rank: int = 0, neighbour: str = "node2") -> ProbeFacts:
    run_dir = RunDirFacts("/shared/run", "nfs4", 900 * GIB, True, True, "", 64 << 20, 0.1)
    shards = ShardFacts("f" * 64, 1_281_167, "", "", 16, (), 1_600_000, 0.02)
    return ProbeFacts(rank, neighbour, "", run_dir, shards)


def healthy(**changes: Any) -> Cluster:
    """Two hosts with two GPUs each, and a recipe that fits them."""
    cluster = Cluster(
        expected_ranks=4,
        world_size=4,
        ranks=tuple(map(rank_facts, range(4))),
        hosts=(host_facts(1, 0), host_facts(2, 2)),
        recipe=tiny_recipe(run_dir=Path("/shared/run")),
        recipe_facts=RecipeFacts("", 656_000_000, 0),
        clocks=(Clock("node2", 0.0004, 0.0001),),
        probes=(probe_facts(0), probe_facts(2, "node1")),
        network=Network("nccl", (Reduction(1 << 20, 0.0001), Reduction(256 << 20, 0.02))),
    )
    return replace(cluster, **changes)


def with_host(change: Callable[[HostFacts], HostFacts]) -> Cluster:
    """The second host is otherwise."""
    cluster = healthy()
    return replace(cluster, hosts=(cluster.hosts[0], change(cluster.hosts[1])))


def with_gpu(**changes: Any) -> Cluster:
    """The second host's second GPU is otherwise."""
    return with_host(lambda host: replace(host, gpus=(host.gpus[0], replace(host.gpus[1], **changes))))


def with_run_dir(**changes: Any) -> Cluster:
    """The second host sees the run directory otherwise."""
    first, second = healthy().probes
    assert second.run_dir is not None
    return healthy(probes=(first, replace(second, run_dir=replace(second.run_dir, **changes))))


def with_shards(**changes: Any) -> Cluster:
    """The second host sees the shards otherwise."""
    first, second = healthy().probes
    assert second.shards is not None
    return healthy(probes=(first, replace(second, shards=replace(second.shards, **changes))))


def trouble(cluster: Cluster) -> list[Finding]:
    """Warnings and errors."""
    return [finding for finding in run_checks(cluster) if finding.level >= Level.WARNING]
