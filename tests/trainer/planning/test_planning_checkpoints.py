"""What a save takes: the ranks share it at every ZeRO stage, and training stands for a copy or until it is written."""

import pytest

from mixmae.trainer.planning.checkpoint_cost import checkpoint_cost
from mixmae.trainer.planning.devices import build_cluster
from mixmae.trainer.planning.states import Limits, Parameters, states
from mixmae.trainer.recipe.sections.checkpoint import Checkpoint

HUGE = Parameters(total=683_600_000, largest=31_700_000, persistent=600_000, buffers=0)


def test_ranks_share_a_checkpoint() -> None:
    cluster = build_cluster("a100-80g", 64, 8, None)
    cost = checkpoint_cost(HUGE, cluster, Checkpoint(keep=3), write_rate=2e9)
    assert cost.bytes == 12 * HUGE.total
    assert cost.share * 64 == pytest.approx(cost.bytes)
    assert cost.stall == cost.share / cluster.gpu.host
    assert cost.seconds == pytest.approx(cost.bytes / 8 / 2e9)
    assert cost.host_bytes == 8 * 2**27  # 128 MB each, rounded up to a power of two
    assert cost.kept_bytes == 4 * cost.bytes


def test_a_share_is_what_the_optimizer_holds_of_it() -> None:
    for precision in ("fp32", "bf16"):
        held = states(2, precision, HUGE, 64, False, Limits())
        cost = checkpoint_cost(HUGE, build_cluster("h100", 64, 8, None), Checkpoint(), 1e9)
        assert cost.share == held.optimizer


def test_training_that_waits_takes_no_memory() -> None:
    cost = checkpoint_cost(HUGE, build_cluster("h100", 64, 8, None), Checkpoint(asynchronous=False), 1e9)
    assert (cost.stall, cost.host_bytes) == (cost.seconds, 0)
