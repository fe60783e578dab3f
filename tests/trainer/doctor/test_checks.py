"""Checks are held against made-up clusters: a healthy one, and one for each thing that can be wrong."""

from dataclasses import replace

import pytest

from mixmae.trainer.doctor.checks import CHECKS, run_checks
from mixmae.trainer.doctor.checks.network import bus_bandwidth, expected_link
from mixmae.trainer.doctor.cluster import Cluster
from mixmae.trainer.doctor.facts import (
    Clock,
    Interface,
    Network,
    Pair,
    ProbeFacts,
    RecipeFacts,
    Reduction,
    SharedMemory,
)
from mixmae.trainer.doctor.protocol.findings import Level
from tests.helpers import tiny_recipe
from tests.trainer.doctor.made_up import (
    GIB,
    VERSIONS,
    gpu,
    healthy,
    host_facts,
    rank_facts,
    trouble,
    with_gpu,
    with_host,
    with_run_dir,
    with_shards,
)

SLOW = Network("nccl", (Reduction(256 << 20, 0.2),), (Pair("node1", "node2", 2e9), Pair("node2", "node3", 9e9)))
PATIENT = tiny_recipe(**{"data.num_workers": 8, "data.prefetch_factor": 4, "train.micro_batch": 128,
                         "train.global_batch": 512})  # fmt: skip
W, E = Level.WARNING, Level.ERROR


def test_a_healthy_cluster_has_nothing_to_mend() -> None:
    findings = run_checks(healthy())
    assert {finding.level for finding in findings} == {Level.OK}
    assert all(finding.found and finding.where for finding in findings)


