"""Known GPUs, and clusters of them."""

import difflib
import re
from dataclasses import dataclass

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
        product: the part of the device's name by which `mixmae.trainer.tasks.flops` finds its bf16 peak.
        memory: bytes as CUDA reports them (less than the nominal size with ECC).
        fp32: FLOP/s in fp32 without tensor cores.
        peers: bytes per second to the other GPUs of its node, over NVLink, else PCIe.
        host: bytes per second to pinned host memory, over PCIe.
    """

    name: str
    product: str
    memory: float
    fp32: float
    peers: float
    host: float

    def peak(self, precision: str) -> float:
        """Peak FLOP/s in a recipe's precision."""
        return PEAKS[self.product] if precision == "bf16" else self.fp32

    @property
    def usable(self) -> float:
        """Bytes available to tensors."""
        return self.memory * (1 - _FRAGMENTED) - _CONTEXT


_PCIE4, _PCIE5 = 31.5e9, 63.0e9
"""x16, one direction."""
# NVIDIA's data sheets, which give NVLink's bandwidth for both directions together.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a10", "A10", 22.1 * _GIB, 31.2e12, _PCIE4, _PCIE4),
        Gpu("a100-40g", "A100", 39.4 * _GIB, 19.5e12, 300e9, _PCIE4),
        Gpu("a100-80g", "A100", 79.2 * _GIB, 19.5e12, 300e9, _PCIE4),
        Gpu("l40s", "L40S", 44.4 * _GIB, 91.6e12, _PCIE4, _PCIE4),
        Gpu("h100-pcie", "H100 PCIe", 79.1 * _GIB, 51e12, _PCIE5, _PCIE5),
        Gpu("h100", "H100", 79.1 * _GIB, 67e12, 450e9, _PCIE5),
        Gpu("h200", "H200", 139.7 * _GIB, 67e12, 450e9, _PCIE5),
        Gpu("b200", "B200", 178.3 * _GIB, 75e12, 900e9, _PCIE5),
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


def find_gpu(name: str) -> Gpu:
    """A GPU by its name.

    Raises:
        UsageError: an unknown name; suggests the closest and lists all known ones.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    nearest = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise UsageError(f"--gpu {name}: unknown GPU; {hint}known: {', '.join(GPUS)}")


def build_cluster(gpu: str, gpus: int, gpus_per_node: int, link: str | None) -> Cluster:
    """The cluster that the command line describes.

    Raises:
        UsageError: an unknown GPU, no whole number of nodes, or an invalid link rate.
    """
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise UsageError(
            f"--gpus {gpus} is not a whole number of nodes of {gpus_per_node}; change it to "
            f"{gpus - gpus % gpus_per_node} or {gpus + gpus_per_node - gpus % gpus_per_node}, or set --gpus-per-node"
        )
    return Cluster(find_gpu(gpu), gpus, min(gpus, gpus_per_node), None if link is None else _rate(link))


def _rate(link: str) -> float:
    match = _LINK.fullmatch(link.strip())
    if match is None:
        raise UsageError(f"--link {link}: expected the rate of a node's network, such as 200gbps or 8x400gbps")
    adapters = int(match[1] or 1)
    return adapters * float(match[2]) * {"g": 1e9, "m": 1e6}[match[3].lower()] / 8
