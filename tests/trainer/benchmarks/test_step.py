from types import SimpleNamespace

import pytest
import torch
from torch._C._autograd import DeviceType

from mixmae.base.errors import UsageError
from mixmae.trainer.benchmarks import scale, step
from mixmae.trainer.benchmarks.profiling import kernel_shares, kernel_table
from mixmae.trainer.tasks.flops import model_flops
from tests.helpers import tiny_recipe

HERE = torch.device("cpu")


def test_measurements_are_consistent() -> None:
    recipe = tiny_recipe(**{"train.micro_batch": 4, "train.global_batch": 4})
    found = [one for one, _ in step.measure(recipe, ["plain", "grouped"], 2, HERE)]
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
    monkeypatch.setitem(step._SIDES, "cpu", 256)
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
