"""What ranks report to each other: plain values, serialised as JSON. No torch.

Sizes are bytes, times seconds, rates bytes per second. None is what could not be determined.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RankFacts:
    """A rank's own facts, reported when it arrives.

    Attributes:
        host: its host's name, as the host has it.
        machine: tells two machines of the same name apart.
        cores: those that this process may run on, as bits of a number.
        gpu: identifier of the GPU that it will take; empty where it computes on the host.
        gpus: how many GPUs it can choose from.
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
    """A network interface. `speed` is its nominal rate, bytes per second; None where unknown."""

    name: str
    address: str
    speed: float | None


@dataclass(frozen=True)
class Gpu:
    """A GPU, as NVML shows it.

    Attributes:
        used_by: processes that hold memory on it.
        ecc_uncorrected: uncorrected memory errors since the driver was loaded.
        pending_repair: whether memory waits to be remapped or retired at the next reset.
        throttled: why its clock is held down for other reasons than idling and settings.
        pcie_width: lanes in use, and how many there could be.
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
    """/dev/shm. `left_over` is what killed ranks of DeepSpeed programs left there."""

    size: int
    free: int
    left_over: int


@dataclass(frozen=True)
class HostFacts:
    """A host's facts, reported by its first rank when it arrives.

    Attributes:
        versions: of packages, drivers and the project's own sources, by name.
        environment: variables that change how ranks compute or communicate.
        own_addresses: what the host's own name resolves to there.
        interface: that towards the main rank.
        fabric: added rate of its active InfiniBand or RoCE ports; None without any.
        nvml: why NVML is unavailable; empty where it is available.
        exporter_port_free: whether the first port for metrics is free; None where none is asked for.
        listens_at: an address and a port that neighbours try to reach.
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
    own_addresses: tuple[str, ...]
    interface: Interface | None
    fabric: float | None
    gpus: tuple[Gpu, ...]
    nvml: str
    exporter_port_free: bool | None
    listens_at: tuple[str, int]


@dataclass(frozen=True)
class RunDirFacts:
    """What a host sees of the run directory.

    Attributes:
        resolved: where it is, with links followed.
        filesystem: its type, such as nfs4 or tmpfs.
        saw: whether it read what the main rank wrote.
        seen: whether the main rank reads what it wrote; the main rank says so.
        wrote: bytes of the probe that arrived on disk, in `seconds`.
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
    """What a host sees of the shards.

    Attributes:
        refused: why a run could not use them; empty where it could.
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
    """What a host's first rank found by probing.

    Attributes:
        neighbour: the next host, and why its port could not be reached, if so.
    """

    rank: int
    neighbour: str
    unreachable: str
    run_dir: RunDirFacts | None
    shards: ShardFacts | None


@dataclass(frozen=True)
class Clock:
    """A host's clock against the main rank's: seconds ahead, give or take `uncertainty`."""

    host: str
    ahead: float
    uncertainty: float


@dataclass(frozen=True)
class Reduction:
    """An all-reduce across all ranks: seconds for one, of the slowest rank."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Pair:
    """Two neighbours of the ring, and what goes between them, one way at a time."""

    first: str
    second: str
    rate: float


@dataclass(frozen=True)
class Network:
    """What ranks measured together. `failure` says why they could not."""

    backend: str
    reductions: tuple[Reduction, ...] = ()
    pairs: tuple[Pair, ...] = ()
    failure: str = ""


@dataclass(frozen=True)
class RecipeFacts:
    """The main rank's facts about the recipe.

    Attributes:
        refused: why training would refuse to start; empty where it would not.
        parameters: of the whole model; None if it cannot be built.
        checkpoints: complete ones in the run directory.
    """

    refused: str
    parameters: int | None
    checkpoints: int


@dataclass(frozen=True)
class Plan:
    """What the main rank tells the others to probe, once all have arrived.

    Attributes:
        hosts: first ranks of the hosts, with name, address and port.
        folder: where the main rank wrote `token`; None where there is no run directory to probe.
    """

    hosts: tuple[tuple[int, str, str, int], ...]
    folder: Path | None
    token: str

    def next_to(self, rank: int) -> tuple[str, str, int] | None:
        """Name, address and port of the host after that of `rank`; None for a host alone."""
        position = next(number for number, host in enumerate(self.hosts) if host[0] == rank)
        neighbour = self.hosts[(position + 1) % len(self.hosts)]
        return neighbour[1:] if neighbour[0] != rank else None
