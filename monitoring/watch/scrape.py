"""What a run's exporters say: a table of ranks, the worst first."""

import math
import socket
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from mixmae.base.phases import PHASES
from mixmae.monitoring.exporter.access import UNREACHABLE, Access, describe_error
from mixmae.monitoring.metrics import PREFIX

WINDOW = 60.0
"""Seconds over which rates are computed."""
LATE_SECONDS, LATE_STEPS = 30.0, 5
"""A rank is late after both: this many seconds, and this many times its mean step."""

_COUNTS = ("step", "target_steps", "rank_part", "replaced_samples_total", "skipped_steps_total", "world_size")
_LARGEST_COUNT = 2**53

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Scrape:
    """One response of an exporter; metric names without `mixmae_`."""

    at: float
    ranks: Mapping[int, Numbers]
    """Metrics of each rank, summed over other labels; `data_wait` is that phase's seconds, `rank_part` the index of the
    current phase in PHASES.
    """
    main: Numbers
    """Metrics of the run, from the main rank; empty unless it is on this node."""
    world_size: int | None


@dataclass(frozen=True)
class Rank:
    """A row of the table of ranks."""

    rank: int
    node: str
    step: int | None
    age: float | None
    """Seconds since it last completed a step; None before the first."""
    images_per_second: float
    data_wait: float
    """Fraction of its time spent waiting for data. This and the rate: over the last minute, else since it started."""
    memory: float
    """Bytes used on its device, or on the host if it has none."""
    memory_limit: float
    replaced: int
    trouble: str
    """`late`, `stopped` if its process does not run, `silent` if its exporter does not respond, or empty."""
    phase: str = ""
    """Its current phase; empty if unknown."""

    @property
    def sort_key(self) -> tuple[float, ...]:
        """Sorts the worst ranks first, without flicker between scrapes of a healthy run."""
        late = bool(self.trouble)
        behind = (-(self.age or 0.0), self.step or 0) if late else (0.0, 0.0)
        wait = 0.0 if math.isnan(self.data_wait) else round(self.data_wait, 1)
        return (-late, behind[1], behind[0], -wait, -self.replaced, self.rank)


def parse_scrape(text: str, at: float) -> Scrape:
    """Parses an exporter's response.

    Raises:
        ValueError: it is not in Prometheus' text format, or not of a run.
    """
    try:
        scrape = _parse(text, at)
    except (
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:  # of labels too
        raise ValueError(f"invalid response: {error!r}") from error
    for numbers in (scrape.main, *scrape.ranks.values()):
        for name in _COUNTS:
            if not 0 <= numbers.get(name, 0.0) < _LARGEST_COUNT:
                raise ValueError(f"invalid response: {PREFIX}{name} is {numbers[name]}")
        if int(numbers.get("rank_part", 0)) >= len(PHASES):
            raise ValueError(f"invalid response: a rank is in several of {PREFIX}rank_part")
    return scrape


def _parse(text: str, at: float) -> Scrape:
    # Histogram buckets are most of the text and not needed; skipping them makes 64 nodes cheap.
    lines = [line for line in text.splitlines() if line.startswith(PREFIX) and "_bucket{" not in line]
    if not lines:
        raise ValueError(f"no {PREFIX}* metrics in the response")
    ranks: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    main: dict[str, float] = defaultdict(float)
    world_size = None
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            name = sample.name.removeprefix(PREFIX)
            if name == "run_info":
                world_size = int(sample.labels["world_size"])
            if "rank" not in sample.labels:
                main[name] += sample.value
                continue
            mine = ranks[int(sample.labels["rank"])]
            if name == "rank_part":
                mine[name] += PHASES.index(sample.labels["part"]) * sample.value
                continue
            mine[name] += sample.value
            if name == "step_part_seconds_sum" and sample.labels["part"] == "data_wait":
                mine["data_wait"] += sample.value
    return Scrape(at, ranks, main, world_size)


class Endpoint:
    """An exporter, and its responses of the last minute."""

    def __init__(self, url: str, node: str, access: Access) -> None:
        self.url, self.node, self._access = url, node, access
        self.problem: str | None = None
        """Why the last scrape failed."""
        self.scrapes: tuple[Scrape, ...] = ()
        """Oldest first; kept while the endpoint does not respond. Replaced atomically: another thread reads it."""

    def poll(self, now: float) -> None:
        try:
            new = parse_scrape(self._access.fetch(self.url).decode(), now)
        except UNREACHABLE as error:
            self.problem = describe_error(error)
            return
        recent = deque(scrape for scrape in self.scrapes if now - scrape.at <= WINDOW)
        if recent and _restarted(recent[-1], new):
            recent.clear()
        self.scrapes, self.problem = (*recent, new), None

    def ranks(self, now: float) -> list[Rank]:
        scrapes = self.scrapes
        if not scrapes:
            return []
        first, last = scrapes[0], scrapes[-1]
        silent = self.problem is not None
        at = now if silent else last.at  # ages are those at the last scrape
        return [
            _rank(rank, self.node, first.ranks.get(rank, {}), numbers, at, silent)
            for rank, numbers in last.ranks.items()
        ]


def reachable(address: str, node: str) -> bool:
    """Whether `host:port` reaches the exporter of `node` from this host; a loopback address does only on that node."""
    host = address.rpartition(":")[0].strip("[]")
    return node == socket.gethostname() or not (host.startswith("127.") or host in ("localhost", "::1"))


def _restarted(before: Scrape, after: Scrape) -> bool:
    return any(
        numbers.get("images_total", 0.0) < before.ranks[rank].get("images_total", 0.0)
        for rank, numbers in after.ranks.items()
        if rank in before.ranks
    )


def _rank(rank: int, node: str, first: Numbers, last: Numbers, at: float, silent: bool) -> Rank:
    beat = last.get("heartbeat_timestamp_seconds", 0.0)
    age = max(0.0, at - beat) if beat else None
    mean_step = _ratio(last.get("step_seconds_sum", 0.0), last.get("step_seconds_count", 0.0))
    late = age is not None and age > max(LATE_SECONDS, 0.0 if math.isnan(mean_step) else LATE_STEPS * mean_step)
    stopped = at - last.get("alive_timestamp_seconds", at) > LATE_SECONDS
    trouble = "silent" if silent else "stopped" if stopped else "late" if late else ""

    def over(name: str, seconds: str) -> float:
        recent = last.get(seconds, 0.0) - first.get(seconds, math.inf)
        if recent > 0:
            return (last.get(name, 0.0) - first.get(name, 0.0)) / recent
        return _ratio(last.get(name, 0.0), last.get("step_seconds_sum", 0.0))

    held, limit = last.get("device_memory_reserved_bytes", 0.0), last.get("device_memory_limit_bytes", 0.0)
    return Rank(
        rank,
        node,
        int(last["step"]) if "step" in last else None,
        age,
        # Over the time between two heartbeats, so that steps longer than the scrape interval do not distort it.
        0.0 if trouble else over("images_total", "heartbeat_timestamp_seconds"),
        over("data_wait", "step_seconds_sum"),
        held or last.get("resident_memory_bytes", math.nan),
        limit if held else 0.0,
        int(last.get("replaced_samples_total", 0.0)),
        trouble,
        PHASES[int(last["rank_part"])] if "rank_part" in last else "",
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
