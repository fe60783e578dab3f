import errno
import fcntl
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from mixmae.base.errors import UsageError, run_cli
from mixmae.trainer.data import jpeg
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards import build
from mixmae.trainer.data.shards.build import BuildInterruptedError, build_shards
from mixmae.trainer.data.shards.build_plan import assign_to_shards
from mixmae.trainer.data.shards.cli import main
from mixmae.trainer.data.shards.image_files import Files
from mixmae.trainer.data.shards.source import Entry
from mixmae.trainer.data.shards.sources import open_source
from mixmae.trainer.data.shards.synthetic import Synthetic
from tests.helpers import needs_jpegtran


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 JPEGs of two classes, with a name that is long, one that is foreign and one that has dots."""
    root = tmp_path_factory.mktemp("images")
    names = [f"{number:02d}" for number in range(37)] + ["x" * 120, "naïve", "a.b.c"]
    for number, name in enumerate(names):
        file = root / ("cat" if number % 2 else "a dog") / f"{name}.jpg"
        file.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(file, quality=70)
    return root


def by_webdataset(index: ShardIndex) -> dict[str, tuple[bytes, int | None]]:
    """What webdataset finds in the shards."""
    urls = [f"{index.store.location}/{shard.name}" for shard in index.shards]
    samples = webdataset.WebDataset(urls, shardshuffle=False)
    return {s["__key__"]: (s["jpg"], int(s["cls"]) if "cls" in s else None) for s in samples}


def test_shards_hold_the_images_of_class_folders(folder: Path, tmp_path: Path) -> None:
    argv = ["build", str(folder), str(tmp_path / "out"), "--shard-size", "30KB", "--jobs", "2"]
    assert main(argv) == 0
    index = open_index(tmp_path / "out")
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*.jpg")}
    expected = {
        str(Path(name).with_name(file.stem.replace(".", "_"))): (file.read_bytes(), int(file.parent.name == "cat"))
        for name, file in files.items()
    }
    assert by_webdataset(index) == expected
    assert index.classes == ("a dog", "cat")
    assert {(index.read(n), int(index.samples[n]["label"])) for n in range(40)} == set(expected.values())
    assert len(index.shards) > 3
    assert all(shard.bytes <= 30_000 for shard in index.shards)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        *(f"{number:06d}.tar" for number in range(len(index.shards))),
        "index.json",
        "samples.npy",
    ]
    assert not (tmp_path / "out.partial").exists()


def test_flat_folders_become_unlabelled_shards(folder: Path, tmp_path: Path) -> None:
    assert main(["build", str(folder / "cat"), str(tmp_path / "out"), "--jobs", "1"]) == 0
    index = open_index(tmp_path / "out")
    assert set(index.samples["label"]) == {-1}
    assert {label for _, label in by_webdataset(index).values()} == {None}


def test_shards_are_built_anew_from_lists_and_shards(folder: Path, tmp_path: Path) -> None:
    rows = [{"path": str(file), "label": file.parent.name} for file in sorted(folder.rglob("*.jpg"))]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert (
        main(["build", str(tmp_path / "list.jsonl"), str(tmp_path / "one"), "--shard-size", "20KB", "--jobs", "1"]) == 0
    )
    assert main(["build", str(tmp_path / "one"), str(tmp_path / "two"), "--shard-size", "60KB", "--jobs", "1"]) == 0
    one, two = open_index(tmp_path / "one"), open_index(tmp_path / "two")
    assert by_webdataset(one) == by_webdataset(two)
    assert len(by_webdataset(one)) == 40
    assert one.classes == two.classes == ("a dog", "cat")
    assert len(one.shards) > 2 * len(two.shards)


def test_the_bytes_depend_on_the_arguments_alone(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder))
    one, two, other = (
        build_shards(source, tmp_path / name, 30_000, seed, jobs).index
        for name, seed, jobs in (("one", 0, 1), ("two", 0, 2), ("other", 1, 1))
    )
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert [shard.sha256 for shard in one.shards] == [shard.sha256 for shard in two.shards]
    assert by_webdataset(one) == by_webdataset(other)


def test_shards_mix_the_classes_and_keep_to_their_size() -> None:
    drawn = random.Random(0)
    entries = [Entry(f"{n}", n, drawn.randrange(20_000), n // 500) for n in range(1000)]
    shards = assign_to_shards(entries, 1_000_000, seed=0)
    assert sorted(number for numbers in shards for number in numbers) == list(range(1000))
    assert all(0.2 < np.mean([entries[n].label for n in numbers]) < 0.8 for numbers in shards[:-1])
    assert all(750_000 < sum(entries[n].size for n in numbers) < 1_000_000 for numbers in shards[:-1])
    assert assign_to_shards(entries, 1_000_000, seed=0) == shards != assign_to_shards(entries, 1_000_000, seed=1)
    assert [len(numbers) for numbers in assign_to_shards(entries[:3], 10, seed=0)] == [1, 1, 1]


def test_what_cannot_be_used_is_left_out_and_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (folder / "cat" / "01.jpg").read_bytes()
    images = {"whole": whole, "cut": whole[: len(whole) // 2], "empty": b"", "text": b"no image"}
    for name, content in images.items():
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{name}.jpg").write_bytes(content)
    assert main(["build", str(tmp_path / "images"), str(tmp_path / "out"), "--shard-size", "1", "--jobs", "1"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert {line["key"]: line["reason"] for line in lines} == {
        "cut": "damaged",
        "empty": "empty",
        "text": "not an image",
    }
    assert {line["source"] for line in lines} == {str(tmp_path / f"images/{n}.jpg") for n in ("cut", "empty", "text")}
    assert list(by_webdataset(open_index(tmp_path / "out"))) == ["whole"]
    told = capsys.readouterr().out
    assert "skipped 1 " in told
    assert str(tmp_path / "out" / "skipped.jsonl") in told


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"none of the 1 images .* \(1 not an image\): .*a\.jpg"):
        build_shards(open_source(str(tmp_path / "images")), tmp_path / "out", 1000, 0, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["images"]


@pytest.mark.services
def test_seekable_shards_hold_the_same_pixels(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs_jpegtran()
    (tmp_path / "images").mkdir()
    for file in sorted((folder / "cat").iterdir())[:4]:
        (tmp_path / "images" / file.name).write_bytes(file.read_bytes())
    Image.new("CMYK", (40, 40)).save(tmp_path / "images" / "print.jpg")
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "p.png")
    argv = ["build", str(tmp_path / "images"), str(tmp_path / "out"), "--seekable", "--jobs", "1"]
    assert main(argv) == 0
    assert "4 of 6 images are JPEGs with restart markers now" in capsys.readouterr().out
    index = open_index(tmp_path / "out")
    with_restarts = 0
    for number in range(len(index)):
        content = index.read(number)
        name = index.name_of(number).split(": ")[1]
        now, then = (Image.open(io.BytesIO(c)) for c in (content, (tmp_path / "images" / name).read_bytes()))
        assert np.array_equal(np.asarray(now), np.asarray(then))
        with_restarts += name.endswith("jpg") and jpeg.read_header(content).restart_interval > 0
    assert with_restarts == 4


def test_seekable_needs_jpegtran(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    jpeg.require_jpegtran.cache_clear()
    with pytest.raises(UsageError, match="apt-get install libjpeg-turbo-progs"):
        build_shards(open_source(str(folder)), tmp_path / "out", 30_000, 0, 1, seekable=True)
    jpeg.require_jpegtran.cache_clear()
    assert list(tmp_path.iterdir()) == []


class Breaking(Synthetic):
    """Fails at one image, as a disk does."""

    def __init__(self, error: BaseException, at: int = 30) -> None:
        super().__init__(40, 32, 0)
        self.error, self.at = error, at

    def read(self, entry: Entry) -> tuple[str, bytes]:
        if entry.reference == self.at:
            raise self.error
        return super().read(entry)


def records(partial: Path) -> dict[str, int]:
    """Finished shards, and when their tars were written."""
    done = (partial / f"{file.stem}.tar" for file in (partial / ".build").glob("0*.json"))
    return {file.name: file.stat().st_mtime_ns for file in done}


def test_an_unreadable_image_ends_the_build_which_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Synthetic(40, 32, 0)
    last = assign_to_shards(source.entries, 20_000, 0)[-1][-1]
    with pytest.raises(UsageError, match=f"cannot read synthetic image {last} .* the same command continues"):
        build_shards(Breaking(PermissionError("locked"), last), tmp_path / "out", 20_000, 0, 1)
    before = records(tmp_path / "out.partial")
    assert before
    assert not (tmp_path / "out").exists()
    index = build_shards(source, tmp_path / "out", 20_000, 0, 1).index
    assert f"continuing: {len(before)} of {len(index.shards)} shards are written already" in capsys.readouterr().err
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before
    assert index.fingerprint == build_shards(source, tmp_path / "at once", 20_000, 0, 1).index.fingerprint


def test_a_finished_shard_that_was_cut_since_is_written_again(tmp_path: Path) -> None:
    source = Synthetic(40, 32, 0)
    with pytest.raises(UsageError, match="cannot read"):
        build_shards(
            Breaking(OSError("gone"), assign_to_shards(source.entries, 20_000, 0)[-1][-1]),
            tmp_path / "out",
            20_000,
            0,
            1,
        )
    os.truncate(tmp_path / "out.partial" / "000000.tar", 1000)
    index = build_shards(source, tmp_path / "out", 20_000, 0, 1).index
    assert index.shard_sizes().tolist() == [shard.bytes for shard in index.shards]


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getpid()

    def full(_: int) -> None:
        if os.getpid() != parent:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UsageError, match=r"cannot write in .*out\.partial .*No space left.* the same command continues"
    ):
        build_shards(Synthetic(4, 32, 0), tmp_path / "out", 20_000, 0, 1)


def test_another_build_is_not_mixed_in(tmp_path: Path) -> None:
    source = Breaking(OSError("gone"))
    with pytest.raises(UsageError, match="cannot read"):
        build_shards(source, tmp_path / "out", 20_000, 0, 1)
    for other, size, seed in ((Synthetic(40, 32, 1), 20_000, 0), (Synthetic(40, 32, 0), 9000, 0), (source, 20_000, 1)):
        with pytest.raises(UsageError, match=r"unfinished build of 40 synthetic .* or remove .*out\.partial"):
            build_shards(other, tmp_path / "out", size, seed, 1)
    (tmp_path / "two.partial").mkdir()
    (tmp_path / "two.partial" / "7.tar").write_bytes(b"")
    with pytest.raises(UsageError, match=r"unfinished build of something"):
        build_shards(source, tmp_path / "two", 20_000, 0, 1)


def test_two_builds_at_once_are_refused(tmp_path: Path) -> None:
    class Nested(Synthetic):
        def read(self, entry: Entry) -> tuple[str, bytes]:
            build_shards(Synthetic(4, 32, 0), tmp_path / "out", 20_000, 0, 1)
            return super().read(entry)

    with pytest.raises(UsageError, match="another build is running"):
        build_shards(Nested(4, 32, 0), tmp_path / "out", 20_000, 0, 1)


def test_an_existing_directory_is_not_overwritten(shards: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        build_shards(Synthetic(4, 32, 0), shards, 20_000, 0, 1)


def test_a_killed_process_is_explained(tmp_path: Path) -> None:
    class Killed(Synthetic):
        def read(self, entry: Entry) -> tuple[str, bytes]:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    with pytest.raises(UsageError, match="processes was killed"):
        build_shards(Killed(4, 32, 0), tmp_path / "out", 20_000, 0, 2)


def test_interruption_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "run_jobs", interrupted)
    with pytest.raises(BuildInterruptedError, match=r"interrupted; 0 of 2 shards are in .* the same command continues"):
        build_shards(Synthetic(4, 32, 0), tmp_path / "out", 20_000, 0, 1)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_build_continues_to_the_same_shards(how: signal.Signals, tmp_path: Path) -> None:
    argv = ["shards", "synth", str(tmp_path / "out"), "--images", "600", "--img-size", "64"]
    argv += ["--shard-size", "60KB", "--jobs", "2"]
    command = [sys.executable, "-m", "mixmae.launch.cli", *argv]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    partial = tmp_path / "out.partial"
    while len(records(partial) if (partial / ".build").exists() else ()) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, how) if how == signal.SIGKILL else os.killpg(process.pid, how)
    told = process.communicate(timeout=30)[1]
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert told.count("Traceback") == 0
        assert "the same command continues" in told
    before = records(partial)
    assert not (tmp_path / "out").exists()
    index = _built_when_free(tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before
    expected = build_shards(Synthetic(600, 64, 0), tmp_path / "at once", 60_000, 0, 2).index
    assert index.fingerprint == expected.fingerprint
    assert len(before) < len(index.shards)


def _built_when_free(out: Path) -> ShardIndex:
    """Processes of a killed build end within moments; until then they hold the directory."""
    plan = (out.with_name("out.partial") / ".build" / "plan.json").open()
    for _ in range(100):
        try:
            fcntl.flock(plan, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.05)
    plan.close()
    return build_shards(Synthetic(600, 64, 0), out, 60_000, 0, 2).index


@pytest.mark.parametrize(
    "argv",
    [
        ["build", "nowhere", "out"],
        ["build", "{empty}", "out"],
        ["build", "{empty}", "{empty}/out"],
        ["build", "s3://bucket/images", "out"],
        ["synth", "{empty}"],
    ],
)
def test_wrong_calls_are_one_line(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run_cli(main, [a.format(empty=tmp_path / "empty") for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mixmae: error:")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--images", "0"], "expected a whole number"),
        (["--img-size", "x"], "expected a whole number"),
        (["--jobs", "0"], "expected a whole number"),
        (["--seed", "-1"], "expected a whole number"),
        (["--shard-size", "big"], "expected a number of bytes, such as 500MB"),
        (["--shard-size", "0"], "expected 1 byte or more"),
    ],
)
def test_numbers_have_ranges(option: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["synth", "out", *option])
    assert caught.value.code == 2
    assert f"argument {option[0]}: '{option[1]}', {message}" in capsys.readouterr().err


def test_files_are_read_again_where_they_lie(folder: Path) -> None:
    source = open_source(str(folder))
    assert isinstance(source, Files)
    assert source.root == folder
