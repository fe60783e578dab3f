"""The process of a node's exporter, which the node's first rank starts, restarts if it is lost, and ends."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mixmae.base.errors import UsageError
from mixmae.monitoring.exporter.server import PUSHGATEWAY, UNUSABLE, ExporterError, check_files
from mixmae.trainer.recipe.schema import Recipe

BETWEEN_STARTS = 60.0
"""Least seconds from one start to the next, so that an exporter that keeps failing costs a run nothing."""
_ENDING = 5.0
"""Seconds that an exporter has to end by itself."""


class ExporterProcess:
    """The exporter's process, and a thread that waits for its end, so that the training thread never does."""

    def __init__(
        self, recipe: Recipe, shared: Path, between_starts: float = BETWEEN_STARTS, run: str | None = None
    ) -> None:
        """Starts the exporter; `run` is what all nodes call the run."""
        self._command, self._between_starts = _command(recipe, shared, run), between_starts
        gateway = recipe.monitoring.pushgateway
        self._environment = {**os.environ, **({PUSHGATEWAY: gateway} if gateway is not None else {})}
        self._ended = threading.Event()
        self._starting = threading.Lock()
        self._start()
        self._keeper = threading.Thread(target=self._keep, name="exporter", daemon=True)
        self._keeper.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self, clean: bool) -> None:
        """Ends it; after an unclean end its target stays, and Prometheus sees a node that is down."""
        with self._starting:
            self._ended.set()
        if clean:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):  # it hangs, and does not clean up after itself
                self._process.wait(_ENDING)
        self._process.kill()
        self._keeper.join()

    def _start(self) -> None:
        self._started = time.monotonic()
        self._process: subprocess.Popen[bytes] = subprocess.Popen(self._command, env=self._environment)

    def _keep(self) -> None:
        while self._process.wait() != UNUSABLE and not self._ended.wait(self._next_start - time.monotonic()):
            with self._starting, suppress(OSError):  # no memory for a process now
                if not self._ended.is_set():
                    self._start()

    @property
    def _next_start(self) -> float:
        return self._started + self._between_starts


def check_monitoring(recipe: Recipe) -> None:
    """Raises UsageError if the exporters could not be set up as the recipe says."""
    settings = recipe.monitoring
    try:
        check_files(settings.certfile, settings.keyfile, settings.auth_file)
    except ExporterError as error:
        raise UsageError(str(error)) from error


def _command(recipe: Recipe, shared: Path, run: str | None) -> Sequence[str]:
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
        "run": run,
        "parent": os.getpid(),
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [sys.executable, "-m", "mixmae.monitoring.exporter.server", *given]
