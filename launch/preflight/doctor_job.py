"""Starts the doctor's ranks in the same way as those of training, and collects their findings."""

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
from mixmae.base.json_text import parse_json
from mixmae.base.run_directory import LOGS
from mixmae.launch.backends.hostfile import HostfileBackend
from mixmae.launch.backends.job_spec import JobSpec, new_attempt
from mixmae.launch.backends.site import Site
from mixmae.launch.backends.slurm_script import SlurmRequest, slurm_script, submit
from mixmae.launch.supervision.launcher import LOG, run_attempt
from mixmae.launch.supervision.outcome import Outcome, read_outcome
from mixmae.launch.supervision.restart_loop import Backend
from mixmae.trainer.doctor.protocol.findings import Finding, Level, finding_of
from mixmae.trainer.doctor.protocol.folders import temporary_folder
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.launch import Launch

MODULE = "mixmae.trainer.doctor"
_PREFIX = "mixmae-doctor-"
_RECIPE = "recipe.yaml"
_ERROR = re.compile(r"[A-Za-z_.]+(?:Error|Exception)\b")
_POLL_SECONDS = 1.0
_OUTPUT_SECONDS = 10.0
"""How long a job's output may take to be seen here after its end."""
_CONTROLLER_SECONDS = 60.0


def run_doctor(backend: Backend, recipe: Recipe | None, arguments: Sequence[str]) -> list[Finding]:
    """The findings of ranks on this machine or on hosts.

    Args:
        recipe: None to check hosts and network alone. Ranks read it from a file: a URL in it may hold credentials.
        arguments: of the doctor, behind the recipe.
    """
    with _scratch(backend) as folder:
        private = {folder / _RECIPE: recipe.to_yaml()} if recipe is not None else {}
        settings = recipe.launch if recipe is not None else Launch()
        job = JobSpec(MODULE, (*map(str, private), *arguments, "--jsonl"), folder, settings, private)
        attempt = new_attempt(job)
        outcome = run_attempt(backend.command(job, attempt, os.environ), backend, attempt, folder, show=False)
        output = (attempt.folder(folder) / LOG).read_text(errors="replace")
    found = findings_in(output)
    hosts = backend.hosts.slots if isinstance(backend, HostfileBackend) else ()
    return [*found, *job_findings(outcome, found, output, hosts)]


@contextmanager
def _scratch(backend: Backend) -> Iterator[Path]:
    """A temporary folder for records, here and under the same name on every host."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(backend, HostfileBackend):
            backend.run_on_all_hosts(f"rm -rf {shlex.quote(str(folder))}")


def run_doctor_under_slurm(
    request: SlurmRequest, site: Site, base: Path, recipe: Recipe | None, arguments: Sequence[str]
) -> list[Finding]:
    """The findings of the ranks of a batch job; waits until it has run.

    Args:
        base: a folder on a file system that this host and the nodes share.
        recipe, arguments: as `run_doctor`'s.

    Raises:
        UsageError: Slurm refuses the job.
    """
    folder = (base / f".{_PREFIX}{secrets.token_hex(4)}").absolute()
    private = [str(folder / _RECIPE)] if recipe is not None else []
    settings = recipe.launch if recipe is not None else Launch()
    job = JobSpec(MODULE, (*private, *arguments, "--jsonl"), folder, settings)
    with ExitStack() as stack:
        try:
            stack.enter_context(temporary_folder(base))
            folder.mkdir(mode=0o700)
            if recipe is not None:
                (folder / _RECIPE).write_text(recipe.to_yaml())
        except OSError as error:
            return [_unusable(base, error)]
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        number = submit(slurm_script(job, request, site, 0), job, None)
        _wait_for(number)
        output = _read_output(folder / LOGS / f"slurm-{number}.out")
        outcome = _outcome_in(folder / LOGS, number)
    if output is None:
        return [_without_output(number, base)]
    found = findings_in(output)
    return [*found, *job_findings(outcome, found, output, ())]


def _unusable(base: Path, error: OSError) -> Finding:
    advice = "free some space, or name a run_dir that can be written from here and from the nodes"
    return Finding(Level.ERROR, "run directory", "here", f"{base}: {error.strerror}", "to write there", advice)


def _wait_for(number: str) -> None:
    """Returns when a job has ended; an interrupt cancels it."""
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
    found, expected = "ended without output that can be seen here", f"{base} to be one directory here and on all nodes"
    advice = f"name a run_dir on a file system that they share, and check 'sacct -j {number}'"
    return Finding(Level.ERROR, "job", f"job {number}", found, expected, advice)


def findings_in(output: str) -> list[Finding]:
    """The findings in a job's output, where hosts' names may precede them."""
    found = []
    for line in output.splitlines():
        _, brace, rest = line.partition('{"level"')
        try:
            found.append(finding_of(parse_json(brace + rest)))
        except (ValueError, KeyError, TypeError):  # other output of a rank or a launcher
            continue
    return found


def job_findings(outcome: Outcome, found: Sequence[Finding], output: str, hosts: Collection[str]) -> Iterator[Finding]:
    """How the job itself failed, unless its findings say so already."""
    told = any(finding.level is Level.ERROR for finding in found)
    if outcome.code == FINISHED or (told and outcome.rank in (None, 0)):
        return
    host, error = find_error_line(outcome.lines or output.splitlines(), hosts)
    reason = outcome.reason.partition("; its output")[0]  # that folder is gone
    advice = "fix what it says: 'mixmae launch' would fail too"
    where = outcome.host or host or "ranks"
    yield Finding(Level.ERROR, "job", where, ": ".join(filter(None, [reason, error])), "to reach its end", advice)


def find_error_line(lines: Sequence[str], hosts: Collection[str]) -> tuple[str, str]:
    """The line of an output that says what failed, and the host that pdsh names before it."""
    written = [_without_host(line, hosts) for line in lines if line.strip()]
    errors = [(host, text) for host, text in written if _ERROR.match(text)]
    return [("", ""), *written[-1:], *errors[-1:]][-1]


def _without_host(line: str, hosts: Collection[str]) -> tuple[str, str]:
    host, colon, text = line.strip().partition(": ")
    return (host, text) if colon and host in hosts else ("", line.strip())
