"""What is in shards and no sample uses is counted and named; nothing is called sound that lost something."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mixmae.trainer.data.faults import JPEG, PILLOW
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.cli import main
from mixmae.trainer.data.shards.members import members
from tests.helpers import tar_of


def picture(shade: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (shade, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def tar_with(files: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    """A tar of files, and then of entries without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = entry(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in others:
            tar.addfile(info)
    return buffer.getvalue()


def run(command: str, directory: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    code = main([command, str(directory), "--jobs", "1", *arguments])
    return code, capsys.readouterr().out.splitlines()


FILES = {"d/a.jpg": picture(1), "d/a.cls": b"0", "b.jpg": picture(2), "b.cls": b"1"}


def test_links_within_a_tar_are_resolved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    links = (
        entry("hard.jpg", tarfile.LNKTYPE, "d/a.jpg"),
        entry("d/soft.jpg", tarfile.SYMTYPE, "../b.jpg"),
        entry("d/soft.cls", tarfile.SYMTYPE, "../b.cls"),
        entry("chain.jpg", tarfile.SYMTYPE, "./d/soft.jpg"),
    )
    (tmp_path / "0.tar").write_bytes(tar_with(FILES, *links))
    assert run("index", tmp_path, capsys)[1][1:] == ["unlabelled: 2 of 5 images"]
    index = open_index(tmp_path)
    assert sorted(index.samples["label"].tolist()) == [-1, -1, 0, 1, 1]
    assert {index.read(sample) for sample in range(5)} == {picture(1), picture(2)}
    assert run("check", tmp_path, capsys)[0] == 0


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (entry("x.jpg", tarfile.SYMTYPE, "/data/x.jpg"), "links to what is not in the tar"),
        (entry("x.jpg", tarfile.SYMTYPE, "../../x.jpg"), "links to what is not in the tar"),
        (entry("x.jpg", tarfile.LNKTYPE, "gone.jpg"), "links to what is not in the tar"),
        (entry("x.jpg", tarfile.SYMTYPE, "x.jpg"), "links to what is not in the tar"),
        (entry("x.jpg", tarfile.FIFOTYPE), "devices or FIFOs"),
        (entry("x.jpg", tarfile.CHRTYPE), "devices or FIFOs"),
    ],
)
def test_a_member_without_content_is_named_and_not_sound(
    other: tarfile.TarInfo, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "0.tar").write_bytes(tar_with(FILES, other))
    assert f"cannot be read: 1 {reason}: x.jpg" in run("index", tmp_path, capsys)[1]
    code, told = run("check", tmp_path, capsys)
    assert (code, told[0].split()[:4]) == (1, ["fault", "member", "without", "content"])
    assert run("check", tmp_path, capsys, "--repair")[0] == 0
    assert json.loads((tmp_path / "repair.jsonl").read_text().splitlines()[1])["sample"] == "x.jpg"
    assert run("check", tmp_path, capsys)[1][-1] == "sound"
    assert len(open_index(tmp_path)) == 2


