"""The launching process: what it says of a start that it had to end itself."""

import sys
from collections.abc import Mapping
from pathlib import Path

from mixmae.base.exit_codes import FAILED
from mixmae.base.ports import free_port
from mixmae.launch.backends.job_spec import Attempt, Command
from mixmae.launch.supervision.launcher import run_attempt

ONE_HOST_DOWN = """
import signal, sys, time
from pathlib import Path
from mixmae.base.exit_codes import PREEMPTED
from mixmae.launch.supervision.outcome import Outcome, write_outcome

def stop(*_):
    write_outcome(Path(sys.argv[1]), Outcome(PREEMPTED, "stopped by SIGTERM to rank 0 on node1"))
    raise SystemExit(PREEMPTED)

signal.signal(signal.SIGTERM, stop)
print("pdsh@login: node2: ssh exited with exit code 255", flush=True)
time.sleep(600)
"""
"""Rank 0 on node1, to which nobody has connected yet, with the output of pdsh."""


class Hosts:
    address = "127.0.0.1"

    def distribute(self, files: Mapping[Path, str]) -> None:
        pass

    def kill_leftovers(self, attempt: Attempt) -> None:
        pass


def test_ranks_that_are_ended_for_a_host_that_is_down_do_not_change_the_reason(tmp_path: Path) -> None:
    attempt = Attempt("20300101T000000Z", free_port(), "secret")
    command = Command([sys.executable, "-c", ONE_HOST_DOWN, str(attempt.folder(tmp_path))], {})
    outcome = run_attempt(command, Hosts(), attempt, tmp_path, show=False)
    assert outcome.code == FAILED
    assert outcome.reason.startswith("host node2: ssh ended with exit code 255 before its ranks joined")
