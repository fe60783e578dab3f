"""Looking before a start: from here, then, if nothing is wrong so far, from all ranks by a short job."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mixmae.base.exit_codes import FINISHED
from mixmae.launch.backends.hostfile import OnHosts, require_pdsh
from mixmae.launch.backends.site import Site
from mixmae.launch.backends.slurm import Request
from mixmae.launch.preflight.doctor_job import on_ranks, under_slurm
from mixmae.launch.preflight.login_checks import check_batch, check_hosts, check_names, check_slurm
from mixmae.launch.supervision.run import Way
from mixmae.trainer.doctor.protocol.findings import Finding, Level, exit_code, print_findings
from mixmae.trainer.recipe.schema import Launch, Recipe

_NOT_STARTED = Finding(
    Level.NOTE, "ranks", "", "not started, so nothing else was looked at", advice="mend the errors, and look again"
)


@dataclass(frozen=True)
class Look:
    """What is to be looked at.

    Attributes:
        recipe: None where hosts and network alone are of interest.
        words: the recipe's file and overrides, as they were typed.
        short: only what takes a few seconds.
        link: what the network should give, as it was typed.
    """

    recipe: Recipe | None
    words: tuple[str, ...]
    short: bool = False
    link: str | None = None

    @property
    def arguments(self) -> list[str]:
        """Of `mixmae.trainer.doctor`."""
        link = ["--link", self.link] if self.link is not None else []
        return [*self.words, *(["--short"] if self.short else []), *link]

    @property
    def settings(self) -> Launch:
        return self.recipe.launch if self.recipe is not None else Launch()

    def batch(self, ranks: int) -> list[Finding]:
        return list(check_batch(self.recipe, ranks)) if self.recipe is not None else []


def sound(findings: Iterable[Finding]) -> bool:
    """Whether ranks may be started to look further."""
    return exit_code(findings) == FINISHED


def examine(way: Way, look: Look) -> list[Finding]:
    """Everything that can be found of ranks here or on hosts; ranks are started only where all is well so far.

    Raises:
        UsageError: pdsh is missing, or ranks cannot be started like this.
    """
    found = look.batch(way.ranks)
    if isinstance(way, OnHosts):
        require_pdsh()
        found += check_names(way.hosts)
        if sound(found):
            found += check_hosts(way.hosts, way.ssh_port)
    if not sound(found):
        return [*found, _NOT_STARTED]
    return [*found, *on_ranks(way, look.arguments, look.settings)]


def examine_slurm(request: Request, site: Site, look: Look) -> list[Finding]:
    """Everything that can be found of the nodes that Slurm gives; waits for them where all is well so far.

    Raises:
        UsageError: Slurm refuses the job.
    """
    found = [*look.batch(request.ranks), *check_slurm(request, request.partition or site.partition)]
    if not sound(found):
        return [*found, _NOT_STARTED]
    run_dir = look.recipe.run_dir if look.recipe is not None else Path.cwd()
    return [*found, *under_slurm(request, site, run_dir, look.arguments, look.settings)]


def preflight(way: Way, recipe: Recipe, words: tuple[str, ...]) -> int:
    """The short look before a launch: shows what is wrong, and returns 0 if nothing keeps the run from starting.

    Args:
        words: the recipe's file and overrides, as they were typed.
    """
    findings = examine(way, Look(recipe, words, short=True))
    print_findings(findings, Console(stderr=True, highlight=False), least=Level.WARNING)
    return exit_code(findings)
