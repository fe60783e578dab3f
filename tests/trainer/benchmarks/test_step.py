import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType

from mixmae.base.errors import UsageError
from mixmae.models.contract import Trainable
from mixmae.trainer.benchmarks import scale, step, step_times
from mixmae.trainer.benchmarks.profiling import kernel_shares, kernel_table, standstill
from mixmae.trainer.benchmarks.variants import VARIANTS, Variant
from mixmae.trainer.tasks.flops import model_flops
from tests.helpers import tiny_recipe

HERE = torch.device("cpu")


def test_measurements_are_consistent() -> None:
    recipe = tiny_recipe(**{"train.micro_batch": 4, "train.global_batch": 4})
    found = [one for one, _ in step_times.measure(recipe, ["plain", "grouped"], 2, HERE)]
    assert [one["variant"] for one in found] == ["plain", "grouped"]
    assert found[0]["ratio_to_plain"] == 1
    for one in found:
        assert one["images_per_second"] == pytest.approx(4 / one["step_seconds"], rel=0.01)
        assert one["model_tflops"] * 1e12 == pytest.approx(
            one["images_per_second"] * model_flops(recipe), rel=0.01, abs=1e8
        )
        assert one["peak_memory_bytes"] > 0
        assert sum(one["kernel_shares"].values()) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(
        found[1]["ratio_to_plain"],
        found[1]["images_per_second"] / found[0]["images_per_second"],
        rtol=0.01,
        atol=0.01,
    )


def test_encoders_and_methods_are_compared_in_one_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(step_times._SIDES, "cpu", 256)
    sizes = ("encoder.img_size=64", "train.zero_stage=1")
    argv = ["--model", "mixmae_vit_nano,mixmae_resnet_nano", "--method", "simmim,mae", "--batch", "1", "--steps", "1"]
    assert step.main([*argv, "--precision", "fp32", *sizes]) == 0
    out = capsys.readouterr().out
    assert "mixmae_resnet_nano by mae is left out: mae drops masked tokens" in out
    rows = [line.split(" | ")[:2] for line in out.splitlines() if line.startswith(("| vit", "| resnet"))]
    assert rows == [
        ["| vit_nano", "simmim, grouped"],
        ["| vit_nano", "mae, grouped"],
        ["| resnet_nano", "simmim, grouped"],
    ]


@pytest.mark.parametrize("options", [["--model", "mixmae_vit_base"], ["--method", "simmim"]])
def test_published_code_is_of_mixmae_on_swin(options: list[str]) -> None:
    with pytest.raises(UsageError, match="plain is MixMAE's on Swin"):
        step.main(["--variant", "plain", *options])


@pytest.mark.parametrize("variant", ["fast", "triton"])
def test_variants_that_cannot_run_are_refused(variant: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU runs them")
    with pytest.raises(UsageError, match=variant):
        step.main(["--variant", variant])


@pytest.mark.distributed
def test_ranks_send_what_is_planned() -> None:
    recipe = tiny_recipe(**{"train.micro_batch": 2, "train.global_batch": 4, "train.zero_stage": 2})
    found = scale.measure(recipe, 2, 1)
    assert found["images_per_second"] > 0
    assert found["planned_bytes"]
    for name, planned in found["planned_bytes"].items():
        assert found["bytes"][name] == pytest.approx(planned, rel=0.02, abs=2000)


def test_gpu_time_is_not_counted_twice() -> None:
    """Torch tells operators, and annotations, the time of the kernels that they started."""

    def event(key: str, device: DeviceType, microseconds: float, is_user_annotation: bool = False) -> SimpleNamespace:
        times = {"self_device_time_total": microseconds, "self_cpu_time_total": 1.0}
        return SimpleNamespace(key=key, device_type=device, count=2, is_user_annotation=is_user_annotation, **times)

    events = [
        event("aten::mm", DeviceType.CPU, 6000),
        event("gemm", DeviceType.CUDA, 6000),
        event("adam", DeviceType.CUDA, 2000),
        event("Optimizer.step", DeviceType.CUDA, 2000, is_user_annotation=True),
    ]
    profiler = SimpleNamespace(key_averages=lambda: events)
    assert kernel_shares(profiler) == {"gemm": 0.75, "adam": 0.25, "other": 0.0}
    assert kernel_table(profiler).splitlines()[0] == "    8.000 ms in 4 calls"


def test_a_gpu_stands_still_where_no_kernel_runs() -> None:
    def event(start: float, end: float, device: DeviceType = DeviceType.CUDA, **more: bool) -> SimpleNamespace:
        return SimpleNamespace(time_range=SimpleNamespace(start=start, end=end), device_type=device, **more)

    events = [
        event(1800, 2000),
        event(0, 900),
        event(100, 1000),  # beside the one before, on another stream
        event(1001, 1500),
        event(1505, 1600),
        event(0, 5000, DeviceType.CPU),
        event(0, 5000, is_user_annotation=True),
    ]
    assert standstill(SimpleNamespace(events=lambda: events), 2) == {
        "busy_seconds": 0.000897,
        "idle_seconds": 0.000103,
        "idle_by_gap": {"under 2 us": 5e-7, "2 to 10 us": 2.5e-6, "10 to 100 us": 0.0, "over 100 us": 1e-4},
        "kernels": 2,
    }
    assert standstill(SimpleNamespace(events=lambda: events[5:]), 2) == {}


def test_a_driver_that_tells_no_clock_ends_no_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> int:
        raise RuntimeError("Not Supported")

    monkeypatch.setattr(torch.cuda, "clock_rate", refuse)
    assert step_times._clock(torch.device("cuda")) is None
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda device: 1980)
    assert step_times._clock(torch.device("cuda")) == 1980


