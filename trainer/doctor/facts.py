"""Facts that ranks report to each other, serialised as JSON. No torch.

Sizes are bytes, times seconds, rates bytes per second. None means unknown.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RankFacts:
    """Facts that a rank reports about itself at startup.

    Attributes:
        host: its host name.
        machine: machine id, to distinguish machines with the same host name.
        cores: CPU affinity of this process, as a bit mask.
        gpu: identifier of the GPU that it will use; empty on CPU.
        gpus: number of GPUs visible to it.
    """

    rank: int
    local_rank: int
    world_size: int
    host: str
    machine: str
    cores: int
    gpu: str
    gpus: int


@dataclass(frozen=True)
class Interface:
    """A network interface. `speed` is its nominal rate in bytes per second; None if unknown."""

    name: str
    address: str
    speed: float | None


@dataclass(frozen=True)
class Gpu:
    """A GPU as NVML reports it.

    Attributes:
        used_by: pids of processes that hold memory on it.
        ecc_uncorrected: uncorrected ECC errors since the driver was loaded.
        pending_repair: whether row remapping or page retirement is pending until the next reset.
        throttled: reasons for clock throttling, except idle and application settings.
        pcie_width: PCIe lanes in use, and their maximum.
        link: bandwidth to its neighbours, over NVLink if it has any, else over PCIe.
    """

    index: int
    uuid: str
    name: str
    memory: int
    free: int | None = None
    used_by: tuple[int, ...] = ()
    ecc_uncorrected: int | None = None
    pending_repair: bool | None = None
    throttled: tuple[str, ...] = ()
    clock_limit_mhz: int | None = None
    pcie_width: tuple[int, int] | None = None
    link: float | None = None
    link_kind: str = ""


@dataclass(frozen=True)
class SharedMemory:
    """/dev/shm. `left_over` is the size of files that killed ranks of DeepSpeed programs left there."""

    size: int
    free: int
    left_over: int


@dataclass(frozen=True)
class HostFacts:
    """Facts about a host, reported by its first rank at startup.

    Attributes:
        versions: of packages, drivers and the project's own sources, by name.
        environment: variables that affect computation or communication.
        interface: the interface that routes to the main rank.
        fabric: total rate of its active InfiniBand or RoCE ports; None without any.
        nvml: why NVML is unavailable; empty if it is available.
        exporter_port_free: whether the first port for metrics is free; None if metrics are off.
        listens_at: address and port for the connection test from another host.
    """

    rank: int
    host: str
    versions: Mapping[str, str]
    environment: Mapping[str, str]
    memory: int
    memory_available: int
    open_files: int
    open_files_limit: int
    locked_memory: int
    shm: SharedMemory | None
    interface: Interface | None
    fabric: float | None
    gpus: tuple[Gpu, ...]
    nvml: str
    exporter_port_free: bool | None
    listens_at: tuple[str, int]


@dataclass(frozen=True)
class RunDirFacts:
    """The run directory as seen from a host.

    Attributes:
        resolved: its path with symlinks resolved.
        filesystem: file system type, such as nfs4 or tmpfs.
        saw: whether the host can read the main rank's file.
        seen: whether the main rank can read the host's file; set by the main rank.
        wrote: bytes written and synced in `seconds`.
    """

    resolved: str
    filesystem: str
    free: int
    saw: bool
    seen: bool
    problem: str
    wrote: int
    seconds: float


@dataclass(frozen=True)
class ShardFacts:
    """The shards as seen from a host.

    Attributes:
        refused: why a run would refuse them; empty if it would not.
        note: what a run would replace.
        unreadable: samples that could not be read, of `tried`.
        read: bytes read in `seconds`.
    """

    fingerprint: str = ""
    images: int = 0
    refused: str = ""
    note: str = ""
    tried: int = 0
    unreadable: tuple[str, ...] = ()
    read: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class ProbeFacts:
    """Results of the probes of a host's first rank.

    Attributes:
        neighbour: name of the next host.
        unreachable: why its port could not be reached; empty if it could.
    """

    rank: int
    neighbour: str
    unreachable: str
    run_dir: RunDirFacts | None
    shards: ShardFacts | None


@dataclass(frozen=True)
class Clock:
    """A host's clock offset from the main rank's: `ahead` seconds, plus or minus `uncertainty`."""

    host: str
    ahead: float
    uncertainty: float


@dataclass(frozen=True)
class Reduction:
    """An all-reduce across all ranks; `seconds` is the time of one on the slowest rank."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Pair:
    """Point-to-point bandwidth between two neighbours of the ring, in one direction at a time."""

    first: str
    second: str
    rate: float


@dataclass(frozen=True)
class Network:
    """Collective bandwidth measurements. `failure` is the error if they failed."""

    backend: str
    reductions: tuple[Reduction, ...] = ()
    pairs: tuple[Pair, ...] = ()
    failure: str = ""


@dataclass(frozen=True)
class RecipeFacts:
    """Facts of the main rank about the recipe.

    Attributes:
        refused: why training would refuse to start; empty if it would not.
        parameters: parameter count of the model; None if it cannot be built.
        checkpoints: number of complete checkpoints in the run directory.
    """

    refused: str
    parameters: int | None
    checkpoints: int


@dataclass(frozen=True)
class Plan:
    """What the ranks are to probe; the main rank publishes it once all have reported.

    Attributes:
        hosts: first ranks of the hosts, with name, address and port.
        folder: where the main rank wrote `token`; None if there is no run directory to probe.
    """

    hosts: tuple[tuple[int, str, str, int], ...]
    folder: Path | None
    token: str

    def next_to(self, rank: int) -> tuple[str, str, int] | None:
        """Name, address and port of the host after that of `rank`; None if there is only one host."""
        position = next(number for number, host in enumerate(self.hosts) if host[0] == rank)
        neighbour = self.hosts[(position + 1) % len(self.hosts)]
        return neighbour[1:] if neighbour[0] != rank else None
