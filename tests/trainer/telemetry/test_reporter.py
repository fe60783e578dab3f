"""The record of a run, and what a full disk does to it."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixmae.base.run_directory import EVENTS
from mixmae.trainer.run.run_directory import Events, read_events
from mixmae.trainer.telemetry.reporter import Reporter


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Files cannot grow beyond so many bytes: the system refuses, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


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
def test_a_full_disk_costs_the_record_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(tmp_path, 0, 60)
    for step in range(1, 61):
        with full_disk(2000 if 20 < step <= 40 else resource.RLIM_INFINITY):
            reporter.scalars(step, 8 * step, values(step))
            if step in (10, 30, 50):
                reporter.picture(step, Image.effect_noise((200, 200), 50).convert("RGB"))
                with suppress(OSError):  # as its thread does every two minutes, which tells nobody
                    cast(Any, reporter.board._writer).flush()
    reporter.close()
    told = [line for line in capsys.readouterr().out.splitlines() if "has a gap here" in line]
    assert sorted(Path(line.split()[0]).name for line in told) == [EVENTS, "pictures", "tensorboard"]
    steps = [event["step"] for event in read_events(tmp_path, "step")]
    assert set(range(1, 21)) | set(range(41, 61)) <= set(steps)
    assert not set(range(30, 41)) & set(steps)
    assert [event["step"] for event in read_events(tmp_path, "picture")] == [10, 50]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {1, 10, 50, 60} <= {scalar.step for scalar in board.Scalars("train/loss")}
