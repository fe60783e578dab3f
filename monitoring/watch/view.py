"""What `mixmae watch` shows of a run: from its event file and exporters, or from one exporter alone."""

import math
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from mixmae.base.files import read_regular
from mixmae.base.run_directory import EVENTS, RECIPE, is_run
from mixmae.monitoring.exporter.access import PLAIN, TIMEOUT, Access
from mixmae.monitoring.exporter.discovery import Target, read_targets, run_label
from mixmae.monitoring.watch.alerts import Alert, FiringAlerts
from mixmae.monitoring.watch.history import Log, State, Tail
from mixmae.monitoring.watch.poller import Poller
from mixmae.monitoring.watch.scrape import Endpoint, Rank, Scrape, reachable


class WatchError(ValueError):
    """The target cannot be watched."""


@dataclass(frozen=True)
class View:
    """The data of one frame."""

    name: str
    details: str
    log: Log
    now: float
    ranks: Sequence[Rank] = ()
    """The worst first."""
    notes: Sequence[str] = ()
    """Why parts are missing."""
    alerts: Sequence[Alert] | None = None
    """None without a Prometheus server."""
    end: float = math.nan
    """Estimated end of the run, by its main rank; NaN if unknown."""

    @property
    def step(self) -> int:
        return max([self.log.step, *(rank.step or 0 for rank in self.ranks)])

    @property
    def silence(self) -> float:
        """Seconds since the last event or completed step of any rank; infinite before any."""
        ages = [rank.age for rank in self.ranks if rank.age is not None]
        if self.log.latest is not None:
            ages.append(self.now - self.log.latest)
        return max(0.0, min(ages, default=math.inf))

    @property
    def state(self) -> State:
        if self.log.ended is not None:
            return self.log.ended
        if math.isinf(self.silence):
            return State.NOT_STARTED
        return State.STALLED if self.silence > self.log.stall_timeout else State.RUNNING

    @property
    def elapsed(self) -> float:
        """Seconds since the run's first start, until its end if it ended."""
        log = self.log
        if log.began is None or log.latest is None:
            return math.nan
        return max(0.0, (log.latest if log.ended else self.now) - log.began)

    @property
    def remaining(self) -> float:
        """Estimated seconds to the end; NaN if unknown."""
        if self.log.total_steps is None or self.state is not State.RUNNING:
            return math.nan
        if math.isfinite(self.end):
            return max(0.0, self.end - self.now)
        return max(0, self.log.total_steps - self.step) * self.log.seconds_per_step


class Watched(Protocol):
    """A watched run."""

    def view(self, now: float) -> View: ...

    def wait_until_polled(self) -> None:
        """Waits for a short time until every endpoint was polled once."""


class WatchedRun:
    """A run directory, possibly of another user, and the run's reachable endpoints."""

    def __init__(self, run_dir: Path, interval: float, prometheus: str | None = None, access: Access = PLAIN) -> None:
        """Begins to watch.

        Args:
            access: the reader's own files; the run's recipe names none.

        Raises:
            WatchError: not a run directory.
        """
        try:
            found = is_run(run_dir)
        except OSError as error:
            raise WatchError(f"{run_dir} cannot be read: {error.strerror}") from error
        if not found:
            raise WatchError(
                f"{run_dir} is not a run directory: it has neither {RECIPE} nor {EVENTS}; give a recipe's run_dir, or "
                "http://NODE:PORT of an exporter"
            )
        self.run_dir, self._interval, self._access = run_dir, interval, access.of_named
        self.name = run_dir.resolve().name
        self._log, self._tail, self._recipe = Log(), Tail(run_dir / EVENTS), dict[str, Any]()
        self._endpoints: dict[Target, tuple[Endpoint, Poller]] = {}
        self._find_endpoints()
        called = {target.run for target in self._endpoints}  # by hosts that may see the directory under another path
        label = called.pop() if len(called) == 1 else run_label(run_dir)
        self._alerts = FiringAlerts(prometheus, {"run": label}, interval)

    def wait_until_polled(self) -> None:
        wait_for([*(poller for _, poller in self._endpoints.values()), *self._alerts.pollers])

    def view(self, now: float) -> View:
        notes = [*self._read_events(), *self._alerts.notes()]
        listed, elsewhere, problems = self._find_endpoints()
        if self._log.ended is None:
            notes += [*problems, *self._why_no_ranks(listed, elsewhere)]
        ranks = sorted((r for e, _ in self._endpoints.values() for r in e.ranks(now)), key=lambda rank: rank.sort_key)
        return View(self.name, self._details(), self._log, now, ranks, notes, self._alerts.alerts)

    def _read_events(self) -> Iterator[str]:
        try:
            if self._tail.truncated():
                self._log = Log()
            for line in self._tail.lines():
                self._log.read(line)
        except FileNotFoundError:
            return  # the run has not started yet
        except OSError as error:
            yield f"{EVENTS} cannot be read: {error.strerror}"
        if self._log.unreadable:
            yield f"invalid lines in {EVENTS} that are skipped: {self._log.unreadable}"

    def _find_endpoints(self) -> tuple[int, list[str], list[str]]:
        """Starts polling new endpoints, stops polling removed ones.

        Returns:
            Number of endpoints listed, nodes that are unreachable from this host, and errors in target files.
        """
        targets, problems = read_targets(self.run_dir)
        here = {target for target in targets if reachable(target.address, target.node)}
        for gone in self._endpoints.keys() - here:
            self._endpoints.pop(gone)[1].stop()
        for target in here - self._endpoints.keys():
            endpoint = Endpoint(target.url, target.node, self._access)
            self._endpoints[target] = endpoint, Poller(endpoint.poll, self._interval)
        return len(targets), sorted({target.node for target in targets} - {target.node for target in here}), problems

    def _read_recipe(self) -> dict[str, Any]:
        if not self._recipe:
            self._recipe = _recipe_shown(self.run_dir / RECIPE)
        return self._recipe

    def _why_no_ranks(self, listed: int, elsewhere: list[str]) -> Iterator[str]:
        if not listed:
            yield "ranks are not shown: no exporter is announced in monitoring/targets"
            return
        silent = [e for e, poller in self._endpoints.values() if e.problem is not None and poller.polled.is_set()]
        if elsewhere:
            yield (
                f"ranks of {_abbreviate(elsewhere)} are not shown: exporters there listen on loopback only; "
                "run mixmae watch there"
            )
        if silent:
            names = _abbreviate(sorted(endpoint.node for endpoint in silent))
            yield f"{len(silent)} of {listed} exporters do not respond: {names} ({silent[0].problem})"

    def _details(self) -> str:
        recipe = self._read_recipe()
        encoder, batch = recipe.get("encoder", {}).get("name"), recipe.get("train", {}).get("global_batch")
        ranks = self._log.world_size
        parts = [
            encoder if isinstance(encoder, str) else None,
            f"{ranks} rank{'s' * (ranks > 1)}" if isinstance(ranks, int) else None,
            f"{batch:,} images a step" if isinstance(batch, int) else None,
        ]
        return ", ".join(part for part in parts if part)


