"""The list for a GPU, on whatever there is: what it does on a lent one must not fail for a silly reason."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from mixmae.trainer.benchmarks.gpu import Part, parts, run, small

ROOT = Path(__file__).parents[3]


def test_parts_are_ordered_by_priority_and_fit_in_eight_minutes() -> None:
    names = [part.name for part in parts()]
    assert names[0] == "parity"
    assert names[1] == "window"
    assert names[2].startswith("step swin_huge 64,128")
    assert len(set(names)) == len(names)
    assert sum(part.seconds for part in parts()[:4]) <= 480  # those have their whole time, whatever happens


def test_tests_name_each_result_and_need_no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parity, runs = (next(part.arguments for part in parts() if part.name == name) for name in ("parity", "runs"))
    assert parity[:5] == ("-m", "pytest", "-v", "-m", "gpu")
    assert "--timeout" in parity
    assert runs[-1] not in parity
    assert (ROOT / runs[-1]).is_file()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not {"-n", "--timeout"} & set(parts()[0].arguments)
    assert not parts()[0].environment


ONE_OF_EACH_KIND = ("window", "step swin_huge 128 K=4", "loop swin_base_w14", "data")


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(ONE_OF_EACH_KIND, marks=pytest.mark.distributed, id="one of each kind"),
        pytest.param([part.name for part in parts()], marks=pytest.mark.slow, id="all"),
    ],
)
def test_a_dry_run_of_the_suite(names: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("configs", "tests", "trainer", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    chosen = [part for part in parts() if part.name in names]
    assert len(chosen) == len(names)
    assert run([small(part) for part in chosen], 1800) == []
    written = {file.name: json.loads(file.read_text()) for file in (tmp_path / "benchmarks" / "results").glob("*.json")}
    steps = [found for name, content in written.items() if name.startswith("step-") for found in content]
    assert ("grouped", 4) in {(found["variant"], found["num_images"]) for found in steps}
    assert any(name.startswith("loop-gpu-") for name in written)
    assert any(name.startswith("data-photos-") for name in written)
    assert all(one["off"]["grad_table"] < 1e-5 for one in written["window-interpreter.json"]["shapes"])
    assert "grouped" in (tmp_path / "benchmarks" / "results" / "kernels.txt").read_text()


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = tmp_path / "told"
    fails = Part("fails", 30, ("-c", "raise SystemExit(3)"))
    hangs = Part("hangs", 0.5, ("-c", "import time; time.sleep(60)"))
    tells = Part(
        "tells", 30, ("-c", f"import os; open({str(told)!r}, 'w').write(os.environ['WHERE'])"), {"WHERE": "here"}
    )
    late = Part("late", 3000, ("-c", "raise SystemExit('started')"))
    assert run([fails, hangs, tells], 60) == ["fails", "hangs"]
    assert told.read_text() == "here"
    assert run([late], 12) == ["late"]
    out = capfd.readouterr().out
    assert "== fails: failed with exit code 3" in out
    assert "== hangs: timed out after 0 s" in out
    assert "== late: skipped: no time left" in out
