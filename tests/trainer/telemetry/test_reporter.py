"""The record of a run, and what a full disk does to it."""

import json
import logging
import math
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixmae.base.run_directory import EVENTS
from mixmae.trainer.telemetry.events import Events, read_events
from mixmae.trainer.telemetry.reporter import Reporter
from mixmae.trainer.telemetry.wandb_tracker import Tracker
from tests.base.test_files import full_disk


def values(step: int) -> dict[str, float]:
    return {"loss": 1 / step, "images_per_second": 10.0}


@pytest.mark.parametrize("left", [0, 1, 40])
def test_a_line_that_did_not_fit_harms_no_other(tmp_path: Path, left: int) -> None:
    events = Events(tmp_path)
    events.write("step", step=1)
    with full_disk((tmp_path / EVENTS).stat().st_size + left):
        for step in (2, 3):
            with pytest.raises(OSError, match=r"No space|File too large"):
                events.write("step", step=step)
    events.write("step", step=4)
    events.close()
    assert [event["step"] for event in read_events(tmp_path, "step")] == [1, 4]
    lines = (tmp_path / EVENTS).read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_a_full_disk_costs_the_record_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reporter = Reporter(tmp_path, 0, 60)
    for step in range(1, 61):
        with full_disk(2000) if 20 < step <= 40 else nullcontext():
            reporter.scalars(step, 8 * step, values(step))
            if step in (10, 30, 50):
                reporter.picture(step, Image.effect_noise((200, 200), 50).convert("RGB"))
                with suppress(OSError):  # as its thread does every two minutes, which tells nobody
                    cast(Any, reporter.board._writer).flush()
    reporter.close()
    told = [line for line in caplog.messages if "has a gap here" in line]
    assert sorted(Path(line.split()[0]).name for line in told) == [EVENTS, "pictures", "tensorboard"]
    steps = [event["step"] for event in read_events(tmp_path, "step")]
    assert set(range(1, 21)) | set(range(41, 61)) <= set(steps)
    assert not set(range(30, 41)) & set(steps)
    assert [event["step"] for event in read_events(tmp_path, "picture")] == [10, 50]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {1, 10, 50, 60} <= {scalar.step for scalar in board.Scalars("train/loss")}


class Monitor:
    """In place of DeepSpeed's, which hands numbers on to Weights & Biases."""

    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        self.written += events


def test_an_evaluation_is_recorded_everywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = Monitor()
    reporter = Reporter(tmp_path, 0, 60, Tracker(monitor))
    with caplog.at_level(logging.INFO):
        reporter.evaluation(5, 40, {"top1": 0.7125, "loss": math.nan})
        reporter.evaluation(10, 80, {"top1": 0.75, "loss": 1.5})
    reporter.events.close()
    reporter.board.close()
    first, last = read_events(tmp_path, "evaluation")
    assert first["metrics"] == {"top1": 0.7125, "loss": None}
    assert (last["step"], last["samples"], last["metrics"]) == (10, 80, {"top1": 0.75, "loss": 1.5})
    assert caplog.messages[1] == last["message"] == "evaluation at step 10  top1 0.75  loss 1.5000"
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(scalar.step, scalar.value) for scalar in board.Scalars("eval/top1")] == [
        (5, pytest.approx(0.7125)),
        (10, 0.75),
    ]
    assert monitor.written[2:] == [("eval/top1", 0.75, 80), ("eval/loss", 1.5, 80)]


def test_an_error_is_recorded_and_left_to_whoever_ends_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reporter = Reporter(tmp_path, 0, 60)
    with caplog.at_level(logging.INFO):
        reporter.event("skipped", "step 3: loss not finite", step=3)
        reporter.event("failed", "step 4: no room", step=4)
        reporter.event("end", "finished", step=4)
    reporter.close()
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "step 3: loss not finite"),
        ("INFO", "finished"),
    ]
    assert [event["message"] for event in read_events(tmp_path, "failed")] == ["step 4: no room"]
