"""A run is called by where it is: two of one name are two."""

from pathlib import Path

import pytest

from mixmae.monitoring.exporter.discovery import read_targets, run_label, write_target


def test_runs_are_told_apart_by_their_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "run"]
    for run_dir in runs:
        run_dir.mkdir(parents=True)
        write_target(run_dir, "node1", "127.0.0.1:9400")
    labels = [target.run for run_dir in runs for target in read_targets(run_dir)[0]]
    assert len(set(labels)) == len(runs)
    monkeypatch.chdir(tmp_path / "a")
    assert run_label(Path("run")) == run_label(Path("../a/run")) == labels[0]