def test_the_clock_is_read_while_the_gpu_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """At rest it rises at once."""
    told: list[str] = []

    def clock_rate(device: torch.device) -> int:
        told.append("clock")
        return 1500

    def profiled(work: Callable[[], object], device: torch.device, kernels_alone: bool) -> SimpleNamespace:
        work()
        return SimpleNamespace(events=list)

    monkeypatch.setattr(torch.cuda, "clock_rate", clock_rate)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: told.append("synchronize"))
    monkeypatch.setattr(step_times, "profiled", profiled)
    assert step_times._under_load(lambda: told.append("step"), torch.device("cuda")) == {"clock_mhz": 1500}
    assert told == [*["step"] * 4, "clock", "synchronize", *["step"] * 4]


def test_each_result_is_written_before_the_next_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is lent for minutes may be gone before the last one."""
    figures = ("step_seconds", "images_per_second", "model_tflops", "share_of_product", "peak_tflops")
    other = {"device": "a GPU", "model": "mixmae_swin_nano", "method": "mixmae", "num_images": 2, "precision": "bf16"}
    unknown: dict[str, Any] = {
        "ratio_to_plain": None,
        "host_seconds": None,
        "batch": 8,
        "peak_memory_bytes": 9,
        "kernel_shares": {},
    }
    found = {**dict.fromkeys(figures, 1.0), **other, **unknown, "variant": "plain", "step_seconds_spread": [1.0, 1.0]}

    def measure(*_: object) -> Iterator[tuple[dict[str, Any], str]]:
        yield found, "9 ms of a kernel"
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(step, "RESULTS", tmp_path)
    kernels = tmp_path / "kernels.txt"
    with pytest.raises(KeyboardInterrupt):
        step.main(["--variant", "plain,grouped", "--json", "--kernels", str(kernels)])
    (file,) = tmp_path.glob("step-*.json")
    assert json.loads(file.read_text()) == [found]
    assert "9 ms of a kernel" in kernels.read_text()


def test_a_gpu_holds_one_variant_at_a_time() -> None:
    """Eight of Swin-H take more than 80 GB; on a CPU they take turns."""
    assert step_times._held_together(["plain", "grouped"], torch.device("cuda")) == [["plain"], ["grouped"]]
    assert step_times._held_together(["plain", "grouped"], HERE) == [["plain", "grouped"]]


def test_a_variant_that_does_not_fit_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(model: Trainable) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nGPU 0 has 80")

    monkeypatch.setitem(step_times._SIDES, "cpu", 256)
    monkeypatch.setitem(VARIANTS, "masked", Variant("", fill, is_published=True))
    recipe = tiny_recipe(**{"train.micro_batch": 2, "train.global_batch": 2})
    assert [one["variant"] for one, _ in step_times.measure(recipe, ["masked", "grouped"], 1, HERE)] == ["grouped"]
    assert "masked          batch 2 does not fit: CUDA out of memory." in capsys.readouterr().out


def test_a_variant_that_cannot_be_measured_ends_neither_others_nor_other_batches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(model: Trainable) -> None:
        raise UsageError("the window kernel does not run")

    monkeypatch.setitem(step_times._SIDES, "cpu", 256)
    monkeypatch.setitem(VARIANTS, "masked", Variant("", refuse, is_published=True))
    sizes = ["encoder.img_size=64", "encoder.embed_dim=32", "encoder.depths=[1,1,1,1]", "encoder.num_heads=[1,1,2,2]"]
    sizes += ["encoder.window_size=[4,4,4,2]", "method.num_images=2", "method.decoder_dim=32", "method.decoder_depth=1"]
    argv = ["--model", "mixmae_swin_nano", "--batch", "2,4", "--variant", "masked,grouped", "--precision", "fp32"]
    with pytest.raises(UsageError, match="the window kernel does not run"):
        step.main([*argv, "--steps", "1", *sizes, "method.decoder_num_heads=2"])
    told = [line for line in capsys.readouterr().out.splitlines() if "left out" in line or "images/s" in line]
    assert [line.split()[0] for line in told] == ["masked", "grouped"] * 2
