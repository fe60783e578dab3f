"""Boards as a console page of Prometheus: one file, from monitoring/page, that asks nothing but Prometheus' own API.

Prometheus runs it through Go's templates, so that `{{` may occur nowhere in it.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mixmae.monitoring.boards.panels import Board, Panel

PAGE = Path(__file__).parents[1] / "page"
SCRIPTS = ("units.js", "chart.js", "page.js")
"""In the order in which they use one another."""


def console_page(boards: Iterable[Board]) -> str:
    """The page, with its style, its script and the panels in it.

    Raises:
        ValueError: a part holds `{{`, which Go would take for a template.
    """
    parts = {
        "style": (PAGE / "page.css").read_text().strip(),
        "boards": json.dumps([_board(board) for board in boards], indent=1, ensure_ascii=False).replace("</", "<\\/"),
        "script": "\n".join(_script(name) for name in SCRIPTS).strip(),
    }
    page = re.sub(r"^@(\w+)@$", lambda mark: parts[mark[1]], (PAGE / "page.html").read_text(), flags=re.MULTILINE)
    if "{{" in page:
        raise ValueError(f"the console page holds '{{{{' on line {page[: page.index('{{')].count(chr(10)) + 1}")
    return page


def _script(name: str) -> str:
    """One of the scripts; all are one module in the page."""
    return re.sub(r"^export ", "", (PAGE / name).read_text(), flags=re.MULTILINE)


def _board(board: Board) -> dict[str, Any]:
    rows = [{"title": row.title, "panels": [_panel(panel) for panel in row.panels]} for row in board.rows]
    return {"name": board.name, "title": board.title, "nodes": board.has_nodes, "rows": rows}


def _panel(panel: Panel) -> dict[str, Any]:
    return {**panel._asdict(), "queries": [query._asdict() for query in panel.queries]}
