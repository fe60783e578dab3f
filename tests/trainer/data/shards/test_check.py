import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from mixmae.base.errors import UsageError, run_cli
from mixmae.trainer.data.faults import Reason
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.check import check_shards
from mixmae.trainer.data.shards.cli import main
from mixmae.trainer.data.shards.findings import Kind
from mixmae.trainer.data.shards.indexing import write_index
from mixmae.trainer.data.shards.members import members
from tests.helpers import tar_of

SECOND = "000001.tar"


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    shutil.copytree(shards, tmp_path / "copy")
    return tmp_path / "copy"


def samples_of(index: ShardIndex) -> dict[str, tuple[bytes, int]]:
    """Images and labels by key, as webdataset finds them."""
    urls = [f"{index.store.location}/{shard.name}" for shard in index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    return {s["__key__"]: (s["jpg"] if "jpg" in s else s["png"], int(s.get("cls", -1))) for s in samples}


def places(file: Path) -> dict[str, tuple[int, int]]:
    """Start and size of a tar's members."""
    return {f"{m.key}.{m.extension}": (m.offset, m.size) for m in members(file)}


def third(file: Path, extension: str) -> tuple[int, int]:
    return [place for name, place in places(file).items() if name.endswith(extension)][2]


def overwrite(file: Path, at: int, content: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        stream.write(content)


def flip(file: Path, at: int) -> None:
    overwrite(file, at, bytes([file.read_bytes()[at] ^ 0x55]))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def relabel(file: Path, at: int, size: int) -> None:
    """Writes another class over a label."""
    overwrite(file, at, b"%0*d" % (size, (int(file.read_bytes()[at : at + size]) + 1) % 10))


def replace(file: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> None:
    """Writes a tar anew with other members."""
    with tarfile.open(file) as tar:
        files = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    file.write_bytes(tar_of(change(files)))


def some_jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (30, 30, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def found(directory: Path) -> dict[Kind, int]:
    report = check_shards(directory, jobs=1).report
    return {kind: count for kind in Kind if (count := sum(finding.kind == kind for finding in report.findings))}


def test_sound_shards_are_sound(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(shards), "--jobs", "2", "--json", str(tmp_path / "report.json")]) == 0
    *_, totals, verdict = capsys.readouterr().out.splitlines()
    assert verdict == "sound"
    index = open_index(shards)
    assert f"54 samples in {len(index.shards)} shards" in totals
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["sound"], report["samples"], report["findings"]) == (True, 54, [])


def compress(file: Path) -> None:
    file.write_bytes(gzip.compress(file.read_bytes()))


# What happens to the second shard, what is found beside other bytes than were indexed, and how many samples are saved;
# numbers below one are to be added to the number of its samples.
DAMAGES: dict[str, tuple[Callable[[Path], None], dict[Kind, int], int]] = {
    "cut in a payload": (
        lambda file: cut(file, sum(third(file, "jpg")) - 100),
        {Kind.TAR: 1, Kind.MISSING: 1, Kind.IMAGE_LOST: -2},
        2,
    ),
    "cut between members": (
        lambda file: cut(file, third(file, "cls")[0] - 512),
        {Kind.TAR: 1, Kind.IMAGE_LOST: -2},
        2,
    ),
    "flipped header of a label": (
        lambda file: flip(file, third(file, "cls")[0] - 500),
        {Kind.TAR: 1, Kind.LABEL_CHANGED: 1},
        0,
    ),
    "flipped header of an image": (
        lambda file: flip(file, third(file, "jpg")[0] - 500),
        {Kind.TAR: 1, Kind.MISSING: 1, Kind.IMAGE_LOST: 1},
        0,
    ),
    "flipped byte of a quantization table": (
        lambda file: flip(file, third(file, "jpg")[0] + 40),
        {Kind.IMAGE_CHANGED: 1},
        -1,
    ),
    "overwritten image": (
        lambda file: overwrite(file, third(file, "jpg")[0], b"\0" * 400),
        {Kind.NOT_AN_IMAGE: 1},
        -1,
    ),
    "another label": (lambda file: relabel(file, *third(file, "cls")), {Kind.LABEL_CHANGED: 1}, 0),
    "no class for a label": (lambda file: overwrite(file, third(file, "cls")[0], b"\xff"), {Kind.BAD_LABEL: 1}, 0),
    "compressed": (compress, {Kind.TAR: 1}, 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_repaired(
    damage: str, shards: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, expected, saved = DAMAGES[damage]
    whole = open_index(shards)
    count = {shard.name: shard.samples for shard in whole.shards}[SECOND]
    others = {file.name: file.stat().st_mtime_ns for file in copy.glob("*.tar") if file.name != SECOND}
    harm(copy / SECOND)
    harmed = (copy / SECOND).read_bytes()
    assert found(copy) == {
        Kind.SHARD_CHANGED: 1,
        **{kind: number if number > 0 else count + number for kind, number in expected.items()},
    }
    assert main(["check", str(copy), "--jobs", "1"]) == 1
    assert "will then refuse to continue" in capsys.readouterr().out.splitlines()[-1]

    assert main(["check", str(copy), "--jobs", "1", "--repair"]) == 0
    told = capsys.readouterr().out
    assert f"the damaged file is {SECOND}.damaged now" in told
    assert "will refuse to continue, since its data changed" in told
    assert (copy / f"{SECOND}.damaged").read_bytes() == harmed
    assert {name: (copy / name).stat().st_mtime_ns for name in others} == others
    index = open_index(copy)
    assert index.classes == whole.classes
    before, after = samples_of(whole), samples_of(index)
    kept = saved if saved > 0 else count + saved
    assert len(after) == len(before) - count + kept
    assert set(after.values()) <= set(before.values())
    renamed = set(after) - set(before)  # of an image that is found although its header, and name, is lost
    assert len(renamed) == (damage == "flipped header of an image")
    assert all(before[key] == after[key] for key in set(after) - renamed)
    record = json.loads((copy / "repair.jsonl").read_text().splitlines()[0])
    assert (record["shard"], record["kept"], record["original"]) == (SECOND, kept, f"{SECOND}.damaged")
    assert found(copy) == {}
    assert not list(copy.glob(".*"))


def test_a_shard_that_is_empty_leaves_the_index(shards: Path, copy: Path) -> None:
    (copy / SECOND).write_bytes(b"")
    assert found(copy)[Kind.TAR] == 1
    assert main(["check", str(copy), "--jobs", "1", "--repair"]) == 0
    assert [s.name for s in open_index(copy).shards] == [s.name for s in open_index(shards).shards if s.name != SECOND]
    assert (copy / f"{SECOND}.damaged").read_bytes() == b""


def test_a_compressed_shard_that_was_cut_is_unpacked_as_far_as_it_goes(shards: Path, copy: Path) -> None:
    compress(copy / SECOND)
    cut(copy / SECOND, 10_000)
    assert main(["check", str(copy), "--jobs", "1", "--repair"]) == 0
    index = open_index(copy)
    kept = {shard.name: shard.samples for shard in index.shards}[SECOND]
    assert 2 < kept < {shard.name: shard.samples for shard in open_index(shards).shards}[SECOND]
    assert samples_of(index).items() <= samples_of(open_index(shards)).items()
    assert found(copy) == {}


def foreign(directory: Path, *shards: dict[str, bytes]) -> Path:
    """Shards that others wrote, without an index."""
    directory.mkdir(exist_ok=True)
    for number, files in enumerate(shards):
        (directory / f"{number}.tar").write_bytes(tar_of(files))
    return directory


ONE, TWO, THREE = (some_jpeg(seed) for seed in range(3))


@pytest.mark.parametrize(
    ("files", "expected", "left"),
    [
        ({"a.jpg": ONE, "b.jpg": b""}, {Kind.EMPTY: 1}, {"a"}),
        ({"a.jpg": ONE, "b.jpg": b"no image"}, {Kind.NOT_AN_IMAGE: 1}, {"a"}),
        ({"a.jpg": ONE, "b.jpg": TWO[:-200]}, {Kind.DAMAGED: 1}, {"a"}),
        ({"a.jpg": ONE, "b.cls": b"1", "b.json": b"{}"}, {Kind.MISSING: 1}, {"a"}),
        ({"a.jpg": ONE, "a.cls": b"1", "b.jpg": TWO, "b.cls": b"2"}, {Kind.BAD_LABEL: 1}, {"a", "b"}),
        ({"a.jpg": ONE, "a.cls": b"1", "b.jpg": TWO, "b.cls": b"\xff"}, {Kind.BAD_LABEL: 1}, {"a", "b"}),
    ],
)
def test_samples_that_cannot_be_used(
    files: dict[str, bytes], expected: dict[Kind, int], left: set[str], tmp_path: Path
) -> None:
    foreign(tmp_path, {**files, "a.txt": b"kept"})
    (tmp_path / "index.json").write_text(json.dumps({"format": 1, "classes": ["x", "y"]}))
    assert found(tmp_path) == {Kind.INDEX: 1, Kind.UNUSED: 1 + ("b.json" in files), **expected}
    assert main(["check", str(tmp_path), "--repair", "--jobs", "1"]) == 0
    index = open_index(tmp_path)
    assert index.classes == ("x", "y")
    samples = list(webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False))
    assert {s["__key__"] for s in samples} == left
    assert (samples[0]["jpg"], samples[0]["txt"], samples[0].get("cls")) == (ONE, b"kept", files.get("a.cls"))
    assert found(tmp_path) == {Kind.UNUSED: 1}


def test_a_lost_label_is_not_taken_for_none(tmp_path: Path) -> None:
    files = {"a.jpg": ONE, "a.cls": b"1", "b.jpg": TWO, "b.cls": b"1", "c.jpg": THREE, "c.cls": b"0"}
    file = foreign(tmp_path, files) / "0.tar"
    flip(file, places(file)["b.cls"][0] - 512)
    assert found(tmp_path) == {Kind.INDEX: 1, Kind.TAR: 1}
    assert main(["check", str(tmp_path), "--repair", "--jobs", "1"]) == 0
    assert samples_of(open_index(tmp_path)) == {"a": (ONE, 1), "b": (TWO, -1), "c": (THREE, 0)}
    head, line = map(json.loads, (tmp_path / "repair.jsonl").read_text().splitlines())
    assert (head["kept"], head["lost"], head["lost_labels"]) == (3, 0, 1)
    assert line == {"shard": "0.tar", "sample": "b.jpg", "reason": "label lost"}


def test_a_key_twice_in_a_shard_becomes_two_keys(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("a.cls", b"0"), ("a.jpg", ONE), ("a.cls", b"1"), ("a.jpg", TWO)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (tmp_path / "0.tar").write_bytes(buffer.getvalue())
    assert found(tmp_path) == {Kind.INDEX: 1, Kind.KEY_TWICE: 2}
    assert main(["check", str(tmp_path), "--repair", "--jobs", "1"]) == 0
    assert samples_of(open_index(tmp_path)) == {"a": (ONE, 0), "a-2": (TWO, 1)}


def test_repetitions_across_shards_and_warnings_are_information(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_a_warning = THREE[:-2] + b"\x12\x34" * 4 + THREE[-2:]
    foreign(
        tmp_path,
        {"a.jpg": ONE, "x/b.jpg": TWO},
        {"x/b.jpg": THREE, "c.jpg": ONE, "d.jpg": ONE},
        {"w.jpg": with_a_warning},
    )
    write_index(tmp_path)
    assert found(tmp_path) == {Kind.KEY_IN_SHARDS: 2, Kind.SAME_IMAGE: 2, Kind.WARNING: 1}
    assert main(["check", str(tmp_path), "--jobs", "1"]) == 0
    told = capsys.readouterr().out
    assert "1.tar: c.jpg (equals 0.tar: a.jpg), 1.tar: d.jpg (equals 1.tar: c.jpg)" in told
    assert "0.tar: x/b, 1.tar: x/b" in told
    assert told.splitlines()[-1] == "sound"


def test_missing_unknown_and_empty_shards(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "000000.tar").unlink()
    (copy / "new.tar").write_bytes(tar_of({"n.jpg": ONE, "n.cls": b"3"}))
    (copy / "none.tar").write_bytes(tar_of({}))
    assert found(copy) == {Kind.SHARD_GONE: 1, Kind.SHARD_UNKNOWN: 2}
    assert main(["check", str(copy), "--jobs", "1"]) == 1
    assert "restore what is missing" in capsys.readouterr().out.splitlines()[-1]
    assert run_cli(main, ["check", str(copy), "--repair", "--jobs", "1"]) == 2
    assert "000000.tar is missing" in capsys.readouterr().err
    assert main(["index", str(copy), "--jobs", "1"]) == 0
    before = {file.name: file.read_bytes() for file in copy.glob("*.tar")}
    assert main(["check", str(copy), "--repair", "--jobs", "1"]) == 0
    assert {file.name: file.read_bytes() for file in copy.glob("*.tar")} == before
    index = open_index(copy)
    assert [shard.name for shard in index.shards] == sorted(before)
    assert len(index.classes) == 18
    assert found(copy) == {}


def test_another_shard_under_an_indexed_name_loses_nothing(copy: Path) -> None:
    replace(copy / SECOND, lambda files: dict(list(files.items())[2:]))
    assert found(copy) == {Kind.SHARD_CHANGED: 1}
    count = len(places(copy / SECOND)) // 2
    assert main(["check", str(copy), "--repair", "--jobs", "1"]) == 0
    assert {shard.name: shard.samples for shard in open_index(copy).shards}[SECOND] == count


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 2}', '{"format": 1, "classes": []}'])
def test_a_damaged_index_is_a_finding(content: str, copy: Path) -> None:
    (copy / "index.json").write_text(content)
    assert found(copy) == {Kind.INDEX: 1}


def test_a_repair_of_nothing_that_is_left(tmp_path: Path) -> None:
    foreign(tmp_path, {"a.jpg": b"no image"})
    assert run_cli(main, ["check", str(tmp_path), "--repair", "--jobs", "1"]) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.tar.damaged", "repair.jsonl"]


def test_a_second_repair_keeps_the_first_ones_original(copy: Path) -> None:
    for seed in range(2):
        flip(copy / SECOND, sum(third(copy / SECOND, "jpg")) - 300 - seed)
        assert main(["check", str(copy), "--repair", "--jobs", "1"]) == 0
    assert {file.name for file in copy.glob("*.damaged*")} == {f"{SECOND}.damaged", f"{SECOND}.damaged-2"}


def test_a_sound_directory_is_not_repaired(copy: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in copy.iterdir()}
    assert main(["check", str(copy), "--repair", "--jobs", "1"]) == 0
    assert {file.name: file.stat().st_mtime_ns for file in copy.iterdir()} == before


def test_an_unreadable_shard_is_left_alone(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / SECOND).unlink()
    (copy / SECOND).mkdir()
    assert found(copy) == {Kind.SHARD_UNREADABLE: 1}
    assert main(["check", str(copy), "--jobs", "1"]) == 1
    assert "cannot be read" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(UsageError, match=r"nothing was repaired: 000001\.tar"):
        main(["check", str(copy), "--repair", "--jobs", "1"])


@pytest.mark.parametrize("location", ["nowhere", "{empty}", "s3://bucket/shards", "pipe:cat {{}}"])
@pytest.mark.parametrize("command", ["check", "index"])
def test_wrong_calls_are_one_line(
    command: str, location: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(main, [command, location.format(empty=tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mixmae: error:")
    assert error.count("\n") == 1


def test_every_reason_of_a_sample_is_a_kind() -> None:
    assert {reason.name for reason in Reason if reason < Reason.SHARD_GONE} <= {kind.name for kind in Kind}
