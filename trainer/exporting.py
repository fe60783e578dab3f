"""The exporter of a node: a process that the node's first rank starts, and ends."""

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from monitoring.exporter import ExporterError, check_files
from trainer.config import Recipe
from trainer.errors import UsageError

_ENDING = 5.0
"""Seconds that an exporter has to end by itself."""


class NodeExporter:
    """The exporter's process."""

    def __init__(self, recipe: Recipe, shared: Path) -> None:
        self._process: subprocess.Popen[bytes] = subprocess.Popen(_command(recipe, shared))

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self, clean: bool) -> None:
        """Ends it; after an unclean end its target stays, and Prometheus sees a node that is down."""
        if clean:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):  # it hangs, and does not clean up after itself
                self._process.wait(_ENDING)
        self._process.kill()
        self._process.wait()


def check_monitoring(recipe: Recipe) -> None:
    """Raises UsageError if the exporters could not be set up as the recipe says."""
    settings = recipe.monitoring
    try:
        check_files(settings.certfile, settings.keyfile, settings.auth_file)
    except ExporterError as error:
        raise UsageError(str(error)) from error


def _command(recipe: Recipe, shared: Path) -> Sequence[str]:
    settings = recipe.monitoring
    options = {
        "shared": shared,
        "run-dir": recipe.run_dir,
        "address": settings.address,
        "port": settings.port,
        "stall-seconds": settings.stall_seconds,
        "certfile": settings.certfile,
        "keyfile": settings.keyfile,
        "auth-file": settings.auth_file,
        "pushgateway": settings.pushgateway,
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [sys.executable, "-m", "monitoring.exporter", *given]
