import pytest
import torch

from mixmae.trainer.telemetry.clock import StepClock


def test_parts_and_steps_are_told_once_a_step() -> None:
    now = 0.0
    parts: list[tuple[str, float]] = []
    steps: list[float] = []
    places: list[str] = []
    clock = StepClock(torch.device("cpu"), lambda *part: parts.append(part), steps.append, places.append, lambda: now)
    for _ in range(2):
        for _ in range(3):  # micro-batches
            with clock.part("data_wait"):
                now += 1
            with clock.part("forward"):
                now += 10
        now += 100
        clock.finish()
    assert parts == [("data_wait", 3.0), ("forward", 30.0)] * 2
    assert steps == [133.0]
    assert places == ["data_wait", "between", "forward", "between"] * 6


def test_a_part_that_ends_in_an_error_is_where_the_rank_is() -> None:
    places: list[str] = []
    clock = StepClock(torch.device("cpu"), lambda *_: None, lambda _: None, places.append)
    with pytest.raises(OSError, match="gone"), clock.part("data_wait"):
        raise OSError("gone")
    assert places == ["data_wait"]


@pytest.mark.gpu
def test_device_time_is_told_without_waiting() -> None:
    parts: dict[str, list[float]] = {}
    device = torch.device("cuda", 0)

    def tell(name: str, seconds: float) -> None:
        parts.setdefault(name, []).append(seconds)

    clock = StepClock(device, tell, lambda _: None, lambda _: None)
    x = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    for _ in range(8):
        for name in ("forward", "backward", "optimizer"):
            with clock.part(name):
                for _ in range(10):
                    x = x @ x / 64
        clock.finish()
    early = len(parts.get("forward", []))
    torch.cuda.synchronize()
    clock.finish()
    assert early < 8  # the host ran ahead
    assert {len(seconds) for seconds in parts.values()} == {8}
    assert all(seconds > 1e-4 for told in parts.values() for seconds in told)
