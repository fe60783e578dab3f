import json
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mixmae.monitoring.boards import BOARDS, console
from mixmae.monitoring.boards.overview import BOARD as OVERVIEW
from mixmae.monitoring.boards.panels import Board, Look, Unit, lines
from tests.monitoring.browser import visit
from tests.monitoring.fake_run import FakeRun
from tests.monitoring.real_prometheus import Prometheus, prometheus
from tests.monitoring.services import needs

LIVE, ENDED = "live 'x'", "ended"
DRAWN = {Look.LINES, Look.STACK, Look.HEATMAP}


def test_the_page_holds_every_panel_and_asks_nobody_but_prometheus() -> None:
    page = console.console_page(BOARDS)
    found = re.search(r'type="application/json">\n(.*?)\n</script>', page, re.DOTALL)
    assert found
    exprs = [q["expr"] for b in json.loads(found[1]) for r in b["rows"] for p in r["panels"] for q in p["queries"]]
    assert exprs == [query.expr for board in BOARDS for panel in board.panels for query in panel.queries]
    assert set(re.findall(r"https?://[^/\"']+", page)) == {"http://www.w3.org"}  # the name of SVG; nothing is fetched
    units = (console.PAGE / "units.js").read_text()
    assert all(f'case "{unit}"' in units for unit in Unit if unit is not Unit.NONE)


def test_braces_that_go_would_read_are_refused() -> None:
    panel = lines("Broken", Unit.COUNT, "", ("up", "{{rank}}"))
    board = OVERVIEW._replace(rows=(OVERVIEW.rows[0]._replace(panels=(panel,)),))
    with pytest.raises(ValueError, match=r"holds '\{\{' on line \d+"):
        console.console_page([board])


class Document(HTMLParser):
    """Texts and charts of a page."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.charts = 0
        self.paths: list[str] = []
        self.unknown = 0
        """Tiles without a number."""
        self.text = ""
        self.hidden: dict[str, bool] = {}
        self.feed(dom.replace(dom[dom.index("<script") : dom.index("</body")], ""))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.charts += tag == "svg"
        if tag == "path":
            self.paths.append(str(attributes["d"]))
        self.unknown += "unknown" in str(attributes.get("class"))
        if "id" in attributes:
            self.hidden[str(attributes["id"])] = "hidden" in attributes

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A live run on two nodes, and one that ended ten minutes ago; ten minutes of each."""
    needs("prometheus", package="prometheus")
    now = time.time()
    live = FakeRun(LIVE, start=now - 4000, ranks=8, per_node=4)
    ended = FakeRun(ENDED, start=now - 5000, ranks=2)
    past = [([run], [end - 600 + 15 * n for n in range(41)]) for run, end in ((live, now - 15), (ended, now - 600))]
    with prometheus(tmp_path_factory.mktemp("prometheus"), past, [live]) as running:
        yield running


@pytest.mark.services
@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_boards_are_drawn_without_errors(server: Prometheus, board: Board, tmp_path: Path) -> None:
    seen = visit(f"{server.url}/consoles/mixmae.html?board={board.name}&range=15m", tmp_path)
    assert seen.console == []
    document = Document(seen.dom)
    assert document.hidden["notice"], document.text
    assert not document.hidden["board"]
    assert LIVE in document.text
    assert "mixmae_swin_base_w14, 88.9M parameters, 8 ranks" in document.text
    assert document.charts == sum(panel.look in DRAWN for panel in board.panels)
    assert len(document.paths) >= document.charts
    assert all(path.startswith("M") and "NaN" not in path for path in document.paths)
    assert "no data" not in document.text
    assert "NaN" not in document.text
    assert document.unknown == 0
    assert all(panel.title in document.text for panel in board.panels if panel.look in DRAWN | {Look.TILE})
    if board is OVERVIEW:
        assert re.search(r"MixmaeDeviceMemoryNearLimit . 3rank", document.text)  # ranks 1, 2 and 7


@pytest.mark.services
def test_an_ended_run_and_an_unknown_one(server: Prometheus, tmp_path: Path) -> None:
    ended = visit(f"{server.url}/consoles/mixmae.html?run={ENDED}", tmp_path)
    document = Document(ended.dom)
    assert ended.console == []
    assert re.search(r"ended was last seen 1\d min", document.text)  # ten, when its samples were written
    assert "2 ranks, ZeRO 1" in document.text
    assert "no data" not in document.text
    unknown = Document(visit(f"{server.url}/consoles/mixmae.html?run=other", tmp_path).dom)
    assert "Run other was not seen in the last 1h." in unknown.text
    assert unknown.hidden["board"]


@pytest.mark.services
def test_nothing_is_scraped_yet(tmp_path: Path) -> None:
    needs("prometheus", package="prometheus")
    with prometheus(tmp_path, [], []) as empty:
        seen = visit(f"{empty.url}/consoles/mixmae.html", tmp_path / "profile")
    document = Document(seen.dom)
    assert seen.console == []
    assert "No run is scraped yet." in document.text
    assert document.hidden["board"]


@pytest.mark.services
def test_errors_of_a_page_would_be_seen(tmp_path: Path) -> None:
    assert "nope is not defined" in visit("data:text/html,<script>nope()</script>", tmp_path).console[0]
