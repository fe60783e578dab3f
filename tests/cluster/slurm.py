"""Slurm on the cluster's hosts: daemons, nodes and jobs."""

import re
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.host import Host
from tests.cluster.slurm_files import GPU

CONTROLLER = "^slurmctld"
DAEMON = "^slurmd "
ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
)
"""States of a job that will not run again by itself."""


def start_munge(host: Host) -> None:
    files = {"log-file": host.logs / "munged.log", "pid-file": "/run/munge/munged.pid", "seed-file": "/run/munge/seed"}
    host.run(["mkdir", "--parents", "/run/munge"], check=True)
    options = [f"--{name}={path}" for name, path in files.items()]
    # The default of two threads refuses clients on a busy machine.
    host.run(["munged", "--num-threads=10", *options], check=True)


def set_environment(host: Host, environment: Mapping[str, str]) -> None:
    """Replaces the variables that TaskProlog exports to every task on this host."""
    lines = "".join(f"{name}={value}\n" for name, value in environment.items())
    host.run(["sh", "-c", 'printf %s "$0" > /run/slurm/environment', lines], check=True)


@dataclass(frozen=True)
class Slurm:
    """Slurm of a running cluster; its commands run on the login host."""

    login: Host
    nodes: Sequence[Host]
    slots: int

    def start(self) -> None:
        """Starts all daemons of a new cluster."""
        self.login.run(["mkdir", "/run/slurm"], check=True)
        self.start_controller()
        for node in self.nodes:
            node.run(["mkdir", "/run/slurm"], check=True)
            for number in range(self.slots):  # a copy of /dev/null: Slurm needs a device file, nothing opens it
                node.run(["mknod", f"{GPU}{number}", "c", "1", "3"], check=True)
            self.start_daemon(node)

    def start_controller(self) -> None:
        self.login.run(["slurmctld"], check=True)

    def stop_controller(self, sig: int = signal.SIGTERM) -> None:
        """Stops slurmctld. With SIGKILL it loses the state of the last seconds, including jobs submitted in them."""
        self.login.kill(CONTROLLER, sig)
        self.login.wait_until_exited(CONTROLLER)

    def restart_controller(self) -> None:
        """Restarts slurmctld from its saved state; returns when it answers."""
        self.stop_controller()
        self.start_controller()
        self._until(lambda: self.login.run(["scontrol", "ping"]).returncode == 0, 30, "slurmctld does not answer")

    def start_daemon(self, node: Host) -> None:
        node.run(["slurmd", "-N", node.name], check=True)

    def stop_daemon(self, node: Host, sig: int = signal.SIGTERM) -> None:
        """Stops slurmd; its job steps keep running."""
        node.kill(DAEMON, sig)
        node.wait_until_exited(DAEMON)

    def restart_daemon(self, node: Host) -> None:
        """Makes the node register at once; one that was unreachable may otherwise stay down for minutes."""
        self.stop_daemon(node)
        self.start_daemon(node)

    def repair(self) -> None:
        """Cancels all jobs, starts missing daemons, and resumes nodes that are down, drained or unreachable."""
        if not self.login.processes(CONTROLLER):
            self.restart_controller()
        self.cancel_all()
        for node in self.nodes:
            state = self.node_state(node)
            if re.search("DOWN|DRAIN|FAIL", state):
                self.resume(node)
            if "NOT_RESPONDING" in state or not node.processes(DAEMON):
                self.restart_daemon(node)

    def sbatch(self, script: Path, *options: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> int:
        """Submits a batch script; returns the job id."""
        done = self.login.run(["sbatch", "--parsable", *options, script], env, cwd, check=True)
        return int(done.stdout.split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """Fields of `scontrol show job`: JobState, Restarts, ExitCode, BatchHost, NodeList, StdOut ..."""
        return _fields(self.login.run(["scontrol", "--oneliner", "show", "job", str(job)], check=True).stdout)

    def state(self, job: int) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, ..."""
        return self.job(job)["JobState"]

    def exit_code(self, job: int) -> int:
        """The batch script's exit code; 128 + N where signal N ended it."""
        code, by_signal = map(int, self.job(job)["ExitCode"].split(":"))
        return 128 + by_signal if by_signal else code

    def wait(self, job: int, states: Iterable[str] = ENDED, timeout: float = 200) -> str:
        """Waits until the job is in one of `states`; returns which.

        Raises:
            TimeoutError: after `timeout` seconds, or at once if it ended in another state; with Slurm's record of
                the job and its output.
        """
        wanted = {states} if isinstance(states, str) else set(states)
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in wanted:
            if state in ENDED or time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {state}, not {sorted(wanted)}: {self.job(job)}\n{self.log(job)}")
            time.sleep(0.2)
        return state

    def log(self, job: int) -> str:
        """Output of the job's batch script and steps so far; empty before it starts."""
        path = Path(self.job(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def wait_for_log(self, job: int, text: str, timeout: float = 200) -> str:
        """Waits until the job's output contains `text`; returns the output. Raises TimeoutError with the output."""
        deadline = time.monotonic() + timeout
        while text not in (log := self.log(job)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {text!r} after {timeout} s in the output of job {job}: {self.job(job)}\n{log}")
            time.sleep(0.1)
        return log

    def requeue(self, job: int) -> None:
        self._scontrol("requeue", str(job))

    def cancel(self, job: int, *options: str) -> None:
        """scancel; `options` such as --signal=USR1, --batch."""
        self.login.run(["scancel", *options, str(job)], check=True)

    def cancel_all(self) -> None:
        self.login.run(["scancel", "--user=root"], check=True)

    def drain(self, node: Host, reason: str = "drained by a test") -> None:
        """Drains the node: it gets no new jobs, running ones continue."""
        self._scontrol("update", f"NodeName={node.name}", "State=DRAIN", f"Reason={reason}")

    def down(self, node: Host, reason: str = "down by a test") -> None:
        """Sets the node down: its jobs fail, or are requeued if they allow it."""
        self._scontrol("update", f"NodeName={node.name}", "State=DOWN", f"Reason={reason}")

    def resume(self, node: Host) -> None:
        """Resumes a drained or down node."""
        self._scontrol("update", f"NodeName={node.name}", "State=RESUME")

    def node_state(self, node: Host) -> str:
        """IDLE, MIXED, ALLOCATED, DOWN ...; with + and flags, such as IDLE+DRAIN; * while it does not answer."""
        return _fields(self._scontrol("--oneliner", "show", "node", node.name))["State"]

    def wait_until_idle(self, timeout: float = 200) -> None:
        """Waits until every node is idle and answers."""

        def idle() -> bool:
            return all(self.node_state(node) == "IDLE" for node in self.nodes)

        self._until(idle, timeout, "not all nodes are idle")

    def _until(self, condition: Callable[[], bool], timeout: float, problem: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                sinfo = self.login.run(["sinfo", "--Node", "--long"])
                raise TimeoutError(f"{problem} after {timeout} s:\n{sinfo.stdout}{sinfo.stderr}")
            time.sleep(0.1)

    def _scontrol(self, *arguments: str) -> str:
        return self.login.run(["scontrol", *arguments], check=True).stdout


def _fields(line: str) -> dict[str, str]:
    """Fields of a line of scontrol, NAME=VALUE NAME=VALUE ...; values may contain spaces."""
    return dict(re.findall(r"(\S+?)=(.*?)(?=\s+\S+?=|\s*$)", line))