FAULTS: dict[str, tuple[Cluster, Level, str, str, str]] = {
    "fewer started": (healthy(expected_ranks=8), E, "ranks", "all 2 hosts", "4 started, expected 8"),
    "absent": (healthy(ranks=tuple(map(rank_facts, (0, 1, 2)))), E, "ranks", "", "1 of 4 did not report: 3"),
    "silent": (healthy(unresponsive=(2,)), E, "host", "node2", "stopped responding"),
    "ended": (healthy(interrupted=True), E, "checks", "main rank", "terminated by the launcher"),
    "refused": (
        healthy(recipe_facts=RecipeFacts("run_dir=x belongs to another recipe", 1, 0)),
        E, "recipe", "main rank", "belongs to another",
    ),
    "torch": (with_host(lambda h: replace(h, versions=VERSIONS | {"torch": "2.14"})), E, "versions", "node2",
              "torch 2.14, expected 2.15.0"),
    "timm": (with_host(lambda h: replace(h, versions=VERSIONS | {"timm": "1.0.9"})), W, "versions", "node2",
             "timm 1.0.9, expected 1.0.31"),
    "missing package": (
        with_host(lambda h: replace(h, versions={k: v for k, v in VERSIONS.items() if k != "torch"})),
        E, "versions", "node2", "torch not installed",
    ),
    "environment": (with_host(lambda h: replace(h, environment={"OMP_NUM_THREADS": "1"})), W, "environment", "node2",
                    "OMP_NUM_THREADS=1, expected 8"),
    "clock": (healthy(clocks=(Clock("node2", -42.0, 0.1),)), W, "clock", "node2", "42.0 s behind"),
    "far clock": (healthy(clocks=(Clock("node2", 3600.0, 0.1),)), E, "clock", "node2", "3600.0 s ahead of"),
    "cores": (healthy(ranks=tuple(replace(rank_facts(r), cores=1) for r in range(4)), recipe=PATIENT), W, "cores",
              "node1", "1 cores for 2 ranks with 8 data workers each, expected 18"),
    "memory": (with_host(lambda h: replace(h, memory_available=4 * GIB)), W, "memory", "node2", "4.0 GiB of 512.0 GiB"),
    "open files": (with_host(lambda h: replace(h, open_files=256)), W, "ulimit -n", "node2", "256 open files"),
    "locked memory": (with_host(lambda h: replace(h, locked_memory=65536)), W, "ulimit -l", "node2", "is limited"),
    "no shm": (with_host(lambda h: replace(h, shm=None)), E, "/dev/shm", "node2", "not there"),
    "small shm": (
        replace(with_host(lambda h: replace(h, shm=SharedMemory(64 << 20, 60 << 20, 0))), recipe=PATIENT),
        E, "/dev/shm", "node2", "60 MiB of 64 MiB free, expected 96 MiB",
    ),
    "no torch GPUs": (healthy(ranks=tuple(replace(rank_facts(r), gpus=0, gpu="") for r in range(4))), E, "GPUs",
                      "node1", "2, of which torch sees none"),
    "too many ranks": (healthy(ranks=tuple(replace(rank_facts(r), local_rank=r) for r in range(4))), E, "GPUs",
                       "node2", "2 for 4 ranks"),
    "too many ranks of one GPU": (healthy(ranks=tuple(replace(rank_facts(r), gpus=1, gpu=f"{1 + r // 2}-{r // 2 * r}")
                                                      for r in range(4))), E, "GPUs", "node1", "ranks 0, 1 share 1-0"),
    "shared GPU": (healthy(ranks=(*map(rank_facts, (0, 1, 2)), replace(rank_facts(3), gpu="2-0"))), E, "GPUs", "node2",
                   "ranks 2, 3 share 2-0"),
    "other GPU": (with_gpu(name="V100"), W, "GPUs", "node2 GPU 1", "V100, 80 GiB, expected A100, 80 GiB"),
    "used GPU": (with_gpu(free=40 * GIB, used_by=(4711,)), W, "GPU memory", "node2 GPU 1", "by processes 4711"),
    "ECC": (with_gpu(ecc_uncorrected=3), E, "GPU errors", "node2 GPU 1", "3 uncorrected memory errors"),
    "repair": (with_gpu(pending_repair=True), E, "GPU errors", "node2 GPU 1", "row remapping pending"),
    "hot": (with_gpu(throttled=("power brake",)), W, "GPU speed", "node2 GPU 1", "throttled: power brake"),
    "lanes": (with_gpu(pcie_width=(8, 16)), W, "GPU speed", "node2 GPU 1", "8 PCIe lanes, expected 16"),
    "clock limit": (with_gpu(clock_limit_mhz=1000), W, "GPU speed", "node2 GPU 1", "limit 1000 MHz, expected 1410"),
    "not shared": (with_run_dir(saw=False), E, "run directory", "node2", "does not show the main rank's files"),
    "one way": (with_run_dir(seen=False), E, "run directory", "node2", "is not visible to the main rank"),
    "in memory": (with_run_dir(filesystem="tmpfs"), W, "run directory", "node1", "in memory"),
    "disk": (with_run_dir(free=30 * GIB), E, "disk space", "node2", "30.0 GiB free, expected 30.8 GiB for 4"),
    "cannot write": (with_run_dir(problem="Disk quota exceeded", seconds=0.0), E, "writing", "node2", "quota exceeded"),
    "slow disk": (with_run_dir(seconds=60.0), W, "writing", "all 2 hosts", "2 MB/s together, 1 h 2 min"),
    "no shards": (with_shards(refused="shard directory x does not exist", fingerprint=""), E, "shards", "node2",
                  "does not exist"),
    "other shards": (with_shards(fingerprint="a" * 64), E, "shards", "node2", "fingerprint aaaaaaaaaaaa"),
    "unreadable": (with_shards(unreadable=("0001.tar: 7.jpg (Input/output error)",)), E, "samples", "node2",
                   "1 of 16 tried samples cannot be read: 0001.tar"),
    "firewall": (healthy(probes=(ProbeFacts(0, "node2", "10.0.0.2 port 40000: timed out", None, None),)), E, "ports",
                 "node1", "cannot reach node2: 10.0.0.2 port 40000: timed out"),
    "no sum": (healthy(network=Network("nccl", failure="unhandled system error")), E, "all-reduce", "4 ranks",
               "nccl: unhandled system error"),
    "slow network": (healthy(network=SLOW), W, "all-reduce", "4 ranks on 2 hosts", "2.01 GB/s bus bandwidth"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_named_and_comes_with_what_to_do(fault: str) -> None:
    cluster, level, check, where, words = FAULTS[fault]
    found = trouble(cluster)
    match = [f for f in found if f.check == check and f.level is level and words in f.describe() and where in f.where]
    assert match, [f.describe() for f in found]
    assert match[0].advice


def test_one_fault_is_one_finding() -> None:
    several = {"no torch GPUs", "too many ranks", "cores", "refused"}  # on both hosts; also no batch's arithmetic
    for fault, (cluster, *_) in FAULTS.items():
        if fault not in several:
            assert len(trouble(cluster)) == 1, (fault, [f.describe() for f in trouble(cluster)])


def test_every_check_has_a_cluster_that_fails_it() -> None:
    for check in CHECKS:
        failing = [name for name, (cluster, *_) in FAULTS.items() if any(f.level >= W for f in check(cluster))]
        quiet = {"exporter_port", "hosts_once"}  # a note; and below
        assert failing or check.__name__ in quiet, check


def test_a_host_that_is_named_twice() -> None:
    ranks = tuple(replace(rank_facts(rank), host="node1", machine="machine1", gpu="") for rank in range(4))
    found = trouble(healthy(ranks=ranks, hosts=(host_facts(1, 0), host_facts(1, 2))))
    assert ("host twice", "node1", E) in {(f.check, f.where, f.level) for f in found}


def test_two_machines_with_one_name() -> None:
    ranks = tuple(replace(rank_facts(rank), host="localhost") for rank in range(4))
    assert [f.check for f in trouble(healthy(ranks=ranks))] == ["host names"]


def test_ranks_without_gpus_are_only_a_note() -> None:
    hosts = tuple(replace(host, gpus=(), nvml="NVML does not start") for host in healthy().hosts)
    ranks = tuple(replace(rank_facts(rank), gpus=0, gpu="") for rank in range(4))
    cluster = healthy(hosts=hosts, ranks=ranks, network=None)
    assert not trouble(cluster)
    assert "none: ranks compute on the hosts' cores" in [f.found for f in run_checks(cluster)]


def test_tasks_may_see_one_gpu_each() -> None:
    assert not trouble(healthy(ranks=tuple(replace(rank_facts(rank), gpus=1) for rank in range(4))))


def test_gpus_that_nvml_does_not_show_are_named() -> None:
    cluster = with_host(lambda host: replace(host, nvml="the package nvidia-ml-py is missing"))
    notes = [f for f in run_checks(cluster) if f.level is Level.NOTE]
    assert [(f.where, f.advice) for f in notes] == [("node2", "pip install 'mixmae[gpu]' there")]


def test_gpus_on_some_hosts_only() -> None:
    ranks = (rank_facts(0), rank_facts(1), *(replace(rank_facts(rank), gpus=0, gpu="") for rank in (2, 3)))
    cluster = replace(with_host(lambda host: replace(host, gpus=())), ranks=ranks)
    assert ("GPUs", "node2", "none") in {(f.check, f.where, f.found) for f in trouble(cluster)}


def test_left_over_shared_memory_and_a_taken_port_are_notes() -> None:
    cluster = with_host(lambda h: replace(h, exporter_port_free=False, shm=SharedMemory(GIB, GIB, 69 << 20)))
    notes = {(f.check, f.where): f.found for f in run_checks(cluster) if f.level is Level.NOTE}
    assert notes == {("/dev/shm", "node2"): "69 MiB left by killed ranks",
                     ("metrics port", "node2"): "port 9400 is taken"}  # fmt: skip


def test_kept_checkpoints_need_no_second_room() -> None:
    tight = replace(with_run_dir(free=20 * GIB), recipe_facts=RecipeFacts("", 656_000_000, 2))
    assert not trouble(tight)
    assert trouble(replace(tight, recipe_facts=RecipeFacts("", 656_000_000, 1)))


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    # docs/PERFORMANCE.md of nccl-tests: busbw = algbw * 2 (n - 1) / n, and algbw = size / time
    assert bus_bandwidth(Reduction(10**9, 0.5), 8) == pytest.approx(2e9 * 1.75)
    assert bus_bandwidth(Reduction(10**9, 0.5), 2) == pytest.approx(2e9)


def test_the_slowest_link_is_what_is_expected() -> None:
    assert expected_link(healthy()) == (25e9, "InfiniBand or RoCE of node1")
    assert expected_link(healthy(link=1e9)) == (1e9, "--link")
    slower = with_host(lambda host: replace(host, fabric=12.5e9))
    assert expected_link(slower) == (12.5e9, "InfiniBand or RoCE of node2")


def test_gloo_takes_the_interface_and_not_the_fabric() -> None:
    cluster = healthy(network=Network("gloo", (Reduction(1 << 20, 0.001),)))
    assert expected_link(cluster) == (12.5e9, "eth0 of node1")


def test_an_unknown_link_is_not_judged_but_told() -> None:
    cluster = with_host(lambda host: replace(host, fabric=None, interface=Interface("veth0", "10.0.0.2", None)))
    assert expected_link(cluster) is None
    cluster = replace(cluster, network=SLOW)
    assert [(f.check, f.level) for f in run_checks(cluster) if f.level > Level.OK] == [("all-reduce", Level.NOTE)]


def test_on_one_host_the_gpus_links_count() -> None:
    alone = healthy(
        world_size=2,
        expected_ranks=2,
        ranks=tuple(map(rank_facts, range(2))),
        hosts=(host_facts(1, 0),),
        clocks=(),
        probes=(),
    )
    assert expected_link(alone) == (250e9, "12 NVLinks")
    pcie = replace(gpu(1), link=31.5e9, link_kind="PCIe 4 x16")
    assert expected_link(replace(alone, hosts=(replace(host_facts(), gpus=(gpu(0), pcie)),))) == (31.5e9, "PCIe 4 x16")


def test_a_slow_network_names_the_slowest_pair() -> None:
    (finding,) = trouble(healthy(network=SLOW))
    assert finding.expected == "25 GB/s (InfiniBand or RoCE of node1)"
    assert finding.advice.startswith("slowest pair: node1 - node2 with 2 GB/s, best 9 GB/s")


def test_hosts_alone_can_be_looked_at_without_a_recipe() -> None:
    cluster = healthy(
        recipe=None, recipe_facts=None,
        probes=tuple(replace(probe, run_dir=None, shards=None) for probe in healthy().probes),
    )  # fmt: skip
    assert not trouble(cluster)
    assert {"recipe", "run directory", "shards"}.isdisjoint(finding.check for finding in run_checks(cluster))


def test_nobody_came() -> None:
    cluster = Cluster(4, 4, (), ())
    assert [finding.check for finding in trouble(cluster)] == ["ranks"]
