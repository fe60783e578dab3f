"""Looking before a start: from here, then, if nothing is wrong so far, from all ranks by a short job."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from launch.doctor_job import on_ranks, under_slurm
from launch.hostfile import OnHosts, require_pdsh
from launch.login_checks import check_batch, check_hosts, check_names, check_slurm
from launch.run import Way
from launch.site import Site
from launch.slurm import Request
from trainer.config import Launch, Recipe
from trainer.doctor.findings import Finding, Level, exit_code, print_findings
from trainer.exits import FINISHED

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
        """Of `trainer.doctor`."""
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
