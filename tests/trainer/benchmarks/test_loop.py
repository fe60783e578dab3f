import json
from pathlib import Path

import pytest

from mixmae.base.errors import run_cli
from mixmae.trainer.benchmarks.cli import main
from tests.warm import run_module

SIZES = ["embed_dim=8", "depths=[1,1,1,1]", "num_heads=[1,1,2,2]", "window_size=[4,4,4,2]"]
DECODER = ["dim=16", "depth=1", "num_heads=2"]
TINY = [
    *("encoder.img_size=64", "method.num_images=2", "log.every=3"),
    *(f"encoder.{size}" for size in SIZES),
    *(f"method.decoder_{size}" for size in DECODER),
]


@pytest.mark.distributed
def test_the_loop_is_compared_with_the_bare_step(tmp_path: Path) -> None:
    """As a process of its own: it joins a process group, and takes signals for itself."""
    out = tmp_path / "out.json"
    options = [*TINY, "--batch", "4", "--rounds", "2", "--json", str(out)]
    done = run_module("mixmae.launch.cli", "bench", "loop", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert (result["rounds"], result["log_every"], result["batch"]) == (2, 3, 4)
    assert result["step_ms_bare"] > 0
    assert result["step_ms_loop"] > 0
    low, high = result["added_us_spread"]
    assert low <= result["added_us"] <= high
    assert result["ratio"] == pytest.approx(1 + result["added_us"] / 1000 / result["step_ms_bare"], abs=1e-4)
    assert result["share_of_100_ms"] == pytest.approx(result["added_us"] / 100_000, abs=1e-5)
    assert f"{result['step_ms_bare']:.2f} ms, in the loop" in done.stdout
    assert "step 3/" not in done.stdout  # what the run says is not the benchmark's to say
    assert {"versions", "commit", "cores"} <= set(result)


def test_zero_rounds_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(main, ["loop", "--rounds", "0"]) == 2
    assert "--rounds 0" in capsys.readouterr().err
