import importlib.util
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixmae.base.errors import UsageError
from mixmae.trainer.data.decode import center_resized_crop
from mixmae.trainer.data.faults import PILLOW, UnusableError
from mixmae.trainer.data.inspection import inspect_image
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.cli import main
from mixmae.trainer.data.shards.source import Source, unique
from mixmae.trainer.data.shards.sources import open_source
from tests.helpers import tar_of


def add_image(file: Path, colour: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), (colour, 0, 0)).save(file)
    return file


def labels(source: Source) -> dict[str, int]:
    return {entry.key: entry.label for entry in source.entries}


def test_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    junk = ("__MACOSX/dog/1.png", "dog/.ipynb_checkpoints/2.png", "dog/._1.png")
    for name in ("dog/1.png", "a cat/x/1.v2.jpg", "a cat/x/1_v2.jpg", "v1.0/k..x.JPEG", "empty/notes.txt", *junk):
        folder, _, file = name.rpartition("/")
        if file.endswith("txt"):
            (tmp_path / folder).mkdir(parents=True)
            (tmp_path / name).write_text("no image")
        else:
            add_image(tmp_path / name)
    source = open_source(str(tmp_path))
    assert source.classes == ["a cat", "dog", "v1.0"]
    assert labels(source) == {"a cat/x/1_v2": 0, "a cat/x/1_v2-2": 0, "dog/1": 1, "v1.0/k__x": 2}
    assert capsys.readouterr().err.splitlines() == [
        "not used: 3 hidden files or folders: __MACOSX, ._1.png, .ipynb_checkpoints",
        "not used: 1 .txt files: empty/notes.txt",
        "not used: 1 folders without images: empty",
    ]
    for entry in source.entries:
        extension, content = source.read(entry)
        assert content == Path(source.locate(entry)).read_bytes()
        assert (len(content), extension) == (entry.size, Path(source.locate(entry)).suffix[1:].lower())
    assert pickle.loads(pickle.dumps(source)) == source


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for name in ("a.b.jpg", "a_b.jpg", "a_b.png", "a_b-2.jpg"):
        add_image(tmp_path / name)
    source = open_source(str(tmp_path))
    assert source.classes == []
    assert set(labels(source).values()) == {-1}
    assert len(labels(source)) == 4


def test_keys_are_unique() -> None:
    assert list(unique(["a", "b", "a", "a-2", "a"])) == ["a", "b", "a-2", "a-2-2", "a-3"]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / b"\xff\n.jpg".decode("utf-8", "surrogateescape")).write_bytes(b"x")
    source = open_source(str(tmp_path))
    assert [entry.key for entry in source.entries] == ["\ufffd_"]
    assert source.read(source.entries[0]) == ("jpg", b"x")


@pytest.mark.parametrize(
    ("name", "text", "expected", "classes"),
    [
        ("l.csv", "path,label\nx/1.png,7\n\nx/2.png,3\n", {"x/1": 7, "x/2": 3}, []),
        ("l.csv", '\ufefflabel,path\r\ncat,x/1.png\r\n"a, dog",x/2.png\r\n', {"x/1": 1, "x/2": 0}, ["a, dog", "cat"]),
        ("l.csv", "path\nx/1.png\nx/1.png\n", {"x/1": -1, "x/1-2": -1}, []),
        ("l.CSV", "path,label\nx/1.png,\n", {"x/1": -1}, []),
        ("l.csv", "path,label\nx/1.png,\nx/2.png,7\n", {"x/1": -1, "x/2": 7}, []),
        ("l.csv", "path,label\nx/1.png,cat\nx/2.png,-1\n", {"x/1": 0, "x/2": -1}, ["cat"]),
        ("l.csv", "path,label\nx/1.png, cat\nx/2.png,cat \n", {"x/1": 0, "x/2": 0}, ["cat"]),
        ("l.csv", "path,label\nx/1.png, 7\nx/2.png,  \n", {"x/1": 7, "x/2": -1}, []),
        ("l.csv", "path,label\nx/1.png,nan\nx/2.png,1e5\n", {"x/1": 1, "x/2": 0}, ["1e5", "nan"]),
        ("l.jsonl", '{"path": "x/1.png", "label": 2}\n\n{"label": "0", "path": "x/2.png"}', {"x/1": 2, "x/2": 0}, []),
        (
            "l.jsonl",
            '{"path": "x/1.png", "label": "b"}\n{"path": "x/2.png", "label": "a"}',
            {"x/1": 1, "x/2": 0},
            ["a", "b"],
        ),
        (
            "l.jsonl",
            '{"path": "x/1.png", "label": ["b", "a"]}\n{"path": "x/2.png", "label": ["a"]}\n'
            '{"path": "x/1.png", "label": []}',
            {"x/1": 2, "x/2": 1, "x/1-2": 0},
            [",", "a,", "b,a"],
        ),
        ("l.jsonl", '{"path": "x/../x/1.png"}\n{"path": "x/2.png", "label": null}', {"x/x/1": -1, "x/2": -1}, []),
    ],
)
def test_lists(name: str, text: str, expected: dict[str, int], classes: list[str], tmp_path: Path) -> None:
    for number in (1, 2):
        add_image(tmp_path / f"x/{number}.png", number)
    (tmp_path / name).write_text(text, encoding="utf-8")
    source = open_source(str(tmp_path / name))
    assert labels(source) == expected
    assert source.classes == classes
    assert [source.read(entry)[1] for entry in source.entries] == [
        Path(source.locate(entry)).read_bytes() for entry in source.entries
    ]


