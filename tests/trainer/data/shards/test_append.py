"""`mixmae shards build --append`: shards are added, and nothing that was there changes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixmae.base import files
from mixmae.base.errors import UsageError
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards import build
from mixmae.trainer.data.shards.cli import main
from mixmae.trainer.data.shards.indexing import write_index


def add_images(folder: Path, *numbers: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        pixels = np.random.default_rng(number).integers(0, 256, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def run(*argv: str | Path) -> None:
    assert main(["build", *map(str, argv), "--jobs", "1", "--shard-size", "30KB"]) == 0


def labelled(out: Path) -> dict[str, str]:
    """Classes of the images by their names."""
    index = open_index(out)
    names = [index.name_of(sample).partition(": ")[2] for sample in range(len(index))]
    return {name: index.classes[label] for name, label in zip(names, index.samples["label"], strict=True)}


@pytest.fixture
def shards_of_dogs(tmp_path: Path) -> Path:
    """12 images of cow and dog, from tmp_path / photos."""
    add_images(tmp_path / "photos" / "dog", *range(6))
    add_images(tmp_path / "photos" / "cow", *range(6, 12))
    run(tmp_path / "photos", tmp_path / "out")
    return tmp_path / "out"


def test_a_folder_that_grew(shards_of_dogs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, before = shards_of_dogs, open_index(shards_of_dogs)
    tars = {file.name: file.read_bytes() for file in out.glob("*.tar")}
    add_images(tmp_path / "photos" / "bee", 20, 21, 22)
    add_images(tmp_path / "photos" / "dog", 23)
    capsys.readouterr()
    run(tmp_path / "photos", out, "--append")
    first, skipped, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{out}: 16 images, 3 classes, {len(tars) + 1} shards, ")
    assert skipped.startswith("skipped 12 already in the shards: ")
    assert rest == [
        "added 4 images",
        "a run that was started on these shards will refuse to continue, since its data changed",
    ]
    assert {name: (out / name).read_bytes() for name in tars} == tars
    after = open_index(out)
    assert after.classes == ("cow", "dog", "bee")
    assert np.array_equal(after.samples[:12], before.samples)
    assert labelled(out) == {
        **{f"dog/{n}.png": "dog" for n in (*range(6), 23)},
        **{f"cow/{n}.png": "cow" for n in range(6, 12)},
        **{f"bee/{n}.png": "bee" for n in (20, 21, 22)},
    }
    assert after.fingerprint == write_index(out, after.classes).fingerprint
    assert not (tmp_path / "out.partial").exists()
    assert main(["check", str(out), "--jobs", "1"]) == 0
    assert len((out / "skipped.jsonl").read_text().splitlines()) == 12


def test_nothing_new(shards_of_dogs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = open_index(shards_of_dogs).fingerprint
    run(tmp_path / "photos", shards_of_dogs, "--append")
    assert capsys.readouterr().out.splitlines()[-1] == "nothing added"
    assert open_index(shards_of_dogs).fingerprint == before


def test_other_images_of_the_same_names(shards_of_dogs: Path, tmp_path: Path) -> None:
    add_images(tmp_path / "more" / "dog", 30)
    (tmp_path / "more" / "dog" / "30.png").rename(tmp_path / "more" / "dog" / "1.png")
    run(tmp_path / "more", shards_of_dogs, "--append")
    assert labelled(shards_of_dogs)["dog/1-2.png"] == "dog"


def test_an_interrupted_addition_is_continued(
    shards_of_dogs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_images(tmp_path / "more" / "dog", *range(40, 60))
    shutil.copytree(shards_of_dogs, tmp_path / "whole")
    run(tmp_path / "more", tmp_path / "whole", "--append")
    publish, before = files.publish, open_index(shards_of_dogs).fingerprint

    def fail(partial: Path, final: Path) -> None:
        if final.parent == shards_of_dogs and len(list(shards_of_dogs.glob("*.tar"))) > 2:
            raise OSError(28, "No space left on device")
        publish(partial, final)

    monkeypatch.setattr(build, "publish", fail)
    with pytest.raises(UsageError, match=r"No space left on device.*the same command continues"):
        main(["build", str(tmp_path / "more"), str(shards_of_dogs), "--append", "--jobs", "1", "--shard-size", "30KB"])
    assert open_index(shards_of_dogs).fingerprint == before
    monkeypatch.undo()
    run(tmp_path / "more", shards_of_dogs, "--append")
    assert open_index(shards_of_dogs).fingerprint == open_index(tmp_path / "whole").fingerprint


def test_what_cannot_be_added_is_refused(shards_of_dogs: Path, tmp_path: Path) -> None:
    def refused(message: str, *argv: str | Path) -> None:
        with pytest.raises(UsageError, match=message):
            main(["build", *map(str, argv), "--append", "--jobs", "1"])

    add_images(tmp_path / "more", 70)
    (tmp_path / "list.csv").write_text("path,label\nmore/70.png,2\n")
    refused("label 2, but .*/out has the 2 classes cow, dog; expected names, or", tmp_path / "list.csv", shards_of_dogs)
    refused("does not exist; make one", tmp_path / "more", tmp_path / "nowhere")
    run(tmp_path / "list.csv", tmp_path / "numbers")
    refused("labels in .* are numbers without names", tmp_path / "photos", tmp_path / "numbers")
    run(tmp_path / "list.csv", tmp_path / "numbers", "--append")
    shutil.copy(shards_of_dogs / "000000.tar", shards_of_dogs / "other.tar")
    refused("does not list other.tar; run 'mixmae shards index", tmp_path / "more", shards_of_dogs)
    content = json.loads((shards_of_dogs / "index.json").read_text())
    (tmp_path / "apart").mkdir()
    shutil.copy(shards_of_dogs / "samples.npy", tmp_path / "apart")
    (tmp_path / "apart" / "index.json").write_text(json.dumps(content | {"location": str(shards_of_dogs)}))
    refused("the shards of .*/apart are in .*/out; add to them there", tmp_path / "more", tmp_path / "apart")
