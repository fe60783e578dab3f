"""What a panel is, and how its expressions are put together; the panels themselves are in mixmae.monitoring.boards.

Expressions hold Grafana's variables ($run, $node, $__range, $__rate_interval); the console page fills in the same ones.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

RUN = '{run="$run"}'
"""Selects the series of one run."""
HERE = '{run="$run", node=~"$node"}'
"""Selects the series of the chosen nodes of a run."""
FIRING = 'ALERTS{run="$run", alertstate="firing"}'
RANK = "rank $rank on $node"
"""Legend of a series of a rank."""
NOW, WHOLE = "[$__rate_interval]", "[$__range] @ end()"
"""Around each point of a chart; over all that the chart shows."""
LINES = 10
"""At most so many ranks, GPUs or nodes are drawn one by one, whatever the size of the run."""


class Unit(StrEnum):
    NONE = "none"
    """A number that need not start at 0, such as a loss."""
    COUNT = "count"
    RATIO = "ratio"
    SECONDS = "seconds"
    TIME = "time"
    """Unix seconds; shown as a distance from now."""
    BYTES = "bytes"
    BYTES_PER_SECOND = "bytes per second"
    PER_SECOND = "per second"
    FLOPS = "operations per second"
    WATTS = "watts"
    CELSIUS = "celsius"


class Look(StrEnum):
    TILE = "tile"
    """One number."""
    TEXT = "text"
    """The labels of one series, as its legend says them."""
    LINES = "lines"
    STACK = "stack"
    """Shares that add up to the whole."""
    HEATMAP = "heatmap"
    """Buckets of a histogram over time."""
    ALERTS = "alerts"
    TABLE = "table"
    """Rows of now: a legend and a number."""


class Query(NamedTuple):
    expr: str
    legend: str = ""
    """May hold labels: `rank $rank`."""


class Panel(NamedTuple):
    title: str
    look: Look
    unit: Unit
    help: str
    queries: tuple[Query, ...]
    alarm: float | None = None
    """A tile stands out from this value on."""


class Row(NamedTuple):
    title: str
    panels: tuple[Panel, ...]


class Board(NamedTuple):
    name: str
    title: str
    rows: tuple[Row, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row.panels)

    @property
    def has_nodes(self) -> bool:
        """Whether nodes can be chosen."""
        return any("$node" in query.expr for panel in self.panels for query in panel.queries)


def tile(title: str, unit: Unit, help: str, expr: str, alarm: float | None = None) -> Panel:
    return Panel(title, Look.TILE, unit, help, (Query(expr, title),), alarm)


def table(title: str, help: str, expr: str, legend: str) -> Panel:
    """At most LINES rows, the highest numbers first."""
    return Panel(title, Look.TABLE, Unit.COUNT, help, (Query(expr, legend),))


def lines(title: str, unit: Unit, help: str, *queries: tuple[str, str]) -> Panel:
    """A chart of (expression, legend) pairs."""
    return Panel(title, Look.LINES, unit, help, tuple(Query(*query) for query in queries))


def heatmap(title: str, help: str, buckets: str) -> Panel:
    """A histogram's buckets over time; `buckets` selects its _bucket series, in seconds."""
    return Panel(title, Look.HEATMAP, Unit.SECONDS, help, (Query(f"sum by (le) (rate({buckets}{NOW}))", "$le"),))


def rate(series: str, by: str = "") -> str:
    """Growth of counters per second around each point, added up but for the labels in `by`."""
    return f"sum {f'by ({by}) ' if by else ''}(rate({series}{NOW}))"


def spread(each: str) -> tuple[tuple[str, str], ...]:
    """Lowest, median and highest of what may be hundreds of series."""
    return (f"min({each})", "lowest"), (f"quantile(0.5, {each})", "median"), (f"max({each})", "highest")


def most(each: Callable[[str], str]) -> str:
    """The LINES series that are highest over the whole chart: `each` says the value over a window, NOW or WHOLE.

    Chosen once for the chart: a plain topk chooses anew at every point, and so draws any number of lines.
    """
    return f"{each(NOW)} and topk({LINES}, {each(WHOLE)})"


def least(each: Callable[[str], str]) -> str:
    """The LINES series that are lowest over the whole chart."""
    return f"{each(NOW)} and bottomk({LINES}, {each(WHOLE)})"


def gauge_of(series: str, by: str) -> Callable[[str], str]:
    """A gauge over a window, one series for each value of the labels in `by`."""
    return lambda window: f"max by ({by}) (avg_over_time({series}{window}))"


def per_step(parts: str) -> Callable[[str], str]:
    """Seconds of a step that each rank spends in the parts that match."""
    parted = HERE.replace("}", f', part=~"{parts}"}}')
    return lambda window: (
        f"sum by (node, rank) (rate(mixmae_step_part_seconds_sum{parted}{window}))"
        f" / sum by (node, rank) (rate(mixmae_step_seconds_count{HERE}{window}))"
    )