def test_lists_may_name_absolute_paths(tmp_path: Path) -> None:
    image = add_image(tmp_path / "images" / "1.png")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "l.csv").write_text(f"path\n{image}\n../images/1.png\n")
    source = open_source(str(tmp_path / "lists" / "l.csv"))
    assert [entry.key for entry in source.entries] == [str(image)[1:-4], "images/1"]
    assert {source.read(entry)[1] for entry in source.entries} == {image.read_bytes()}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "", "line 1: columns ''; expected a header"),
        ("l.csv", "x/1.png,3\n", "line 1: columns 'x/1.png, 3'; expected a header"),
        ("l.csv", "path,lable\nx/1.png,3\n", "line 1: columns 'path, lable'"),
        ("l.csv", "path,label\n", "lists no images"),
        ("l.csv", "path,label\nx/1.png\n", "line 2: expected 2 fields"),
        ("l.csv", "path,label\nx/1.png,1,2\n", "line 2: expected 2 fields"),
        ("l.csv", "path,label\n,1\n", "line 2: path ''"),
        ("l.csv", 'path\n"x/1.png\n', "line 2: unexpected end"),
        ("l.csv", "path,label\nx/1.png,1\nx/2.png,1\n", r"line 3: .*2\.png does not exist"),
        ("l.csv", "path,label\nx/1.png,1\nx/1.png,-2\n", "line 3: label -2; expected a whole number, 0 or more, or -1"),
        ("l.csv", "path,label\nx/1.png,1.5\n", r"line 2: label 1\.5"),
        ("l.csv", "path,label\nx/1.png,2147483648\n", "line 2: label 2147483648"),
        ("l.csv", "path,label\nx/1.png,1\nx/1.png,cat\n", "line 3 has a name \\(cat\\), line 2 has a number"),
        ("l.csv", "path\nx\n", "line 2: .*/x is a directory"),
        ("l.csv", "path\nnotes.txt\n", "line 2: notes.txt is no jpg"),
        ("l.csv", "path,label\nx/1.png,c\0t\n", r"line 2: label 'c\\x00t'; expected at most 200 printable"),
        ("l.csv", f"path,label\nx/1.png,{'x' * 201}\n", "line 2: label 'xxx.*expected at most 200 printable"),
        ("l.jsonl", "\n\n", "lists no images"),
        ("l.jsonl", "[" * 100_000, "line 1: not JSON: it is nested too deeply"),
        ("l.jsonl", '{"path": "x/1.png"}\n{', "line 2: not JSON"),
        ("l.jsonl", '{"path": "x/1.png", "path": "x/2.png"}', "line 1: not JSON: the key 'path' stands twice"),
        ("l.jsonl", '["x/1.png"]', "line 1: expected"),
        ("l.jsonl", '{"label": 1}', "line 1: expected"),
        ("l.jsonl", '{"path": "x/1.png", "cls": 1}', "line 1: expected"),
        ("l.jsonl", '{"path": 1}', "line 1: path 1"),
        ("l.jsonl", '{"path": "x/1.png", "label": [1]}', r"line 1: label \[1\]"),
        (
            "l.jsonl",
            '{"path": "x/1.png", "label": ["a,b"]}',
            r"line 1: label \['a,b'\]; .* a list of names without commas",
        ),
        ("l.jsonl", '{"path": "x/1.png", "label": true}', "line 1: label True"),
        ("l.txt", "x/1.png", "is no source; expected"),
    ],
)
def test_wrong_lists_are_explained_by_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    add_image(tmp_path / "x/1.png")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        open_source(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_lists_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes(b"path\n\xff\xfe.png\n")
    with pytest.raises(UsageError, match=r"is not UTF-8 text \(it has a byte 0xff\); save it as UTF-8"):
        open_source(str(tmp_path / "l.csv"))


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\nb", b"\x1b[31m"])
def test_a_class_that_cannot_be_shown_is_refused(name: bytes, tmp_path: Path) -> None:
    add_image(tmp_path / os.fsdecode(name) / "1.png")
    with pytest.raises(UsageError, match=r"class folder '.*' of .*: expected a name of up to 200 printable") as caught:
        open_source(str(tmp_path))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("is_indexed", [True, False])
def test_shards(is_indexed: bool, shards: Path, tmp_path: Path) -> None:
    index = open_index(shards)
    for shard in index.shards:
        (tmp_path / shard.name).symlink_to(shards / shard.name)
    if is_indexed:
        (tmp_path / "index.json").symlink_to(shards / "index.json")
    source = open_source(str(tmp_path))
    assert source.classes == (list(index.classes) if is_indexed else [])
    assert [source.read(entry) for entry in source.entries] == [("jpg", index.read(n)) for n in range(len(index))]
    assert [entry.label for entry in source.entries] == index.samples["label"].tolist()
    assert [f"{index.shards[index.samples[n]['shard']].name}: {e.key}.jpg" for n, e in enumerate(source.entries)] == [
        index.name_of(n) for n in range(len(index))
    ]


def test_faults_of_shards_are_found_when_their_samples_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"a.jpg": b"A", "a.cls": b"0", "b.jpg": b"B", "b.cls": b"5", "c.cls": b"1", "c.json": b"{}", "d.png": b""}
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    (tmp_path / "1.tar").write_bytes(tar_of({"a.jpg": b"C"}))
    (tmp_path / "index.json").write_text(json.dumps({"classes": ["x", "y"]}))
    source = open_source(str(tmp_path))
    found = {}
    for entry in source.entries:
        try:
            found[entry.key] = (entry.label, source.read(entry)[1].decode())
        except UnusableError as error:
            found[entry.key] = (entry.label, error.reason.label)
    assert found == {
        "a": (0, "A"),
        "b": (-1, "B"),
        "c": (1, "missing"),
        "d": (-1, ""),
        "a-2": (-1, "C"),
    }
    unused, unlabelled = capsys.readouterr().err.splitlines()
    assert unused.startswith("not used: 1 .json files of samples without an image (.jpg, ")
    assert unlabelled == "unlabelled: 1 images with a label that is no class: b"


def test_damaged_shards_are_no_source(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes((shards / "000000.tar").read_bytes()[:5000])
    with pytest.raises(UsageError, match=r"0.tar is not a whole, uncompressed tar: .* --repair"):
        open_source(str(tmp_path))
    tarfile.open(tmp_path / "0.tar", "w").close()
    with pytest.raises(UsageError, match="hold no samples"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("kind", ["nothing", "empty", "fifo", "url", "pipe"])
def test_what_is_no_source_is_explained(kind: str, tmp_path: Path) -> None:
    messages = {
        "nothing": "does not exist; expected a folder",
        "empty": "holds no images",
        "fifo": "is a FIFO; expected a folder of images",
        "url": "is a URL",
        "pipe": "is a URL",
    }
    os.mkfifo(tmp_path / "list.csv")
    fifo, nothing = str(tmp_path / "list.csv"), str(tmp_path / "x")
    location = {"nothing": nothing, "fifo": fifo, "url": "s3://bucket/x", "pipe": "pipe:cat {}"}.get(
        kind, str(tmp_path)
    )
    with pytest.raises(UsageError, match=messages[kind]):
        open_source(location)


def test_images_beside_class_folders_are_unlabelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("1.png", "cat/1.png", "dog/1.png"):
        add_image(tmp_path / name)
    source = open_source(str(tmp_path))
    assert (labels(source), source.classes) == ({"1": -1, "cat/1": 0, "dog/1": 1}, ["cat", "dog"])
    assert capsys.readouterr().err == "unlabelled: 1 images beside class folders: 1.png\n"


def test_links_in_folders_are_followed_and_circles_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "set"
    for name in ("real/cat/1.jpg", "real/cat/sub/2.jpg", "set/dog/3.jpg", "elsewhere/4.jpg"):
        add_image(tmp_path / name)
    (root / "cat").symlink_to(tmp_path / "real" / "cat")
    (root / "dog" / "4.jpg").symlink_to(tmp_path / "elsewhere" / "4.jpg")
    (root / "dog" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "dog" / "round").symlink_to(root)
    (tmp_path / "real" / "cat" / "back").symlink_to(tmp_path / "real" / "cat")
    os.mkfifo(root / "dog" / "5.jpg")
    source = open_source(str(root))
    assert labels(source) == {"cat/1": 0, "cat/sub/2": 0, "dog/3": 1, "dog/4": 1}
    assert capsys.readouterr().err.splitlines() == [
        "not used: 2 links back to a folder that they lie in: back, round",
        "not used: 1 entries that are neither files nor folders: dog/5.jpg",
        "cannot be read: 1 links to nothing: dog/gone.jpg",
    ]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_image(tmp_path / "cat" / "1.png")
    add_image(tmp_path / "dog" / "1.png")
    scan = os.scandir

    def refuse(folder: Path) -> object:
        if folder.name == "dog":
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"cannot list the images in .*dog: Permission denied"):
        open_source(str(tmp_path))


def test_other_formats_and_odd_extensions_become_samples(tmp_path: Path) -> None:
    names = ("a.jfif", "b.jpeg.jpg", "c.GIF", "d.tif", "e.TIFF", "f.bmp", "g.jpe", "h.input.png", "i.ppm", "j.avif")
    formats = {"jfif": "JPEG", "jpe": "JPEG", "jpg": "JPEG", "tif": "TIFF"}
    (tmp_path / "set").mkdir()
    for name in names:
        extension = name.rpartition(".")[2].lower()
        Image.new("RGB", (20, 10)).save(tmp_path / "set" / name, formats.get(extension, extension.upper()))
    index = build_shards(open_source(str(tmp_path / "set")), tmp_path / "out", 10**6, 0, 1).index
    assert len(index) == len(names)
    assert (index.samples["state"] <= PILLOW).all()
    again = build_shards(open_source(str(tmp_path / "out")), tmp_path / "again", 10**6, 0, 1).index
    assert sorted(again.samples["hash"]) == sorted(index.samples["hash"])


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "Validation", "test"), ("train",)])
def test_parts_of_a_data_set_are_no_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        add_image(tmp_path / name / "cat" / "1.png")
    with pytest.raises(UsageError) as caught:
        open_source(str(tmp_path))
    commands = [f"'mixmae shards build {tmp_path / name} OUT/{name}'" for name in names]
    assert all(command in str(caught.value) for command in commands)
    assert open_source(str(tmp_path / names[0])).classes == ["cat"]
    add_image(tmp_path / "lorry" / "1.png")
    assert open_source(str(tmp_path)).classes == sorted([*names, "lorry"])


