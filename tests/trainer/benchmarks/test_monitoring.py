import json
from pathlib import Path

from trainer.benchmarks.cli import main


def test_steps_with_and_without_metrics_are_compared(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["monitoring", "--step-ms", "2", "--steps", "5", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["steps"] == 5
    assert {"step_ms_without", "step_ms_with", "ratio", "calls_us", "calls_share"} <= set(result)
    assert result["calls_us"] > 0
