from pathlib import Path

import pytest

from mixmae.trainer.planning import weak_scaling
from mixmae.trainer.planning.weak_scaling import Scaled, draw, table
from tests.helpers import ROOT, tiny_recipe

CASE = ("mixmae_swin_nano", "h100", "200gbps")
RECIPE = tiny_recipe(**{"train.precision": "bf16", "train.micro_batch": 8, "train.global_batch": 8})


def test_efficiency_falls_with_the_link_and_hardly_with_the_number() -> None:
    slow, fast = (list(weak_scaling.weak_scaling(RECIPE, "h100", link)) for link in ("1mbps", "8x400gbps"))
    assert [one.gpus for one in slow] == list(weak_scaling._COUNTS)
    assert slow[0] == fast[0]  # in one node
    assert slow[1].waiting > 100 * slow[0].waiting
    assert slow[-1].waiting < 2.1 * slow[1].waiting
    assert fast[-1].seconds < 1.1 * fast[0].seconds


def test_what_is_shown(tmp_path: Path) -> None:
    steps = [Scaled(gpus, 0.2 if gpus > 8 else 0.1, 0.0) for gpus in weak_scaling._COUNTS]
    assert table({CASE: steps}).splitlines()[-1].startswith("| swin_nano, h100, 200gbps | 10,240 (100%) | 10,240 (50%)")
    draw({CASE: steps}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_page_shows_what_is_modelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "planning.md"
    page.write_text((ROOT / weak_scaling.PAGE).read_text())
    monkeypatch.setattr(weak_scaling, "PAGE", page)
    monkeypatch.setattr(weak_scaling, "PICTURE", tmp_path / "picture.png")
    assert weak_scaling.main() == 0
    assert page.read_text() == (ROOT / weak_scaling.PAGE).read_text(), "run `make performance`"