def test_every_file_that_is_left_out_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_image(tmp_path / "set" / "cat" / "1.png")
    (tmp_path / "set" / "cat" / "text.png").write_text("no image")
    for number in range(5):
        (tmp_path / "set" / "cat" / f"{number}.xmp").write_text("")
    assert main(["build", str(tmp_path / "set"), str(tmp_path / "out"), "--jobs", "1"]) == 0
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert {(Path(one["source"]).name, one["reason"]) for one in listed} == {
        *((f"{number}.xmp", ".xmp files") for number in range(5)),
        ("text.png", "not an image"),
    }
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"skipped 1 not an image: {tmp_path}/set/cat/text.png; all of them in {tmp_path}/out/skipped.jsonl",
        f"5 files of the source are no samples; each with its reason in {tmp_path}/out/skipped.jsonl",
    ]


def test_heic_becomes_png_of_the_same_pixels(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif: pip install 'mixmae[heic]'")
    heif.register_heif_opener()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    (tmp_path / "set").mkdir()
    for name in ("a.heic", "b.HEIF", "phone.jpg"):
        image.save(tmp_path / "set" / name, "HEIF")
    index = build_shards(open_source(str(tmp_path / "set")), tmp_path / "out", 10**6, 0, 1).index
    with Image.open(tmp_path / "set" / "a.heic", formats=["HEIF"]) as opened:
        expected = np.asarray(opened)
    for sample in range(3):
        stored = Image.open(io.BytesIO(index.read(sample)))
        assert stored.format == "PNG"
        assert not stored.getexif()
        assert np.array_equal(np.asarray(stored), expected)


def test_heic_without_its_package_is_refused_before_hours_of_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "IMG_1.HEIC").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"1 HEIC images \(IMG_1.HEIC\) need pillow-heif: pip install 'mixmae"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("white", "black", "black")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    content = buffer.getvalue()
    assert inspect_image(content) == PILLOW
    assert center_resized_crop(content, PILLOW, 16).min() > 250
