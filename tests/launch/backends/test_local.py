"""Runs on this machine under DeepSpeed's launcher, with fake ranks: restarts, and two runs at once."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mixmae.base.errors import UsageError
from mixmae.base.exit_codes import FAILED, FINISHED
from mixmae.launch.backends.job_spec import Attempt, Command
from mixmae.launch.backends.local import LocalBackend
from mixmae.launch.supervision.launcher import run_attempt
from mixmae.launch.supervision.restarts import read_restarts
from tests.helpers import ROOT
from tests.launch.ranks import FAKE_RANK

START = """
import sys
from pathlib import Path
from mixmae.launch.backends.job_spec import JobSpec
from mixmae.launch.backends.local import LocalBackend
from mixmae.launch.supervision.restart_loop import run_with_restarts
from mixmae.trainer.recipe.sections.launch import Launch
module, run_dir, port, restarts, *settings = sys.argv[1:]
job = JobSpec(module, (f"run_dir={run_dir}", *settings), Path(run_dir), Launch(port=int(port)))
sys.exit(run_with_restarts(job, LocalBackend(2), int(restarts)))
"""


def start(run_dir: Path, *settings: str, port: int, restarts: int = 0) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", START, FAKE_RANK, str(run_dir), str(port), str(restarts), *settings]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.distributed
def test_two_runs_share_a_machine_and_its_ports(tmp_path: Path) -> None:
    runs = [start(tmp_path / name, "steps=40", port=23000) for name in ("a", "b")]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [FINISHED, FINISHED], outputs
    assert len({port for output in outputs for port in re.findall(r"from step 0, port (\d+)", output)}) == 2


@pytest.mark.distributed
def test_a_failed_run_starts_again_while_it_gets_on(tmp_path: Path) -> None:
    run = start(tmp_path, "steps=20", "at=7", "rank=1", "how=kill", port=23100, restarts=1)
    output = run.communicate()[0]
    assert run.returncode == FAILED, output
    # It gets to step 5 and fails at 8 each time: one restart with progress, then none without.
    assert "mixmae: restarting from step 5" in output
    assert output.splitlines()[-1] == (
        "mixmae: not restarted: 1 restart without progress; the newest checkpoint is still step 5"
    )
    (record,) = read_restarts(tmp_path)
    assert (record["step"], record["rank"], record["signal"]) == (5, 1, "SIGKILL")


def test_of_two_launches_of_a_run_in_one_second_the_later_is_refused(tmp_path: Path) -> None:
    attempt = Attempt("20300101T000000Z", 23200, "secret")
    attempt.folder(tmp_path).mkdir(parents=True)
    with pytest.raises(UsageError, match="is being started by another launch"):
        run_attempt(Command(["false"], {}), LocalBackend(1), attempt, tmp_path)
