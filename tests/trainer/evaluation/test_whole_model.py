"""`mixmae evaluate` of detectors and segmenters: what it refuses names what the user gave."""

from pathlib import Path

import pytest
from PIL import Image

from mixmae.base.errors import UsageError
from mixmae.trainer.data.annotations import AnnotationKind
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.cli import main as shards
from mixmae.trainer.data.shards.scenes import Scenes
from mixmae.trainer.evaluation.evaluate import main
from mixmae.trainer.export.task_directory import write_task_directory
from mixmae.trainer.tasks.registry import task_of
from tests.helpers import tiny_recipe

TASKS: dict[str, AnnotationKind] = {"detect": "objects", "segment": "segments"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards by their kind, ones whose pixels are all ignored, and a model by its task, with other classes."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"detect": {"channels": 16, "rois": 32}, "segment": {"width": 16}}
    (folder / "images").mkdir()
    (folder / "maps").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 30)).save(folder / "images" / f"{name}.jpg")
        Image.new("L", (40, 30), 255).save(folder / "maps" / f"{name}.png")
    (folder / "names").write_text("cat\ndog\n")
    maps = ["--label-maps", str(folder / "maps"), "--class-names", str(folder / "names"), "--jobs", "1"]
    assert shards(["build", str(folder / "images"), str(folder / "ignored"), *maps]) == 0
    for (task, kind), section in zip(TASKS.items(), ("detection", "segmentation"), strict=True):
        build_shards(Scenes(2, 48, 0, kind), folder / kind, 20_000, 0, 1)
        found = task_of(tiny_recipe(task=task, **{section: {**sizes[task], "classes": ["cat", "dog"]}}))
        write_task_directory(folder / task, found.recipe, found.build().state_dict())
    return folder


@pytest.mark.parametrize(
    ("task", "held_out", "options", "message"),
    [
        ("detect", "segments", (), "^SHARDS needs shards with objects, but those in .* have segments"),
        ("segment", "objects", (), "^SHARDS needs shards with segments, but those in .* have objects"),
        ("detect", "objects", (), r"^SHARDS=.*objects has 6 classes .*, and the detector 2 \(cat, dog\); [^,]*$"),
        ("segment", "segments", (), r"^SHARDS=.*segments has 7 classes .*, and the segmenter 2 \(cat, dog\); "),
        ("segment", "ignored", (), r"^SHARDS=.*ignored: every pixel of its 2 label maps is ignored \(255\)"),
        ("segment", "segments", ("--results", "nowhere/out.json"), "^--results .*: nowhere is no directory"),
    ],
)
def test_mistakes_are_named_as_the_user_made_them(
    folder: Path, task: str, held_out: str, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        main([str(folder / task), str(folder / held_out), *options])
    assert "data.shards" not in str(caught.value)
    assert "\n" not in str(caught.value)
