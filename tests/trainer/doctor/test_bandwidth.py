import pytest

from mixmae.trainer.doctor.facts import Pair, Reduction
from mixmae.trainer.doctor.follower import measure_pairs
from mixmae.trainer.doctor.probes.bandwidth import WrongSumError, measure_reductions
from mixmae.trainer.engine.distributed import Ranks
from tests.helpers import run_ranks

pytestmark = pytest.mark.distributed


def measure(ranks: Ranks) -> tuple[tuple[Reduction, ...], tuple[Pair, ...]]:
    return measure_reductions(ranks, (1 << 16, 1 << 20)), measure_pairs(ranks, (0, 1, 2), {0: "a", 1: "b", 2: "c"})


def test_reductions_and_neighbours_are_timed() -> None:
    (reductions, pairs), *others = run_ranks(measure, 3)
    assert [one.bytes for one in reductions] == [1 << 16, 1 << 20]
    assert all(one.seconds > 0 for one in reductions)
    assert {(pair.first, pair.second) for pair in pairs} == {("a", "b"), ("b", "c"), ("c", "a")}
    assert all(pair.rate > 0 for pair in pairs)
    for same, nothing in others:
        assert same == reductions  # the slowest rank's time
        assert nothing == ()


def expect_another_sum(ranks: Ranks) -> str:
    with pytest.raises(WrongSumError) as caught:
        measure_reductions(Ranks(ranks.rank, 3, ranks.local_rank), (1 << 10,))
    return str(caught.value)


def test_a_sum_that_is_not_that_of_all_ranks_is_refused() -> None:
    assert run_ranks(expect_another_sum, 2) == ["all-reduce of ones over 3 ranks gave 2 to 2"] * 2
