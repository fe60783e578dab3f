"""Facts about a rank and its host: memory, limits, GPUs, interfaces."""

import os
import resource
import shutil
import socket
from pathlib import Path

import psutil
import torch

from mixmae.monitoring.exporter.node import SHARED_MEMORY
from mixmae.trainer.doctor.facts import Gpu, HostFacts, RankFacts, SharedMemory
from mixmae.trainer.doctor.probes.gpus import read_gpus
from mixmae.trainer.doctor.probes.network import fabric_rate, interface_with, is_free
from mixmae.trainer.doctor.probes.versions import relevant, software
from mixmae.trainer.engine.distributed import Ranks

_LEFT_OVER = "deepspeed_allreduce_buffer_*"
"""Shared-memory files that killed ranks of DeepSpeed programs leave behind."""


def rank_facts(ranks: Ranks) -> RankFacts:
    """Facts about this process. Allocates nothing on a GPU."""
    gpus = torch.cuda.device_count()
    takes_one = ranks.device.type == "cuda" and ranks.device.index < gpus
    return RankFacts(
        ranks.rank,
        ranks.local_rank,
        ranks.world_size,
        socket.gethostname(),
        _machine(),
        sum(1 << core for core in os.sched_getaffinity(0)),
        str(torch.cuda.get_device_properties(ranks.device).uuid) if takes_one else "",
        gpus,
    )


def _machine() -> str:
    """An id of the machine and its network namespace: host names are not unique, and a host may have several."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{Path('/proc/self/ns/net').stat().st_ino}"


def host_facts(ranks: Ranks, exporter_port: int | None, listens_at: tuple[str, int]) -> HostFacts:
    """Facts about this host, for its first rank. Allocates nothing on a GPU."""
    memory = psutil.virtual_memory()
    gpus, drivers, nvml = read_gpus()
    open_files, open_files_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    return HostFacts(
        rank=ranks.rank,
        host=socket.gethostname(),
        versions=software(drivers),
        environment=relevant(os.environ),
        memory=memory.total,
        memory_available=memory.available,
        open_files=open_files,
        open_files_limit=open_files_limit,
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        shm=_shared_memory(),
        interface=interface_with(listens_at[0]),
        fabric=fabric_rate(),
        gpus=gpus or _gpus_of_torch(),
        nvml=nvml,
        exporter_port_free=is_free(exporter_port) if exporter_port else None,
        listens_at=listens_at,
    )


def _shared_memory() -> SharedMemory | None:
    if not SHARED_MEMORY.is_dir():
        return None
    usage = shutil.disk_usage(SHARED_MEMORY)
    left_over = sum(file.stat().st_size for file in SHARED_MEMORY.glob(_LEFT_OVER))
    return SharedMemory(usage.total, usage.free, left_over)


def _gpus_of_torch() -> tuple[Gpu, ...]:
    """Names and sizes of GPUs, if NVML is unavailable."""
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(Gpu(i, str(one.uuid), one.name, one.total_memory) for i, one in enumerate(properties))
