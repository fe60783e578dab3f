import json
from pathlib import Path
from typing import Any

import pytest

from mixmae.trainer.benchmarks.cli import main
from mixmae.trainer.benchmarks.monitoring import measure
from mixmae.trainer.telemetry.observer import Observer


def test_steps_with_and_without_metrics_are_compared(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["monitoring", "--step-ms", "2", "--steps", "5", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["steps"] == 5
    assert {"step_ms_without", "step_ms_with", "ratio", "calls_us", "calls_share", "exporter_cpu_share"} <= set(result)
    assert result["calls_us"] > 0
    assert 0 <= result["exporter_cpu_share"] < 1


def test_a_benchmark_step_records_what_the_loop_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: set[str] = set()
    for verb in ("data", "process", "logged", "step"):
        original = getattr(Observer, verb)

        def told_as(*given: Any, verb: str = verb, original: Any = original, **named: Any) -> None:
            told.add(verb)
            original(*given, **named)

        monkeypatch.setattr(Observer, verb, told_as)
    measure(tmp_path, 0.001, 1)
    assert told == {"data", "process", "logged", "step"}