def _recipe_shown(file: Path) -> dict[str, Any]:
    """The sections of a run's recipe, to be shown; empty where it is missing or damaged."""
    try:
        content = yaml.safe_load(read_regular(file).decode())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    complete = isinstance(content, dict) and all(isinstance(content.get(part), dict) for part in ("encoder", "train"))
    return content if complete else {}


class WatchedEndpoint:
    """A single exporter; the loss curve starts when watching starts."""

    def __init__(self, url: str, interval: float, prometheus: str | None = None, access: Access = PLAIN) -> None:
        """Begins to watch.

        Raises:
            WatchError: no exporter of a run answers.
        """
        parts = urllib.parse.urlsplit(url)
        self.name = parts.netloc
        path = parts.path if parts.path.strip("/") else "/metrics"
        self._endpoint = Endpoint(parts._replace(path=path).geturl(), parts.hostname or "", access)
        self._endpoint.poll(time.time())
        if self._endpoint.problem is not None:
            raise WatchError(f"{url} is not a run's exporter: {self._endpoint.problem}")
        self._log, self._seen = Log(), dict[str, str]()
        self._poller = Poller(self._endpoint.poll, interval)
        self._alerts = FiringAlerts(prometheus, {"instance": self.name}, interval)

    def wait_until_polled(self) -> None:
        wait_for(self._alerts.pollers)

    def view(self, now: float) -> View:
        ranks = sorted(self._endpoint.ranks(now), key=lambda rank: rank.sort_key)
        scrape = self._endpoint.scrapes[-1]
        for event in events_of(scrape):
            changing = ("time", "step") if event["event"] == "step" else ("step",)  # a logged step is one of new values
            shown = repr({name: value for name, value in event.items() if name not in changing})
            if self._seen.get(event["event"]) != shown:
                self._seen[event["event"]] = shown
                self._log.add(event)
        notes = [*self._alerts.notes()]
        if not scrape.main.get("target_steps"):
            notes.append("progress and loss are not shown: the main rank is on another node")
        if self._endpoint.problem is not None:
            notes.append(f"the exporter no longer responds: {self._endpoint.problem}")
        everywhere = f" of {scrape.world_size}" if scrape.world_size else ""
        details = f"{len(ranks)}{everywhere} rank{'s' * (len(ranks) > 1 or bool(everywhere))}"
        end = scrape.main.get("estimated_end_timestamp_seconds", math.nan)
        return View(self.name, details, self._log, now, ranks, notes, self._alerts.alerts, end)


def events_of(scrape: Scrape) -> Iterator[dict[str, Any]]:
    """The main rank's gauges as events; none if it is on another node."""
    main, ranks = scrape.main, scrape.ranks.values()
    if not main.get("target_steps"):
        return
    step = max((int(numbers.get("step", 0)) for numbers in ranks), default=0)
    start = main.get("start_timestamp_seconds", scrape.at)
    yield {"event": "start", "time": start, "step": step, "total_steps": int(main["target_steps"])}
    if "loss" in main:
        yield {
            "event": "step",
            "time": max((numbers.get("heartbeat_timestamp_seconds", start) for numbers in ranks), default=start),
            "step": step,
            "loss": main["loss"],
            "lr": main.get("learning_rate"),
            "grad_norm": main.get("gradient_norm"),
            "epoch": main.get("epoch"),
            "images_per_second": main.get("images_per_second"),
            "skipped_steps": int(main.get("skipped_steps_total", 0)),
            "peak_memory_bytes": max((numbers.get("device_memory_peak_bytes", 0.0) for numbers in ranks), default=0.0),
        }
    if main.get("checkpoint_timestamp_seconds"):
        yield {"event": "checkpoint", "time": main["checkpoint_timestamp_seconds"]}


def wait_for(pollers: Iterable[Poller]) -> None:
    """Waits until each poller has completed its first call or timed out."""
    end = time.monotonic() + TIMEOUT + 0.5
    for poller in pollers:
        poller.polled.wait(max(0.0, end - time.monotonic()))


def _abbreviate(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
