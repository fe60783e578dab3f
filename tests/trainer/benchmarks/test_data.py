import json
from pathlib import Path

import pytest

from mixmae.base.errors import run_cli
from mixmae.trainer.benchmarks.cli import main
from mixmae.trainer.benchmarks.photos import jpeg_photo, photo
from tests.helpers import tiny_recipe


@pytest.mark.parametrize(
    "own", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["recipe", "photos, augmented"]
)
def test_variants_are_measured_beside_the_reference(own: bool, shards: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out.json"
    augment = {"rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25} if own else {}
    recipe.write_text(tiny_recipe(**{"data.shards": str(shards), "augment": augment}).to_yaml())
    reference = "timm" if own else "imagefolder"
    options = [
        "--images",
        "24",
        "--seconds",
        "0.05",
        "--rounds",
        "1",
        "--json",
        str(out),
        *(["--photos"] if own else []),
    ]
    assert main(["data", str(recipe), *options, "train.micro_batch=2"]) == 0
    result = json.loads(out.read_text())
    variants = result["variants"]
    assert {reference, "pillow", "fast"} <= set(variants)
    assert variants[reference]["ratio_to_reference"] == 1
    for name, row in variants.items():
        assert row["images_per_second"] > 0
        parts = {"read", "decode", "resize", "augment", "collate"}
        assert name == reference or set(row["microseconds_per_image"]) == parts
    assert result["mean_abs_difference_to_pillow"] < 2
    assert result["versions"]["torch"]
    assert result["cores"] >= 1


def test_too_few_images_are_explained(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny_recipe(**{"data.shards": str(shards)}).to_yaml())
    assert run_cli(main, ["data", str(recipe), "--images", "1", "--rounds", "1"]) == 2
    assert "--images" in capsys.readouterr().err


def test_photographs_are_a_function_of_their_number() -> None:
    assert jpeg_photo(3) == jpeg_photo(3)
    assert photo(0).tobytes() != photo(7).tobytes()
    assert all(max(photo(number).size) == 500 for number in range(7))
