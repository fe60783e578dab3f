import json
import subprocess
from pathlib import Path

import pytest

from mixmae.monitoring.exporter.node import Gpus
from mixmae.monitoring.metrics_page import most_series
from mixmae.trainer.benchmarks.cli import main
from mixmae.trainer.benchmarks.scrape import measure


def test_exporters_of_two_nodes_answer_with_as_many_series_as_stated(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["scrape", "--nodes", "2", "--ranks", "3", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    gpus = 0 if [*Gpus().readings()] else 3 * 3  # of each node; counted but not there on a machine without any
    assert result["series"] == most_series(2, 3) - 2 * gpus
    assert result["seconds"] > 0


@pytest.mark.slow
def test_sixty_four_nodes_of_eight_ranks(tmp_path: Path) -> None:
    """What docs/metrics.md states holds at 512 ranks; `mixmae bench scrape` says how long it takes."""
    result = measure(tmp_path, 64, 8)
    assert 0.9 * result["most_series"] < result["series"] <= result["most_series"]
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], check=False).returncode == 1  # none is left
