"""The doctor's ranks, started as those of training are, and what they found."""

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mixmae.base.exit_codes import FAILED, FINISHED
from mixmae.base.run_directory import LOGS
from mixmae.launch.backends import slurm
from mixmae.launch.backends.hostfile import OnHosts
from mixmae.launch.backends.job import Job, new_attempt
from mixmae.launch.backends.site import Site
from mixmae.launch.supervision.attempt import LOG, run_attempt
from mixmae.launch.supervision.outcome import Outcome, read_outcome
from mixmae.launch.supervision.run import Way
from mixmae.trainer.doctor.protocol.findings import Finding, Level, finding_of
from mixmae.trainer.doctor.protocol.folders import temporary_folder
from mixmae.trainer.recipe.schema import Launch

MODULE = "mixmae.trainer.doctor"
_PREFIX = "mixmae-doctor-"
_ERROR = re.compile(r"[A-Za-z_.]+(?:Error|Exception)\b")
_POLL_SECONDS = 1.0
_OUTPUT_SECONDS = 10.0
"""In which a job's output shows up here after its end."""
_CONTROLLER_SECONDS = 60.0


def on_ranks(way: Way, arguments: Sequence[str], settings: Launch) -> list[Finding]:
    """What ranks here or on hosts find; their output goes nowhere else."""
    with _scratch(way) as folder:
        job = Job(MODULE, (*arguments, "--jsonl"), folder, settings)
        attempt = new_attempt(job)
        outcome = run_attempt(way.command(job, attempt, os.environ), way, attempt, folder, show=False)
        output = (attempt.folder(folder) / LOG).read_text(errors="replace")
    found = findings_in(output)
    hosts = way.hosts.slots if isinstance(way, OnHosts) else ()
    return [*found, *trouble_of(outcome, found, output, hosts)]


@contextmanager
def _scratch(way: Way) -> Iterator[Path]:
    """A folder for records, here and under the same name on every host, for as long as they are needed."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(way, OnHosts):
            way.everywhere(f"rm -rf {shlex.quote(str(folder))}")


def under_slurm(
    request: slurm.Request, site: Site, base: Path, arguments: Sequence[str], settings: Launch
) -> list[Finding]:
    """What the ranks of a batch job find; waits until it has run.

    Args:
        base: a folder on a file system that this host and the nodes share.

    Raises:
        UsageError: Slurm refuses the job.
    """
    folder = (base / f".{_PREFIX}{secrets.token_hex(4)}").absolute()
    job = Job(MODULE, (*arguments, "--jsonl"), folder, settings)
    with ExitStack() as stack:
        try:
            stack.enter_context(temporary_folder(base))
            folder.mkdir()
        except OSError as error:
            return [_unusable(base, error)]
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        number = slurm.submit(slurm.slurm_script(job, request, site, 0), job, None)
        _wait_for(number)
        output = _read_output(folder / LOGS / f"slurm-{number}.out")
        outcome = _outcome_in(folder / LOGS, number)
    if output is None:
        return [_without_output(number, base)]
    found = findings_in(output)
    return [*found, *trouble_of(outcome, found, output, ())]


def _unusable(base: Path, error: OSError) -> Finding:
    advice = "make room, or name a run_dir that can be written from here and from the nodes"
    return Finding(Level.ERROR, "run directory", "here", f"{base}: {error.strerror}", "to write there", advice)


def _wait_for(number: str) -> None:
    """Returns when a job has ended; whoever interrupts the wait cancels it."""
    print(f"mixmae: job {number} is submitted; waiting for its end", file=sys.stderr, flush=True)
    answered = time.monotonic()
    try:
        while time.monotonic() - answered < _CONTROLLER_SECONDS:
            ask = ["squeue", "--noheader", f"--jobs={number}", "--format=%T"]
            done = subprocess.run(ask, capture_output=True, text=True, check=False)
            if "Invalid job id" in done.stderr or (done.returncode == 0 and not done.stdout.strip()):
                return
            if done.returncode == 0:
                answered = time.monotonic()
            time.sleep(_POLL_SECONDS)
    except BaseException:
        subprocess.run(["scancel", number], capture_output=True, check=False)
        raise


def _read_output(file: Path) -> str | None:
    deadline = time.monotonic() + _OUTPUT_SECONDS
    while not file.is_file() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return file.read_text(errors="replace") if file.is_file() else None


def _outcome_in(logs: Path, number: str) -> Outcome:
    found = [outcome for folder in logs.iterdir() if folder.is_dir() and (outcome := read_outcome(folder)) is not None]
    return found[-1] if found else Outcome(FAILED, f"job {number} ended before its ranks reported")


def _without_output(number: str, base: Path) -> Finding:
    found, expected = "ended without output that is seen here", f"{base} to be one directory here and on all nodes"
    advice = f"name a run_dir on a file system that they share, and look at 'sacct -j {number}'"
    return Finding(Level.ERROR, "job", f"job {number}", found, expected, advice)


def findings_in(output: str) -> list[Finding]:
    """The findings among a job's output; hosts' names may stand before them."""
    found = []
    for line in output.splitlines():
        _, brace, rest = line.partition('{"level"')
        try:
            found.append(finding_of(json.loads(brace + rest)))
        except (ValueError, KeyError, TypeError):  # something else that a rank or a launcher wrote
            continue
    return found


def trouble_of(outcome: Outcome, found: Sequence[Finding], output: str, hosts: Collection[str]) -> Iterator[Finding]:
    """How the job itself went wrong, where that is more than what it found."""
    told = any(finding.level is Level.ERROR for finding in found)
    if outcome.code == FINISHED or (told and outcome.rank in (None, 0)):
        return
    host, error = telling_line(outcome.lines or output.splitlines(), hosts)
    reason = outcome.reason.partition("; its output")[0]  # which is gone with the folder that it names
    advice = "mend what it says: 'mixmae launch' would end the same way"
    where = outcome.host or host or "ranks"
    yield Finding(Level.ERROR, "job", where, ": ".join(filter(None, [reason, error])), "to reach its end", advice)


def telling_line(lines: Sequence[str], hosts: Collection[str]) -> tuple[str, str]:
    """Of an output the line that says what went wrong, and the host whose name pdsh put before it."""
    written = [_without_host(line, hosts) for line in lines if line.strip()]
    errors = [(host, text) for host, text in written if _ERROR.match(text)]
    return [("", ""), *written[-1:], *errors[-1:]][-1]


def _without_host(line: str, hosts: Collection[str]) -> tuple[str, str]:
    host, colon, text = line.strip().partition(": ")
    return (host, text) if colon and host in hosts else ("", line.strip())