def test_a_sparse_member_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GNU's format 1.0: the file's map stands before its data, and its size is not the size in the tar."""
    info = entry("d/GNUSparseFile.0/x.jpg")
    data = b"1\n0\n512\n".ljust(512, b"\0") + b"x" * 512
    info.size = len(data)
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "d/x.jpg",
        "GNU.sparse.realsize": "100000",
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(data))
    (tmp_path / "0.tar").write_bytes(buffer.getvalue())
    (tmp_path / "1.tar").write_bytes(tar_with(FILES))
    assert "cannot be read: 1 sparse files, which are stored in pieces: d/x.jpg" in run("index", tmp_path, capsys)[1]


def test_names_with_dots_are_images_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"img.v2.{n:04d}.jpg": picture(n) for n in range(12)} | {"img.v2.0003.cls": b"5"}
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    assert "12 images" in run("index", tmp_path, capsys)[1][0]
    index = open_index(tmp_path)
    assert (index.samples["state"] == JPEG).all()
    assert index.samples["label"].tolist() == [-1] * 3 + [5] + [-1] * 8
    assert run("check", tmp_path, capsys)[1][-1] == "sound"


@pytest.mark.parametrize("name", ["0.input.jpg", "0.jpeg.jpg", "0.v1.2.png", "0.gif", "0.tif", "0.jfif", "0.a.tiff"])
def test_compound_extensions_and_other_formats_are_images(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = {"gif": "GIF", "tif": "TIFF", "tiff": "TIFF", "png": "PNG"}.get(name.rpartition(".")[2], "JPEG")
    (tmp_path / "0.tar").write_bytes(tar_of({name: picture(9, kind), "0.cls": b"2"}))
    assert run("index", tmp_path, capsys)[0] == 0
    (row,) = open_index(tmp_path).samples
    assert (row["state"] in (JPEG, PILLOW), row["label"]) == (True, 2)
    assert run("check", tmp_path, capsys)[0] == 0


def test_beside_a_usual_image_others_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"0.jpg": picture(1), "0.depth.png": picture(2, "PNG"), "0.json": b"{}", ".hidden.jpg": b"", "notes": b""}
    files |= {"__about__": b"", "./.ipynb_checkpoints/0.jpg": picture(3), "__MACOSX/1.jpg": b""}
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    (tmp_path / "1.TAR").write_bytes(b"")
    (tmp_path / "more").mkdir()
    _, told = run("index", tmp_path, capsys)
    assert "1 images" in told[0]
    assert sorted(told[1:]) == [
        "not used: 1 .json files: 0.json",
        "not used: 1 files about the shard (__NAME__): __about__",
        "not used: 1 files of the shard directory that are not called *.tar: 1.TAR",
        "not used: 1 files without an extension: notes",
        "not used: 1 images of samples that have a .jpg already: 0.depth.png",
        "not used: 1 subdirectories of the shard directory: more",
        "not used: 3 hidden files or folders: .hidden.jpg, ./.ipynb_checkpoints/0.jpg, __MACOSX/1.jpg",
    ]
    code, checked = run("check", tmp_path, capsys)
    assert (code, checked[-1]) == (0, "sound")
    assert "information  not used" in checked[0]


def test_a_format_that_is_not_read_is_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.tar").write_bytes(tar_of({"0.heic": b"x", "1.jpg": picture(1)}))
    told = run("index", tmp_path, capsys)[1]
    assert ": 1 images, 0 classes" in told[0]
    assert told[1].startswith("not used: 1 .heic files of samples without an image (.jpg, .jpeg, ")
    assert told[2] == "1 samples cannot be used (1 missing): 0.tar: 0.heic"


def test_a_repair_lists_all_that_it_drops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.tar").write_bytes(tar_of({"0.heic": b"x", "0.json": b"{}", "1.jpg": picture(1)}))
    assert run("check", tmp_path, capsys, "--repair")[0] == 0
    head, *lines = map(json.loads, (tmp_path / "repair.jsonl").read_text().splitlines())
    assert (head["kept"], head["lost"]) == (1, 2)
    assert {line["sample"] for line in lines} == {"0.heic", "0.json"}


CHANGED: dict[str, Callable[[dict[str, bytes]], dict[str, bytes]]] = {
    "names": lambda files: {**files, "a.cls": b"dog", "b.cls": b"cat\n", "c.cls": b"dog"},
    "some names": lambda files: {**files, "a.cls": b"dog"},
    "mixed": lambda files: {**files, "a.cls": b"dog", "b.cls": b"3"},
    "unlabelled": lambda files: {**files, "a.cls": b"-1", "b.cls": b""},
    "nonsense": lambda files: {**files, "a.cls": b"\xff", "b.cls": b"-7", "c.cls": b"1.5"},
}
EXPECTED: dict[str, tuple[list[int], tuple[str, ...]]] = {
    "names": ([1, 0, 1], ("cat", "dog")),
    "some names": ([0, -1, -1], ("dog",)),
    "mixed": ([-2, 3, -1], ()),
    "unlabelled": ([-1, -1, -1], ()),
    "nonsense": ([-2, -2, -2], ()),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_no_label_keeps_an_image_from_being_used(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = CHANGED[kind]({f"{name}.jpg": picture(n) for n, name in enumerate("abc")})
    (tmp_path / "0.tar").write_bytes(tar_of({name: files[name] for name in sorted(files) if name[0] == "a"}))
    (tmp_path / "1.tar").write_bytes(tar_of({name: files[name] for name in sorted(files) if name[0] != "a"}))
    _, told = run("index", tmp_path, capsys)
    index = open_index(tmp_path)
    labels, classes = EXPECTED[kind]
    assert (index.samples["label"].tolist(), index.classes) == (labels, classes)
    assert (index.samples["state"] <= PILLOW).all()
    assert any("with a label that is no class" in line for line in told) == (-2 in labels)
    fingerprint = index.fingerprint
    run("index", tmp_path, capsys)
    assert open_index(tmp_path).fingerprint == fingerprint
    assert run("check", tmp_path, capsys)[0] == (1 if -2 in labels else 0)
    assert run("check", tmp_path, capsys, "--repair")[0] == 0
    assert len(open_index(tmp_path)) == 3
    assert run("check", tmp_path, capsys)[1][-1] == "sound"


@pytest.mark.parametrize("is_indexed", [True, False])
def test_a_name_among_numbers_is_no_class(is_indexed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"a.jpg": picture(1), "a.cls": b"1", "b.jpg": picture(2), "b.cls": b"1 2"}
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    if is_indexed:
        run("index", tmp_path, capsys)
    told = run("check", tmp_path, capsys)[1]
    assert any(line.split() == ["fault", "label", "that", "is", "no", "class", "1", "0.tar:", "b.jpg"] for line in told)
    assert not any("other than was indexed" in line for line in told)


def test_another_class_name_than_was_indexed_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"a.jpg": picture(1), "a.cls": b"cat"}
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    run("index", tmp_path, capsys)
    (tmp_path / "0.tar").write_bytes(tar_of({**files, "a.cls": b"dog"}))
    assert any("0.tar: a.jpg ('dog', 0 when indexed)" in line for line in run("check", tmp_path, capsys)[1])


def test_a_link_is_a_member_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar_with(FILES, entry("c.png", tarfile.LNKTYPE, "d/a.jpg")))
    first, *_, last = members(tmp_path / "0.tar")
    assert (last.key, last.extension, last.offset, last.size) == ("c", "png", first.offset, first.size)
