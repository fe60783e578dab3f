"""What a rank logs is shown as the environment says, and what asks nothing of a user is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixmae.base.logs import FILE, LEVEL

PROGRAM = """
import logging
from mixmae.base.errors import run_cli
from mixmae.base.logs import set_up_logging

def main(argv):
    set_up_logging()
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.setLevel(logging.INFO)
    logger = logging.getLogger("mixmae.trainer.telemetry.reporter")
    logger.debug("details")
    logger.info("step 1/8")
    logger.warning("no metrics are exported")
    deepspeed.info("about itself")
    deepspeed.warning("overflow")
    return 0

raise SystemExit(run_cli(main, []))
"""


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in (LEVEL, FILE, "RANK")} | environment
    return subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False)


def test_progress_is_shown_as_it_is_and_warnings_as_such() -> None:
    done = run()
    expected = ["step 1/8", "mixmae: warning: no metrics are exported", "mixmae: warning: overflow"]
    assert (done.stdout.splitlines(), done.stderr) == (expected, "")


def test_other_ranks_say_which_they_are() -> None:
    assert "mixmae: warning: rank 3: overflow" in run(RANK="3").stdout.splitlines()


@pytest.mark.parametrize(("level", "lines"), [("DEBUG", 5), ("info", 3), ("WARNING", 2), ("ERROR", 1)])
def test_more_or_less_is_shown(level: str, lines: int) -> None:
    assert len(run(MIXMAE_LOG_LEVEL=level).stdout.splitlines()) == lines


def test_a_file_has_everything_with_its_time(tmp_path: Path) -> None:
    run(MIXMAE_LOG_FILE=str(tmp_path / "rank-{rank}.log"), RANK="2")
    first, *_ = (tmp_path / "rank-2.log").read_text().splitlines()
    assert first.endswith(" INFO mixmae.trainer.telemetry.reporter: step 1/8")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (LEVEL, "loud", "MIXMAE_LOG_LEVEL=loud: expected one of DEBUG, INFO, WARNING, ERROR"),
        (FILE, "/nowhere/log", "MIXMAE_LOG_FILE=/nowhere/log cannot be written: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(name: str, value: str, expected: str) -> None:
    done = run(**{name: value})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"mixmae: error: {expected}")
    assert done.stderr.count("\n") == 1
