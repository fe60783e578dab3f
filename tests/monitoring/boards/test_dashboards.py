import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixmae.base.phases import STEP_PHASES
from mixmae.monitoring.boards import BOARDS
from mixmae.monitoring.boards.panels import LINES, Look
from mixmae.monitoring.generate import ROOT, generated
from mixmae.monitoring.metrics import METRICS
from mixmae.monitoring.metrics_page import PER_HISTOGRAM, REASONS, metrics_in, most_series
from mixmae.trainer.data.faults import Reason
from tests.monitoring.fake_run import FakeRun, history
from tests.monitoring.real_prometheus import Prometheus, prometheus
from tests.monitoring.services import needs

NAMES = [board.name for board in BOARDS]
QUERIES = [(board, panel, query) for board in BOARDS for panel in board.panels for query in panel.queries]
FEW = {Look.HEATMAP: PER_HISTOGRAM - 2, Look.STACK: len(STEP_PHASES)}
"""Series that a query may draw, where it is not LINES."""
NOW = (Look.TILE, Look.TABLE)


@pytest.mark.parametrize("path", generated(), ids=str)
def test_what_is_committed_is_what_is_generated(path: Path) -> None:
    assert (ROOT / path).read_text() == generated()[path], "run `make dashboards` and commit what it writes"


def test_every_metric_is_shown_and_no_other() -> None:
    shown = set().union(*(metrics_in(query.expr) for _, _, query in QUERIES))
    assert shown == {metric.full_name for metric in METRICS}
    with pytest.raises(ValueError, match="no metric mixmae_loss_bucket"):
        metrics_in("rate(mixmae_loss_bucket[5m])")


def test_every_selector_names_the_run() -> None:
    for _, panel, query in QUERIES:
        selectors = re.findall(r'\b(?:mixmae_\w+|up|ALERTS)\b(\{run="\$run")?', query.expr)
        assert selectors, panel.title
        assert all(selectors), panel.title


@pytest.mark.parametrize("name", NAMES)
def test_dashboards_are_laid_out_without_overlaps(name: str) -> None:
    dashboard = json.loads((ROOT / f"monitoring/dashboards/{name}.json").read_text())
    panels = dashboard["panels"]
    cells = [cell for panel in panels for cell in _cells(panel["gridPos"])]
    assert len(set(cells)) == len(cells)
    assert {x for x, _ in cells} == set(range(24))
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$(\w+)", json.dumps([p["targets"] for p in panels if "targets" in p])))
    assert variables - {"datasource"} == used - {"__range", "__rate_interval"}


def _cells(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    xs, ys = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
    return itertools.product(xs, ys)


def test_cardinality_is_bounded_and_linear_in_nodes_and_ranks() -> None:
    for ranks, nodes in ((8, 1), (16, 2), (64, 8)):
        run = FakeRun("run", start=0, ranks=ranks)
        series = [
            line for line in history([(run, dict.fromkeys(run.nodes, "x"))], [1000.0]) if line.startswith("mixmae_")
        ]
        assert 0.75 * most_series(nodes) < len(series) <= most_series(nodes)  # few reasons are met in one run
    assert most_series(64) - most_series(32) == 32 * (most_series(2) - most_series(1))
    assert len(Reason) <= REASONS


SMALL, LARGE = "small", "large"


@pytest.fixture(scope="module")
def now() -> float:
    """The end of what is backfilled: a busy machine may come to the queries much later."""
    return time.time()


@pytest.fixture(scope="module")
def server(now: float, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A run on 8 ranks that is scraped, after ten minutes of it; a run on 512 ranks, of which there are two minutes."""
    needs("prometheus", package="prometheus")
    small = FakeRun(SMALL, start=now - 4000, ranks=8)
    large = FakeRun(LARGE, start=now - 4000, ranks=512)
    past = [
        ([small], [now - 600 + 15 * n for n in range(40)]),
        ([large], [now - 120 + 30 * n for n in range(5)]),
    ]
    with prometheus(tmp_path_factory.mktemp("prometheus"), past, [small]) as running:
        yield running


def fill(expr: str, run: str, node: str = ".*") -> str:
    """An expression as Grafana sends it."""
    values = {"run": run, "node": node, "__range": "600s", "__rate_interval": "120s"}
    return re.sub(r"\$(\w+)", lambda name: values[name[1]], expr)


@pytest.mark.services
@pytest.mark.parametrize(("run", "node"), [(SMALL, ".*"), (SMALL, "node00"), (LARGE, ".*"), (LARGE, "(node07|node63)")])
def test_every_expression_returns_data_and_few_series(server: Prometheus, now: float, run: str, node: str) -> None:
    for board, panel, query in QUERIES:
        expr = fill(query.expr, run, node)
        at = time.time() if run == SMALL else server.alerting_since if "ALERTS" in expr else now
        found = server.query(expr, at)
        assert found, f"{board.name}, {panel.title}: {expr}"
        drawn = found if panel.look in NOW else server.query_range(expr, at - 300, at, 15)
        assert 1 <= len(drawn) <= FEW.get(panel.look, LINES), f"{board.name}, {panel.title}: {len(drawn)} series"
        labels = set(re.findall(r"\$(\w+)", query.legend))
        assert all(labels <= set(one["metric"]) for one in drawn), f"{board.name}, {panel.title}: {query.legend}"


@pytest.mark.services
def test_the_slow_rank_of_512_is_named(server: Prometheus, now: float) -> None:
    panels = {panel.title: panel for board in BOARDS for panel in board.panels}
    slow = server.query(fill(panels["Own work of a step, slowest ranks"].queries[0].expr, LARGE), now)
    assert max(slow, key=lambda one: float(one["value"][1]))["metric"] == {"node": "node63", "rank": "511"}
    short = server.query(fill(panels["Backward of a step, shortest"].queries[0].expr, LARGE), now)
    assert min(short, key=lambda one: float(one["value"][1]))["metric"] == {"node": "node63", "rank": "511"}
    shares = panels["Where the time goes"].queries
    total = sum(float(one["value"][1]) for query in shares for one in server.query(fill(query.expr, SMALL)))
    assert total == pytest.approx(1, abs=1e-3)
