"""Preflight checks: from here, then, if nothing is wrong so far, by a short job on all ranks."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mixmae.base.exit_codes import FINISHED
from mixmae.launch.backends.hostfile import HostfileBackend, require_pdsh
from mixmae.launch.backends.site import Site
from mixmae.launch.backends.slurm_script import SlurmRequest
from mixmae.launch.preflight.doctor_job import run_doctor, run_doctor_under_slurm
from mixmae.launch.preflight.login_checks import check_batch, check_hosts, check_names, check_slurm
from mixmae.launch.supervision.restart_loop import Backend
from mixmae.trainer.doctor.protocol.findings import Finding, Level, exit_code, print_findings
from mixmae.trainer.recipe.schema import Recipe

_NOT_STARTED = Finding(
    Level.NOTE, "ranks", "", "not started, so nothing else was checked", advice="fix the errors, and check again"
)


@dataclass(frozen=True)
class DoctorOptions:
    """What is checked.

    Attributes:
        recipe: None to check hosts and network alone.
        short: only checks that take a few seconds.
        link: bandwidth that the network should reach, as on the command line.
    """

    recipe: Recipe | None
    short: bool = False
    link: str | None = None

    @property
    def arguments(self) -> list[str]:
        """The arguments of `mixmae.trainer.doctor`, behind the recipe."""
        link = ["--link", self.link] if self.link is not None else []
        return [*(["--short"] if self.short else []), *link]

    def batch(self, ranks: int) -> list[Finding]:
        return list(check_batch(self.recipe, ranks)) if self.recipe is not None else []


def is_ready(findings: Iterable[Finding]) -> bool:
    """Whether ranks may be started for further checks."""
    return exit_code(findings) == FINISHED


def check_backend(backend: Backend, options: DoctorOptions) -> list[Finding]:
    """Checks ranks on this machine or on hosts; starts them only if all is well so far.

    Raises:
        UsageError: pdsh is missing, or the backend cannot start the ranks.
    """
    found = options.batch(backend.ranks)
    if isinstance(backend, HostfileBackend):
        require_pdsh()
        found += check_names(backend.hosts)
        if is_ready(found):
            found += check_hosts(backend.hosts, backend.ssh_port)
    if not is_ready(found):
        return [*found, _NOT_STARTED]
    return [*found, *run_doctor(backend, options.recipe, options.arguments)]


def check_slurm_job(request: SlurmRequest, site: Site, options: DoctorOptions) -> list[Finding]:
    """Checks the nodes that Slurm allocates; submits the job only if all is well so far, and waits for it.

    Raises:
        UsageError: Slurm refuses the job.
    """
    found = [*options.batch(request.ranks), *check_slurm(request, request.partition or site.partition)]
    if not is_ready(found):
        return [*found, _NOT_STARTED]
    run_dir = options.recipe.run_dir if options.recipe is not None else Path.cwd()
    return [*found, *run_doctor_under_slurm(request, site, run_dir, options.recipe, options.arguments)]


def preflight(backend: Backend, recipe: Recipe) -> int:
    """The short checks before a launch: prints what is wrong, and returns 0 if the run can start."""
    findings = check_backend(backend, DoctorOptions(recipe, short=True))
    print_findings(findings, Console(stderr=True, highlight=False), least=Level.WARNING)
    return exit_code(findings)
