"""Cores beside a GPU: a rank and its data workers run on those of the GPU's NUMA node."""

import os
from pathlib import Path
from typing import Any

_DEVICES = Path("/sys/bus/pci/devices")
_NODES = Path("/sys/devices/system/node")


def bind_to_gpu(properties: Any, devices: Path = _DEVICES, nodes: Path = _NODES) -> set[int]:
    """Keeps this thread, and all that it starts from now on, to the cores of the GPU's NUMA node.

    Memory that another node's core touches first is copied to the GPU through the other socket. Only cores that the
    process has are taken, as Slurm or taskset gave them; where they are all of another node, they stay.

    Args:
        properties: torch's, of the GPU.

    Returns:
        the cores that are left.
    """
    own = os.sched_getaffinity(0)
    chosen = own & _cores_beside(properties, devices, nodes)
    if chosen and chosen != own:
        os.sched_setaffinity(0, chosen)
        return chosen
    return own


def _cores_beside(properties: Any, devices: Path, nodes: Path) -> set[int]:
    """Empty where the machine does not say, as virtual ones may not."""
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    try:
        node = int((devices / address / "numa_node").read_text())
        return cores_of((nodes / f"node{node}" / "cpulist").read_text())
    except (OSError, ValueError):
        return set()


def cores_of(cpulist: str) -> set[int]:
    """The kernel's list of cores, such as 0-3,8."""
    cores: set[int] = set()
    for part in cpulist.strip().split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores
