import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import deepspeed  # noqa: F401  # which looks for an accelerator, by variables that tests set
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from mixmae.base.errors import UsageError
from mixmae.trainer.engine import distributed
from mixmae.trainer.engine.distributed import Ranks, background_group, compute_deterministically, join, read_ranks
from tests.helpers import run_ranks

LAUNCHER = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "MASTER_ADDR": "node1",
}


def test_launcher_variables() -> None:
    ranks = read_ranks(LAUNCHER)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.master_addr, ranks.master_port) == (
        3,
        4,
        1,
        "node1",
        29500,
    )
    assert not ranks.is_main


def test_slurm_variables() -> None:
    ranks = read_ranks(SLURM)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.master_addr) == (3, 4, 1, "node1")
    assert ranks.master_port != read_ranks({**SLURM, "SLURM_JOB_ID": "18"}).master_port


def test_a_launcher_inside_a_slurm_step_counts_more_than_slurm() -> None:
    assert read_ranks({**SLURM, **LAUNCHER, "RANK": "2"}).rank == 2


def test_alone() -> None:
    ranks = read_ranks({"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"})  # a batch script, not a step
    assert (ranks.rank, ranks.world_size) == (0, 1)
    assert ranks.master_port > 0


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_set_environments_are_refused(missing: str) -> None:
    with pytest.raises(UsageError, match=missing):
        read_ranks({name: value for name, value in LAUNCHER.items() if name != missing})


def test_a_local_rank_alone_is_half_set() -> None:
    with pytest.raises(UsageError, match="RANK, WORLD_SIZE"):
        read_ranks({"LOCAL_RANK": "3"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "first"), ("RANK", ""), ("RANK", "-1"), ("RANK", "4"), ("RANK", "1.0"), ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "9" * 5000), ("LOCAL_RANK", "-1"), ("MASTER_PORT", "x"), ("MASTER_PORT", "0"),
        ("MASTER_PORT", "70000"),
    ],
)  # fmt: skip
def test_numbers_are_expected(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{name}={value}.*: expected whole numbers"):
        read_ranks({**LAUNCHER, name: value})


def test_a_job_without_a_number_has_a_port() -> None:
    assert read_ranks({**SLURM, "SLURM_JOB_ID": "local"}).master_port >= 10_000


RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int, uuid: str = "GPU-1") -> None:
    """Stand-ins for a host that shows this task so many GPUs."""
    shown = {"is_available": lambda: True, "device_count": lambda: count, "set_device": lambda device: None}
    properties = SimpleNamespace(uuid=uuid, pci_domain_id=0xFFFF, pci_bus_id=0, pci_device_id=0)  # on no NUMA node here
    for name, stand_in in {**shown, "get_device_properties": lambda device: properties}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


@pytest.mark.parametrize(("count", "index"), [(8, 3), (1, 0)])
def test_a_task_takes_its_gpu_or_the_only_one_it_sees(monkeypatch: pytest.MonkeyPatch, count: int, index: int) -> None:
    """Under Slurm's --gpus-per-task=1 each task sees one GPU, which is its number 0."""
    see_gpus(monkeypatch, count)
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    told: dict[str, Any] = {}
    monkeypatch.setattr("deepspeed.init_distributed", lambda **given: told.update(given))

    def open_store(ranks: Ranks, timeout: timedelta) -> HashStore:
        told.update(store_timeout=timeout)
        return HashStore()

    monkeypatch.setattr(distributed, "open_store", open_store)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: told.update(given))
    for library in ("GLOO", "NCCL"):
        monkeypatch.setenv(f"{library}_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: told.update(cudnn=enabled))
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(dist.distributed_c10d, name, getattr(dist.distributed_c10d, name))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(distributed, "compute_deterministically", lambda: told.update(deterministic=True))
    monkeypatch.setattr(distributed, "bind_to_gpu", lambda gpu: told.update(bound_to=gpu.uuid))
    ranks = Ranks(rank=11, world_size=16, local_rank=3)
    join(ranks, stuck_seconds=100, deterministic=True)
    assert ranks.device == torch.device("cuda", index)
    assert os.environ["LOCAL_RANK"] == str(index)  # which DeepSpeed reads
    assert told["dist_backend"] == "nccl"
    assert told["timeout"].total_seconds() > 300  # the supervisor's thrice stuck_seconds
    assert told["store_timeout"] == told["timeout"]
    assert (told["rank"], told["world_size"], told["device_id"]) == (11, 16, torch.device("cuda", index))
    assert told["cudnn"] is False
    assert told["deterministic"]
    assert told["bound_to"] == "GPU-1"
    assert not torch.backends.cudnn.allow_tf32  # a run in fp32 computes its convolutions in it too


def test_what_makes_a_gpu_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("NCCL_ALGO", "Tree")  # what the user says counts
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        compute_deterministically()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch._C._get_deterministic_fill_uninitialized_memory()  # which would write every tensor twice
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # which cuBLAS asks for
        assert os.environ["NCCL_ALGO"] == "Tree"
    finally:
        torch.use_deterministic_algorithms(False)


def test_another_accelerator_than_torch_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "tpu")
    with pytest.raises(UsageError, match=r"DS_ACCELERATOR=tpu, but torch computes on \w+ here; unset it"):
        join(Ranks(master_port=1))


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 2)
    for name in RANK_VARIABLES:  # which joining sets
        monkeypatch.setenv(name, "")
    with pytest.raises(UsageError, match="LOCAL_RANK=3, but this host shows 2 GPUs"):
        join(Ranks(rank=3, world_size=4, local_rank=3))


def test_a_gpu_that_another_rank_has_is_refused_before_nccl_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 1)
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    store, connected = HashStore(), []
    monkeypatch.setattr(distributed, "open_store", lambda ranks, timeout: store)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: connected.append(given["rank"]))
    monkeypatch.setattr("deepspeed.init_distributed", lambda **given: None)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
    join(Ranks(rank=0, world_size=2, local_rank=0))
    with pytest.raises(UsageError, match="GPU-1, which another rank has taken"):
        join(Ranks(rank=1, world_size=2, local_rank=1))
    assert connected == [0]


def timeouts(ranks: Ranks) -> list[float]:
    """Seconds that collectives of all groups wait: torch's, DeepSpeed's own, and those of this project."""
    from deepspeed.utils import groups

    join(ranks, stuck_seconds=100)
    all_groups = [dist.group.WORLD, groups._get_data_parallel_group(), background_group()]
    return [group._get_backend(ranks.device).options._timeout.total_seconds() for group in all_groups]


def test_no_collective_gives_up_before_the_supervisor() -> None:
    assert min(run_ranks(joined_again, 1)[0]) > 300


def joined_again(ranks: Ranks) -> list[float]:
    dist.destroy_process_group()
    import deepspeed.comm.comm as of_deepspeed

    of_deepspeed.cdb = None
    return timeouts(ranks)
