from pathlib import Path

import pytest

from mixmae.trainer.benchmarks.page import PAGE, draw, measurements, with_tables
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


def test_the_page_shows_the_results() -> None:
    page = (ROOT / PAGE).read_text()
    assert with_tables(page, ROOT / RESULTS) == page, "run `make performance`"


@pytest.mark.parametrize("kind", ["step", "methods"])
def test_results_have_machine_and_versions(kind: str) -> None:
    for one in measurements(ROOT / RESULTS, kind):
        assert {*FIELDS, "ratio_to_plain", "versions", "commit"} <= set(one)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(measurements(ROOT / RESULTS, "step"), tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 5000
