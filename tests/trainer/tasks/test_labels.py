"""Labels of shards: classes by number and by name, several an image, and what is said of those that do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mixmae.base.errors import UsageError
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.indexing import write_index
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.tasks.labels import resolve_classes, targets_of
from tests.helpers import tar_of, tiny_recipe

PIXEL = bytes.fromhex("50360a3120310a3235350aff0000")  # a PPM of one red pixel


def shards_of(folder: Path, labels: list[str | None]) -> Path:
    """A shard of images with these labels."""
    folder.mkdir()
    files = {f"{n}.ppm": PIXEL for n in range(len(labels))}
    files |= {f"{n}.cls": label.encode() for n, label in enumerate(labels) if label is not None}
    (folder / "0.tar").write_bytes(tar_of(dict(sorted(files.items()))))
    write_index(folder)
    return folder


def recipe_for(folder: Path, **changes: Any) -> Recipe:
    return tiny_recipe(**{"data.shards": str(folder), "classification": changes})


def test_numbers_and_names(tmp_path: Path) -> None:
    numbers = shards_of(tmp_path / "numbers", ["2", "0", "1"])
    found = resolve_classes(recipe_for(numbers)).classification
    assert (found.num_classes, found.classes) == (3, ())
    index = open_index(numbers)
    assert targets_of(index, found, "data.shards")(index.samples["label"]).tolist() == [2, 0, 1]
    names = shards_of(tmp_path / "names", ["sofa", "cat", "dog"])
    found = resolve_classes(recipe_for(names)).classification
    assert (found.num_classes, found.classes) == (3, ("cat", "dog", "sofa"))
    held_out = open_index(shards_of(tmp_path / "held out", ["sofa", "dog"]))  # where sofa is number 1
    assert targets_of(held_out, found, "evaluate.shards")(held_out.samples["label"]).tolist() == [2, 1]


def test_several_labels_an_image(tmp_path: Path) -> None:
    folder = shards_of(tmp_path / "shards", ["sofa, cat", "cat,", ",", "dog,cat"])
    found = resolve_classes(recipe_for(folder, multi_label=True)).classification
    assert found.classes == ("cat", "dog", "sofa")
    index = open_index(folder)
    flags = targets_of(index, found, "data.shards")(index.samples["label"])
    assert flags.dtype == torch.uint8
    assert flags.tolist() == [[1, 0, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]


def test_a_plan_needs_no_shards(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path / "elsewhere", num_classes=7)
    assert resolve_classes(recipe).classification.num_classes == 7


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        (["1", None, "0"], {}, "1 of 3 images in data.shards=.* have no label, the first is 0.tar: 1.ppm; put a .cls"),
        ([None, None], {}, "holds no labels"),
        (["0", "1", "cat"], {}, "1 of 3 images .* have a label that is no class, the first is 0.tar: 2.ppm"),
        (["0", "5", "1"], {"num_classes": 5}, "label 5 .*0.tar: 1.ppm.* is too large for .*num_classes=5: .* 0 to 4"),
        (["3", "3"], {}, "of one class, 3; a classifier needs two"),
        (["cat", "cat"], {}, "of one class, 'cat'"),
        (["cat", "dog"], {"num_classes": 5}, "num_classes=5, but there are 2 classes by name .cat, dog."),
        (
            ["cat", "dog"],
            {"classes": ["cat", "cow"]},
            "1 classes that the run does not .dog.; its .* cat, cow",
        ),
        (["1", "2"], {"multi_label": True, "num_classes": 3}, "needs names separated by commas"),
        (["cat,dog", "dog,cat"], {"multi_label": True}, "have the same classes"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    tmp_path: Path, labels: list[str | None], settings: dict[str, Any], message: str
) -> None:
    folder = shards_of(tmp_path / "shards", labels)
    with pytest.raises(UsageError, match=message) as caught:
        targets_of(open_index(folder), resolve_classes(recipe_for(folder, **settings)).classification, "data.shards")
    assert "\n" not in str(caught.value)
