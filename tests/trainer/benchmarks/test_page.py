import json
from pathlib import Path

import pytest

from mixmae.trainer.benchmarks.page import PAGE, draw, table, with_table
from mixmae.trainer.benchmarks.results import RESULTS
from tests.helpers import ROOT

FIELDS = (
    "device",
    "model",
    "variant",
    "batch",
    "images_per_second",
    "model_tflops",
    "share_of_product",
    "peak_memory_bytes",
)


def measurements() -> list[dict[str, object]]:
    files = sorted((ROOT / RESULTS).glob("step-*.json"))
    return [found for file in files for found in json.loads(file.read_text())]


def test_the_page_shows_the_results() -> None:
    page = (ROOT / PAGE).read_text()
    assert with_table(page, table(measurements())) == page, "run `make performance`"


def test_results_have_machine_and_versions() -> None:
    assert measurements()
    for found in measurements():
        assert {*FIELDS, "ratio_to_plain", "versions", "commit"} <= set(found)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(measurements(), tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 5000
