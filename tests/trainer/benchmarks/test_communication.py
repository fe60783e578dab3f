import pytest

from mixmae.trainer.benchmarks import communication
from tests.warm import start_method


@pytest.mark.distributed
def test_what_bf16_rounds_off_grows_with_the_ranks_and_fp32_does_not() -> None:
    two, four = (communication.measure(ranks, 50_000, start_method=start_method()) for ranks in (2, 4))
    for found in (two, four):
        assert found["fp32"]["error"] < 1e-6
        assert 2**-10 < found["rounded_once"] < 2**-9  # at most half an ulp
        assert 0.99 * found["rounded_once"] < found["bf16"]["error"] < 10 * found["rounded_once"]
        assert abs(found["bf16"]["shrinks"]) < 1e-3
    assert four["bf16"]["error"] > 1.1 * two["bf16"]["error"]
