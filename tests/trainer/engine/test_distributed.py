import pytest

from mixmae.base.errors import UsageError
from mixmae.trainer.engine.distributed import read_ranks

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


def test_numbers_are_expected() -> None:
    with pytest.raises(UsageError, match="RANK=first"):
        read_ranks({**LAUNCHER, "RANK": "first"})
