"""A logged step fits a terminal and is read without a calculator."""

import math

import pytest

from mixmae.trainer.telemetry.progress import Progress

VALUES = {
    "loss": 0.83124,
    "lr": 1.2345e-4,
    "grad_norm": 0.4119,
    "epoch": 3.25,
    "images_per_second": 812.4,
    "skipped_steps": 0,
    "replaced_samples": 0.0,
    "retried_reads": 0.0,
    "peak_memory_bytes": 1.34e9,
}


def line(step: int, **changes: float) -> str:
    """Of the logged step after step 1, which came 11 s after the start; one step took 1 s."""
    now = 0.0
    progress = Progress(1250, lambda: now)
    now = 11.0
    progress.line(1, VALUES)
    now += step - 1
    return progress.line(step, VALUES | changes)


def test_a_line_of_a_step() -> None:
    expected = (
        "step 150/1250  loss 0.8312  lr 1.2e-04  grad_norm 0.412  812 images/s  peak_memory 1.3 GB"
        "  0:02:40 elapsed  0:18:20 left"
    )
    assert line(150) == expected
    assert len(expected) <= 120


def test_no_time_is_left_where_it_is_not_known_or_over() -> None:
    assert Progress(8, lambda: 0.0).line(1, {"loss": 1.0}) == "step 1/8  loss 1.0000  0:00:00 elapsed"
    assert line(1250).endswith("  0:21:00 elapsed")


def test_long_runs_are_told_in_days() -> None:
    now = 0.0
    progress = Progress(1_000_000, lambda: now)
    progress.line(1, {})
    now = 86_400.0
    assert progress.line(1001, {}) == "step 1001/1000000  1 day, 0:00:00 elapsed  998 days, 23:58:34 left"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("loss", math.nan, "loss nan"),
        ("loss", 2e-5, "loss 2e-05"),
        ("loss", 12.3456789, "loss 12.3457"),
        ("grad_norm", 12345.6, "grad_norm 12346"),
        ("grad_norm", 0.03817, "grad_norm 0.0382"),
        ("grad_norm", math.inf, "grad_norm inf"),
        ("images_per_second", 1.018, "1 images/s"),
        ("images_per_second", 12.49, "12 images/s"),
        ("images_per_second", 0.0, "0 images/s"),
        ("peak_memory_bytes", 8.1e8, "peak_memory 810 MB"),
        ("peak_memory_bytes", 7.92e10, "peak_memory 79.2 GB"),
        ("skipped_steps", 3, "skipped_steps 3"),
        ("replaced_samples", 2.0, "replaced_samples 2"),
        ("retried_reads", 12345.0, "retried_reads 12345"),
        ("accuracy", 0.71234, "accuracy 0.712"),
    ],
)
def test_numbers(name: str, value: float, expected: str) -> None:
    assert f"  {expected}  " in line(150, **{name: value})
