import pytest
import torch

from mixmae.trainer.telemetry.clock import StepClock


def test_phases_and_steps_are_reported_once_a_step() -> None:
    now = 0.0
    ended: list[tuple[str, float]] = []
    steps: list[float] = []
    phases: list[str] = []
    device = torch.device("cpu")
    clock = StepClock(device, phases.append, lambda *phase: ended.append(phase), steps.append, lambda: now)
    for _ in range(2):
        for _ in range(3):  # micro-batches
            with clock.phase("data_wait"):
                now += 1
            with clock.phase("forward"):
                now += 10
        now += 100
        clock.finish()
    assert ended == [("data_wait", 3.0), ("forward", 30.0)] * 2
    assert steps == [133.0]
    assert phases == ["data_wait", "between", "forward", "between"] * 6


def test_a_rank_stays_in_a_phase_that_ends_in_an_error() -> None:
    phases: list[str] = []
    clock = StepClock(torch.device("cpu"), phases.append, lambda *_: None, lambda _: None)
    with pytest.raises(OSError, match="gone"), clock.phase("data_wait"):
        raise OSError("gone")
    assert phases == ["data_wait"]


@pytest.mark.gpu
def test_device_time_is_reported_without_waiting() -> None:
    ended: dict[str, list[float]] = {}
    device = torch.device("cuda", 0)
    clock = StepClock(
        device, lambda _: None, lambda name, seconds: ended.setdefault(name, []).append(seconds), lambda _: None
    )
    x = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    for _ in range(8):
        for name in ("forward", "backward", "optimizer"):
            with clock.phase(name):
                for _ in range(10):
                    x = x @ x / 64
        clock.finish()
    early = len(ended.get("forward", []))
    torch.cuda.synchronize()
    clock.finish()
    assert early < 8  # the host ran ahead
    assert {len(seconds) for seconds in ended.values()} == {8}
    assert all(seconds > 1e-4 for told in ended.values() for seconds in told)
