import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from trainer.data.build import Sample, find_images, read_images, write_shards
from trainer.data.cli import main, parse_size
from trainer.data.index import open_index
from trainer.errors import UsageError, run_in_words


def test_shards_are_webdataset_shards(shards: Path) -> None:
    index = open_index(shards)
    urls = [str(shards / shard.name) for shard in index.shards]
    theirs = {s["__key__"]: (s["jpg"], int(s["cls"])) for s in webdataset.WebDataset(urls, shardshuffle=False)}
    assert len(theirs) == len(index) == 54
    for number in range(len(index)):
        key = index.name_of(number).split(": ")[1].removesuffix(".jpg")
        assert theirs[key] == (index.read(index.samples[number]), index.samples[number]["label"])


def test_index_tells_counts_sizes_and_checksums(shards: Path) -> None:
    index = open_index(shards)
    assert len(index.shards) > 2
    for number, shard in enumerate(index.shards):
        content = (shards / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert shard.samples == int((index.samples["shard"] == number).sum())


def test_class_folders_become_shards(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "images" / ("cat" if number % 2 else "a dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (number, 0, 0)).save(folder / f"{number}.v1.png")
    assert main(["build", str(tmp_path / "images"), str(tmp_path / "out"), "--shard-size", "2KB", "--jobs", "1"]) == 0
    index = open_index(tmp_path / "out")
    assert index.classes == ("a dog", "cat")
    for number in range(12):
        red = Image.open(io.BytesIO(index.read(index.samples[number]))).getpixel((0, 0))[0]  # type: ignore[index]
        assert index.samples[number]["label"] == red % 2
    labels = index.samples["label"].tolist()
    assert labels != sorted(labels)


def test_a_flat_folder_becomes_unlabelled_shards(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a.b.jpg", "a_b.jpg", "a_b.png"):
        (tmp_path / "images" / name).write_bytes(name.encode())
    assert main(["build", str(tmp_path / "images"), str(tmp_path / "out"), "--jobs", "1"]) == 0
    index = open_index(tmp_path / "out")
    assert index.samples["label"].tolist() == [-1, -1, -1]
    assert {index.read(row) for row in index.samples} == {b"a.b.jpg", b"a_b.jpg", b"a_b.png"}
    assert len({index.name_of(n).split(": ")[1].split(".")[0] for n in range(3)}) == 3


def test_building_is_reproducible(tmp_path: Path) -> None:
    samples = [Sample(f"{i}", "jpg", bytes([i]) * 100, i % 3) for i in range(20)]
    first, second = (write_shards(tmp_path / n, samples, ["a", "b", "c"], 4000, 20) for n in ("one", "two"))
    assert first.fingerprint == second.fingerprint
    changed = write_shards(tmp_path / "three", [*samples[:-1], samples[0]._replace(key="x")], [], 4000, 20)
    assert changed.fingerprint != first.fingerprint


def test_the_order_of_files_is_seeded(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for i in range(20):
        (tmp_path / "c" / f"{i:02d}.jpg").write_bytes(b"x")
    _, images = find_images(tmp_path)
    keys = [[s.key for s in read_images(tmp_path, images, seed)] for seed in (0, 0, 1)]
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]
    assert sorted(keys[0]) == sorted(keys[2])


def test_an_index_can_be_made_for_foreign_shards(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy, ignore=shutil.ignore_patterns("index.json", "samples.npy"))
    assert main(["index", str(copy), "--jobs", "1"]) == 0
    assert np.array_equal(open_index(copy).samples, open_index(shards).samples)


def test_unlabelled_images_and_other_members_are_fine(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.jpg", "a.json", "b.PNG", "notes"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"123"))
    main(["index", str(tmp_path), "--jobs", "1"])
    assert open_index(tmp_path).samples["label"].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no directory", "does not exist"),
        ("no index", "mixmae shards index"),
        ("nothing", "holds no .tar files"),
        ("missing shard", "missing"),
        ("cut shard", "cut short"),
        ("empty", "hold no images"),
        ("format", "format 99"),
    ],
)
def test_broken_directories_are_explained(shards: Path, tmp_path: Path, damage: str, message: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    first = copy / "000000.tar"
    if damage == "no directory":
        shutil.rmtree(copy)
    elif damage == "no index":
        (copy / "index.json").unlink()
    elif damage == "nothing":
        shutil.rmtree(copy)
        copy.mkdir()
    elif damage == "missing shard":
        first.unlink()
    elif damage == "cut shard":
        first.write_bytes(first.read_bytes()[:-1024])
    elif damage == "empty":
        shutil.rmtree(copy)
        copy.mkdir()
        tarfile.open(first, "w").close()
        with pytest.raises(UsageError, match=message):
            main(["index", str(copy), "--jobs", "1"])
        return
    elif damage == "format":
        content = json.loads((copy / "index.json").read_text())
        (copy / "index.json").write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(UsageError, match=message):
        open_index(copy)


@pytest.mark.parametrize(
    "argv",
    [
        ["build", "nowhere", "out"],
        ["build", "{empty}", "out"],
        ["synth", "{empty}"],
        ["synth", "out", "--shard-size", "big"],
        ["index", "nowhere"],
        ["index", "{empty}"],
    ],
)
def test_wrong_calls_are_one_line(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run_in_words(main, [a.format(empty=tmp_path / "empty") for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mixmae: error:")
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", [["--images", "0"], ["--img-size", "x"], ["--jobs", "0"], ["--seed", "-1"]])
def test_numbers_have_ranges(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["synth", "out", *option])
    assert caught.value.code == 2
    assert f"argument {option[0]}: '{option[1]}', expected a whole number" in capsys.readouterr().err


def test_a_broken_build_leaves_nothing_under_its_name(tmp_path: Path) -> None:
    def failing() -> Iterator[Sample]:
        yield Sample("a", "jpg", b"x", 0)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_shards(tmp_path / "out", failing(), [], 1000, 2)
    assert not (tmp_path / "out").exists()


def test_sizes() -> None:
    assert [parse_size(s) for s in ("250MB", "1g", "12", "1.5 KB")] == [250_000_000, 10**9, 12, 1500]
