from dataclasses import replace

import pytest

from mixmae.base.errors import UsageError
from mixmae.trainer.planning.devices import GPUS, build_cluster, find_gpu
from mixmae.trainer.tasks.flops import PEAKS, known_peak


def test_each_gpu_has_a_peak_and_sane_figures() -> None:
    for name, gpu in GPUS.items():
        assert gpu.peak("bf16") == PEAKS[gpu.product] == known_peak(f"NVIDIA {gpu.product}")
        assert gpu.peak("fp32") < gpu.peak("bf16")
        assert 0.75 * gpu.memory < gpu.usable < gpu.memory, name
        assert gpu.host <= gpu.peers


def test_devices_are_found_by_the_same_parts_of_their_names() -> None:
    """What CUDA calls them leads to the peak that the plan takes."""
    names = {
        "a100-80g": "NVIDIA A100-SXM4-80GB",
        "h100": "NVIDIA H100 80GB HBM3",
        "h100-pcie": "NVIDIA H100 PCIe",
        "h200": "NVIDIA H200",
        "l40s": "NVIDIA L40S",
        "rtx4090": "NVIDIA GeForce RTX 4090",
        "6000ada": "NVIDIA RTX 6000 Ada Generation",
    }
    for name, device in names.items():
        assert known_peak(device) == GPUS[name].peak("bf16")
    for other in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "Teapot"):
        assert known_peak(other) is None


def test_any_other_gpu_is_described_by_its_figures() -> None:
    gpu = find_gpu("rx7900", memory=24, tflops=122, bandwidth=32)
    assert (gpu.name, gpu.memory, gpu.peers) == ("rx7900", 24 * 2**30, 32e9)
    assert gpu.peak("bf16") == gpu.peak("fp32") == 122e12
    assert find_gpu(None, memory=24, tflops=122).usable > 20 * 2**30
    assert find_gpu("h100", memory=96) == replace(GPUS["h100"], memory=96 * 2**30)
    with pytest.raises(UsageError, match=r"rx7900: unknown GPU; .*--gpu-memory and --gpu-tflops describe any other"):
        find_gpu("rx7900", memory=24)
    with pytest.raises(UsageError, match="--gpu is missing; known: rtx3080"):
        find_gpu(None)


def test_unknown_gpus_name_the_nearest_and_all_known() -> None:
    with pytest.raises(UsageError, match=r"a100-80gb: unknown GPU; did you mean 'a100-80g'\? known: rtx3080"):
        find_gpu("a100-80gb")
    with pytest.raises(UsageError, match="--gpu teapot: unknown GPU; known: rtx3080") as error:
        find_gpu("teapot")
    assert "did you mean" not in str(error.value)
    assert find_gpu("H100") == GPUS["h100"]


@pytest.mark.parametrize(
    ("link", "rate"), [("200gbps", 25e9), ("8x400gbps", 400e9), ("100 Gbps", 12.5e9), ("500mbps", 62.5e6)]
)
def test_links_are_bits_and_rates_are_bytes(link: str, rate: float) -> None:
    assert build_cluster("h100", 16, 8, link).link == rate


@pytest.mark.parametrize("link", ["fast", "200", "25GB/s", "x200gbps"])
def test_other_links_are_refused(link: str) -> None:
    with pytest.raises(UsageError, match=f"--link {link}: expected .* such as 200gbps"):
        build_cluster("h100", 16, 8, link)


def test_nodes_are_whole() -> None:
    assert build_cluster("h100", 64, 8, None).nodes == 8
    assert build_cluster("h100", 4, 8, None).nodes == 1
    with pytest.raises(UsageError, match="--gpus 12 is not a whole number of nodes of 8; change it to 8 or 16"):
        build_cluster("h100", 12, 8, None)


def test_part_of_a_cluster() -> None:
    cluster = build_cluster("h100", 64, 8, "200gbps")
    assert (cluster.of(4).nodes, cluster.of(4).gpus_per_node) == (1, 4)
    assert (cluster.of(16).nodes, cluster.of(16).link) == (2, cluster.link)


def test_products_of_one_chip_have_peaks_of_their_own() -> None:
    """Data sheets, dense: NVL cards of Hopper 1,671 TFLOP/s with sparsity; A10G by AWS."""
    assert known_peak("NVIDIA H100 NVL") == known_peak("NVIDIA H200 NVL") == 835e12
    assert known_peak("NVIDIA H100 80GB HBM3") == known_peak("NVIDIA GH200 480GB") == 989e12
    assert (known_peak("NVIDIA A10G"), known_peak("NVIDIA A10"), known_peak("NVIDIA H20")) == (70e12, 125e12, 148e12)
