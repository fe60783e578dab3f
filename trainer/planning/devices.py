"""Known GPUs, and clusters of them."""

import difflib
import re
from dataclasses import dataclass, replace

from mixmae.base.errors import UsageError
from mixmae.trainer.tasks.flops import PEAKS

_GIB = 2**30
_CONTEXT = 1.5 * _GIB
"""Memory of each GPU outside torch's allocator: CUDA context, NCCL's buffers, cuBLAS's workspace."""
_FRAGMENTED = 0.05
"""Fraction of a GPU's memory lost to fragmentation in the allocator."""
_LINK = re.compile(r"(?:(\d+)x)?(\d+(?:\.\d+)?)\s*(g|m)bps", re.IGNORECASE)


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    Args:
        name: its name for `--gpu`.
        product: the part of the device's name by which measurements of it are found.
        memory: bytes as CUDA reports them (less than the nominal size with ECC).
        bf16: dense FLOP/s of its tensor cores.
        fp32: FLOP/s in fp32 without tensor cores.
        peers: bytes per second to the other GPUs of its node, over NVLink, else PCIe.
        host: bytes per second to pinned host memory, over PCIe.
        memory_rate: bytes per second of its own memory.
    """

    name: str
    product: str
    memory: float
    bf16: float
    fp32: float
    peers: float
    host: float
    memory_rate: float

    def peak(self, precision: str) -> float:
        """Peak FLOP/s in a recipe's precision."""
        return self.bf16 if precision == "bf16" else self.fp32

    @property
    def usable(self) -> float:
        """Bytes available to tensors."""
        return self.memory * (1 - _FRAGMENTED) - _CONTEXT


_BYTES_A_FLOP = 2e12 / 312e12
"""An A100's, for the memory of a GPU that nobody knows."""
_PCIE4, _PCIE5 = 31.5e9, 63.0e9
"""x16, one direction."""


def _gpu(name: str, product: str, gib: float, fp32: float, peers: float, host: float, memory_rate: float) -> Gpu:
    return Gpu(name, product, gib * _GIB, PEAKS[product], fp32, peers, host, memory_rate)


# NVIDIA's data sheets, which give NVLink's bandwidth for both directions together.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("rtx3080", "RTX 3080", 9.7, 29.8e12, _PCIE4, _PCIE4, 760e9),
        _gpu("rtx3090", "RTX 3090", 23.6, 35.6e12, _PCIE4, _PCIE4, 936e9),
        _gpu("rtx4080", "RTX 4080", 15.6, 48.7e12, _PCIE4, _PCIE4, 717e9),
        _gpu("rtx4090", "RTX 4090", 23.6, 82.6e12, _PCIE4, _PCIE4, 1008e9),
        _gpu("rtx5080", "RTX 5080", 15.5, 56.3e12, _PCIE5, _PCIE5, 960e9),
        _gpu("rtx5090", "RTX 5090", 31.4, 104.8e12, _PCIE5, _PCIE5, 1792e9),
        _gpu("a6000", "RTX A6000", 47.4, 38.7e12, _PCIE4, _PCIE4, 768e9),
        _gpu("6000ada", "RTX 6000 Ada", 47.4, 91.1e12, _PCIE4, _PCIE4, 960e9),
        _gpu("l4", "L4", 22.0, 30.3e12, _PCIE4, _PCIE4, 300e9),
        _gpu("a10", "A10", 22.1, 31.2e12, _PCIE4, _PCIE4, 600e9),
        _gpu("a100-40g", "A100", 39.4, 19.5e12, 300e9, _PCIE4, 1555e9),
        _gpu("a100-80g", "A100", 79.2, 19.5e12, 300e9, _PCIE4, 2039e9),
        _gpu("l40s", "L40S", 44.4, 91.6e12, _PCIE4, _PCIE4, 864e9),
        _gpu("h100-pcie", "H100 PCIe", 79.1, 51e12, _PCIE5, _PCIE5, 2000e9),
        _gpu("h100", "H100", 79.1, 67e12, 450e9, _PCIE5, 3350e9),
        _gpu("h200", "H200", 139.7, 67e12, 450e9, _PCIE5, 4800e9),
        _gpu("b200", "B200", 178.3, 75e12, 900e9, _PCIE5, 8000e9),
    )
}


@dataclass(frozen=True)
class Cluster:
    """A cluster of equal nodes.

    Args:
        link: bytes per second that a node sends to others, over all its adapters; None if unknown.
    """

    gpu: Gpu
    gpus: int
    gpus_per_node: int
    link: float | None = None

    @property
    def nodes(self) -> int:
        return self.gpus // self.gpus_per_node

    def of(self, gpus: int) -> "Cluster":
        """A cluster of `gpus` GPUs of this kind: a part of a node, or whole nodes."""
        return Cluster(self.gpu, gpus, min(gpus, self.gpus_per_node), self.link)


def find_gpu(
    name: str | None, memory: float | None = None, tflops: float | None = None, bandwidth: float | None = None
) -> Gpu:
    """A GPU by its name, by its figures, or by both: a figure given counts.

    Args:
        memory: GiB.
        tflops: 10**12 operations per second in the recipe's precision.
        bandwidth: GB per second to the other GPUs of its node; PCIe 4 where nobody says, for an unknown one.

    Raises:
        UsageError: an unknown name without memory and tflops; suggests the closest and lists all known ones.
    """
    known = GPUS.get(name.lower()) if name is not None else None
    if known is None and (memory is None or tflops is None):
        raise UsageError(_unknown(name))
    gpu = known or Gpu(
        name or "GPU", name or "GPU", 0.0, 0.0, 0.0, _PCIE4, _PCIE4, _BYTES_A_FLOP * (tflops or 0) * 1e12
    )
    return replace(
        gpu,
        memory=gpu.memory if memory is None else memory * _GIB,
        bf16=gpu.bf16 if tflops is None else tflops * 1e12,
        fp32=gpu.fp32 if tflops is None else tflops * 1e12,
        peers=gpu.peers if bandwidth is None else bandwidth * 1e9,
    )


def _unknown(name: str | None) -> str:
    figures = "--gpu-memory and --gpu-tflops describe any other"
    if name is None:
        return f"--gpu is missing; known: {', '.join(GPUS)}; {figures}"
    nearest = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"--gpu {name}: unknown GPU; {hint}known: {', '.join(GPUS)}; {figures}"


def build_cluster(gpu: Gpu | str, gpus: int, gpus_per_node: int, link: str | None) -> Cluster:
    """The cluster that the command line describes.

    Args:
        gpu: its name, where its figures are those known.

    Raises:
        UsageError: an unknown GPU, no whole number of nodes, or an invalid link rate.
    """
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise UsageError(
            f"--gpus {gpus} is not a whole number of nodes of {gpus_per_node}; change it to "
            f"{gpus - gpus % gpus_per_node} or {gpus + gpus_per_node - gpus % gpus_per_node}, or set --gpus-per-node"
        )
    found = find_gpu(gpu) if isinstance(gpu, str) else gpu
    return Cluster(found, gpus, min(gpus, gpus_per_node), None if link is None else _rate(link))


def _rate(link: str) -> float:
    match = _LINK.fullmatch(link.strip())
    if match is None:
        raise UsageError(f"--link {link}: expected the rate of a node's network, such as 200gbps or 8x400gbps")
    adapters = int(match[1] or 1)
    return adapters * float(match[2]) * {"g": 1e9, "m": 1e6}[match[3].lower()] / 8
