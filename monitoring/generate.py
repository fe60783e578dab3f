"""`python -m mixmae.monitoring.generate`: writes what is made from the lists of metrics and panels.

monitoring/dashboards/*.json   Grafana dashboards      monitoring/consoles/mixmae.html   page for Prometheus alone
docs/metrics.md                table of all metrics
"""

from pathlib import Path

from mixmae.monitoring.boards import BOARDS
from mixmae.monitoring.boards.console import console_page
from mixmae.monitoring.boards.grafana import dashboard_json
from mixmae.monitoring.metrics_page import metrics_page

ROOT = Path(__file__).resolve().parents[1]


def generated() -> dict[Path, str]:
    """Text of every generated file, by its path in the repository."""
    dashboards = {Path(f"monitoring/dashboards/{board.name}.json"): dashboard_json(board, BOARDS) for board in BOARDS}
    page = {Path("monitoring/consoles/mixmae.html"): console_page(BOARDS)}
    return {**dashboards, **page, Path("docs/metrics.md"): metrics_page()}


def main() -> None:
    for path, text in generated().items():
        file = ROOT / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        print(path)


if __name__ == "__main__":
    main()
