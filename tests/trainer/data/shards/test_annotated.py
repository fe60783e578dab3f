"""Shards with annotations: built, resumed, indexed, checked and repaired."""

import hashlib
import io
import json
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask
from pycocotools.coco import COCO

from mixmae.base.errors import UsageError, run_cli
from mixmae.trainer.data.decode import upright_size
from mixmae.trainer.data.dense.label_maps import parse_label_map
from mixmae.trainer.data.dense.objects import parse_objects
from mixmae.trainer.data.faults import Reason, UnusableError
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.integrity import require_annotations
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.check import check_shards
from mixmae.trainer.data.shards.cli import main
from mixmae.trainer.data.shards.findings import Kind
from mixmae.trainer.data.shards.scenes import Scenes
from mixmae.trainer.data.shards.source import Entry
from tests.helpers import tar_of

SIZES = [(30, 40), (48, 32), (25, 25), (40, 20)]
SQUARE = [[4.0, 4.5, 19.2, 4.0, 20.0, 19.0, 5.0, 20.0]]
RUNS = {"size": [48, 32], "counts": [100, 30, 18, 30, 1358]}


def picture(seed: int, height: int, width: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(buffer, format)
    return buffer.getvalue()


def an_object(number: int, image: int, **fields: Any) -> dict[str, Any]:
    usual = {"category_id": 7, "bbox": [4, 4, 16, 16], "area": 240.5, "iscrowd": 0, "segmentation": SQUARE}
    return {"id": number, "image_id": image} | usual | fields


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Four images, the third without objects: polygons, a crowd of runs, compressed runs, and objects that are none."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    names = ["a.jpg", "sub/b.jpg", "c.jpg", "d.png"]
    for number, (name, size) in enumerate(zip(names, SIZES, strict=True)):
        (tmp_path / "images" / name).write_bytes(picture(number, *size, "PNG" if name == "d.png" else "JPEG"))
    compressed = mask.encode(np.asfortranarray(np.eye(40, 20, dtype=np.uint8)))
    objects = [
        an_object(1, 10),
        an_object(2, 10, category_id=3, segmentation=[*SQUARE, [25, 5, 30, 5, 30, 10]]),
        an_object(3, 20, iscrowd=1, bbox=[2, 4, 2, 30], segmentation=RUNS),
        an_object(4, 40, segmentation={"size": [40, 20], "counts": compressed["counts"].decode()}),
        an_object(5, 10, bbox=[41, 3, 5, 5]),
        an_object(6, 10, bbox=[3, 3, 0, 5]),
        an_object(7, 10, segmentation=[]),
        an_object(8, 10, segmentation=[[1.0, 1.0, 2.0, 2.0]]),
        an_object(9, 10, segmentation={"size": [40, 30], "counts": [0, 1200]}),
        an_object(10, 10, segmentation={"size": [30, 40], "counts": [0, 1201]}),
    ]
    content = {
        "images": [
            {"id": 10 * (number + 1), "file_name": name, "height": size[0], "width": size[1]}
            for number, (name, size) in enumerate(zip(names, SIZES, strict=True))
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": objects,
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


def build(folder: Path, out: str = "out", *options: str) -> ShardIndex:
    argv = ["build", str(folder / "images"), str(folder / out), "--shard-size", "5KB", "--jobs", "1", *options]
    assert main(argv) == 0
    return open_index(folder / out)


def keys(index: ShardIndex) -> dict[str, int]:
    """Samples by the names of their members."""
    return {index.name_of(sample).split(": ")[1]: sample for sample in range(len(index))}


def test_objects_are_those_that_pycocotools_reads(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = build(coco, "out", "--coco", str(coco / "instances.json"))
    assert (index.annotations, index.classes, index.category_ids) == ("objects", ("cat", "dog"), (3, 7))
    told = capsys.readouterr().out
    assert "left out 6 objects (2 empty mask, 1 outside image, 1 empty box" in told
    lines = [json.loads(line) for line in (coco / "out" / "skipped.jsonl").read_text().splitlines()]
    assert Counter(line["reason"] for line in lines) == {
        "outside image": 1,
        "empty box": 1,
        "empty mask": 2,
        "annotation of another size": 1,
        "damaged mask": 1,
    }
    oracle = COCO(coco / "instances.json")
    samples = keys(index)
    assert sorted(samples) == ["a.jpg", "c.jpg", "d.png", "sub/b.jpg"]
    for image in oracle.loadImgs(oracle.getImgIds()):
        sample = samples[image["file_name"]]
        found = parse_objects(index.read_annotation(sample), *upright_size(index.read(sample)))
        expected = [one for one in oracle.imgToAnns[image["id"]] if one["id"] < 5]
        assert found.ids.tolist() == [one["id"] for one in expected]
        assert [index.category_ids[number] for number in found.classes] == [one["category_id"] for one in expected]
        assert found.crowd.tolist() == [bool(one["iscrowd"]) for one in expected]
        assert found.areas.tolist() == [one["area"] for one in expected]
        assert len(found.boxes) == len(expected)
        for i, one in enumerate(expected):
            assert np.array_equal(found.mask(i), oracle.annToMask(one))
            x, y, w, h = one["bbox"]
            assert found.boxes[i].tolist() == [x, y, x + w, y + h]
    require_annotations(index, "objects", "detection")
    assert main(["check", str(coco / "out"), "--jobs", "1"]) == 0
    assert main(["index", str(coco / "out"), "--jobs", "1"]) == 0
    assert open_index(coco / "out").fingerprint == index.fingerprint


def test_an_image_that_is_listed_twice_is_told(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where annotations of several people were put into one file: each would lack the objects of the others."""
    content = json.loads((coco / "instances.json").read_text())
    content["images"].append(content["images"][0] | {"id": 11, "file_name": "./a.jpg"})
    (coco / "instances.json").write_text(json.dumps(content))
    assert len(build(coco, "out", "--coco", str(coco / "instances.json"))) == 5
    assert "1 images are listed more than once" in capsys.readouterr().err


def test_a_file_of_boxes_alone_is_refused(coco: Path) -> None:
    content = json.loads((coco / "instances.json").read_text())
    for one in content["annotations"]:
        one["segmentation"] = []
    (coco / "instances.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"none of the 10 objects .*\(8 empty mask, .*; each needs a bbox and a mask"):
        build(coco, "out", "--coco", str(coco / "instances.json"))
    assert not (coco / "out").exists()


def test_images_of_another_size_than_their_file_says_are_left_out(coco: Path) -> None:
    """As are those whose objects were drawn before they were turned upright."""
    content = json.loads((coco / "instances.json").read_text())
    content["images"][1].update(height=32, width=48)
    del content["images"][2]["height"]
    content["images"][0].update(height=None, width=None)
    (coco / "instances.json").write_text(json.dumps(content))
    index = build(coco, "out", "--coco", str(coco / "instances.json"))
    assert sorted(keys(index)) == ["a.jpg", "c.jpg", "d.png"]
    lines = [json.loads(line) for line in (coco / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines if line["reason"] == "annotation of another size"] == ["sub/b", "a"]
    assert [line["detail"] for line in lines if line["key"] == "sub/b"] == [
        "32 x 48 pixels by the COCO file, 48 x 32 as a viewer shows the image"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["images"].append({"id": 50, "file_name": "e.jpg"}), r"1 of the 5 images .* e\.jpg"),
        (lambda content: content["images"].append(content["images"][0]), r"images\[4\]: id 10 is there twice"),
        (lambda content: content["images"][0].update(file_name=3), r"images\[0\]: file_name is 3; expected text"),
        (lambda content: content.pop("annotations"), "no 'annotations'"),
        (lambda content: content.pop("categories"), "no 'categories'"),
        (lambda content: content["annotations"][1].pop("bbox"), r"annotations\[1\] has no bbox"),
        (
            lambda content: content["annotations"][1].update(category_id=9),
            r"\[1\]: category_id is 9; .* 2 categories",
        ),
        (lambda content: content["annotations"][1].update(image_id=9), "1 annotations are of images that it does not"),
    ],
)
def test_what_is_no_coco_file_is_told(coco: Path, change: Any, message: str) -> None:
    content = json.loads((coco / "instances.json").read_text())
    change(content)
    (coco / "instances.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        main(["build", str(coco / "images"), str(coco / "out"), "--coco", str(coco / "instances.json")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coco", "{0}/instances.json", "--label-maps", "{0}"], "not both"),
        (["--reduce-zero-label"], "--reduce-zero-label goes with --label-maps DIR"),
        (["--class-names", "names.txt"], "--class-names goes with --label-maps DIR"),
        (["--coco", "{0}/none.json"], "cannot read .*none.json"),
        (["--label-maps", "{0}/none"], "none does not exist"),
        (["--label-maps", "{0}"], "has no label map of any image in"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    coco: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["build", str(coco / "images"), str(coco / "out"), *(one.format(coco) for one in options)]
    assert run_cli(main, argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mixmae: error:")
    assert any(part in error for part in (message, message.replace("cannot read .*none", "none")))


def label_map(seed: int, height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).choice(np.array([0, 1, 2, 150, 255], np.uint8), (height, width))


def save(file: Path, pixels: Any, mode: str | None = None) -> None:
    file.parent.mkdir(exist_ok=True)
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.fromarray(pixels, "L")
        image.putpalette(list(range(256)) * 3)
    image.save(file)


def test_label_maps_are_read_and_reduced(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 8 and 16 bits and with a palette; without one, and with one of another size, images are left out."""
    maps = {"a": label_map(0, *SIZES[0]), "sub/b": label_map(1, *SIZES[1]), "c": label_map(2, *SIZES[2])}
    save(coco / "maps" / "a.png", maps["a"])
    wide = maps["sub/b"].astype(np.uint16)
    save(coco / "maps" / "sub" / "b.png", np.where(wide == 255, 65535, wide).astype(np.uint16))
    save(coco / "maps" / "c.png", maps["c"], "P")
    index = build(coco, "plain", "--label-maps", str(coco / "maps"))
    assert (index.annotations, len(index.classes), index.classes[-1]) == ("segments", 151, "150")
    assert "skipped 1 missing annotation" in capsys.readouterr().out
    reduced = build(coco, "reduced", "--label-maps", str(coco / "maps"), "--reduce-zero-label")
    assert len(reduced.classes) == 150
    for name, expected in maps.items():
        for one, values in ((index, expected), (reduced, np.where(expected == 255, 0, expected) - np.uint8(1))):
            sample = next(number for key, number in keys(one).items() if key.startswith(f"{name}."))
            assert np.array_equal(parse_label_map(one.read_annotation(sample), *expected.shape), values)
    assert set(index.samples["label"]) == {-1}
    save(coco / "maps" / "d.png", label_map(3, 20, 40))
    (coco / "maps" / "c.png").write_bytes(b"no image")
    save(coco / "maps" / "a.png", np.zeros((*SIZES[0], 3), np.uint8))
    (coco / "names.txt").write_text("\n".join(f"class {number}" for number in range(100)))
    why = ": (no PNG|a PNG of mode RGB; expected one channel|there is label|a label map of)"
    told = rf"none of the 4 images .*\(2 damaged annotation, 1 bad label, 1 ann.*{why}"
    with pytest.raises(UsageError, match=told):
        build(coco, "bad", "--label-maps", str(coco / "maps"), "--class-names", str(coco / "names.txt"))
    for names, message in (
        (map(str, range(256)), "has 256 class names; label maps hold 1 to 255 classes"),
        ("aba", "names a more than once"),
    ):
        (coco / "names.txt").write_text("\n".join(names))
        with pytest.raises(UsageError, match=message):
            build(coco, "bad", "--label-maps", str(coco / "maps"), "--class-names", str(coco / "names.txt"))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_label_maps_of_few_bits_are_numbers_of_classes(bits: int) -> None:
    """Pillow stretches grey of 2 and 4 bits to 0..255, and writes none: a PNG by the standard, of 4 x 8 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    labels = np.arange(32).reshape(4, 8) % 2**bits
    lines = b"".join(b"\0" + sum(int(x) << bits * i for i, x in enumerate(row[::-1])).to_bytes(bits) for row in labels)
    header = struct.pack(">IIBBBBB", 8, 4, bits, 0, 0, 0, 0)
    parts = {b"IHDR": header, b"IDAT": zlib.compress(lines), b"IEND": b""}
    content = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items())
    assert np.array_equal(parse_label_map(content, 4, 8), labels)


def test_labels_beyond_what_a_target_holds_are_refused() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(buffer, "PNG")
    with pytest.raises(UnusableError, match="label 300; expected 0 to 254, the 255 classes") as caught:
        parse_label_map(buffer.getvalue(), 4, 4)
    assert caught.value.reason == Reason.BAD_LABEL


class Breaking(Scenes):
    def read(self, entry: Entry) -> tuple[str, bytes]:
        if entry.reference == self.at:
            raise PermissionError("locked")
        return super().read(entry)

    at = 0


def test_a_build_with_annotations_continues(tmp_path: Path) -> None:
    source = Scenes(12, 48, 0, "objects")
    with pytest.raises(UsageError, match="the same command continues"):
        build_shards(Breaking(12, 48, 0, "objects"), tmp_path / "out", 15_000, 0, 1)
    assert list((tmp_path / "out.partial").glob("*.tar"))
    index = build_shards(source, tmp_path / "out", 15_000, 0, 1).index
    assert index.fingerprint == build_shards(source, tmp_path / "at once", 15_000, 0, 1).index.fingerprint
    assert len(index.shards) > 1


@pytest.mark.parametrize("kind", ["objects", "segments"])
def test_annotations_stay_with_their_images(kind: Any, tmp_path: Path) -> None:
    """When scenes are built, sharded again, and indexed anew."""
    source = Scenes(12, 48, 0, kind)
    index = build_shards(source, tmp_path / "out", 15_000, 0, 1).index
    annotations = {index.read(sample): index.read_annotation(sample) for sample in range(12)}
    expected = {source.read(entry)[1]: source.annotation(entry, b"") for entry in source.entries}
    assert annotations == expected
    assert main(["build", str(tmp_path / "out"), str(tmp_path / "again"), "--jobs", "1"]) == 0
    again = open_index(tmp_path / "again")
    assert {again.read(sample): again.read_annotation(sample) for sample in range(12)} == annotations
    assert (again.classes, again.annotations) == (index.classes, kind)
    assert main(["index", str(tmp_path / "again"), "--jobs", "1"]) == 0
    assert open_index(tmp_path / "again").fingerprint == again.fingerprint


def test_masks_of_scenes_do_not_overlap_and_fit_their_boxes(tmp_path: Path) -> None:
    index = build_shards(Scenes(20, 48, 0, "objects"), tmp_path / "out", 100_000, 0, 1).index
    counts = []
    for sample in range(20):
        found = parse_objects(index.read_annotation(sample), *upright_size(index.read(sample)))
        counts.append(len(found))
        masks = [found.mask(i) for i in range(len(found))]
        assert not masks or np.sum(masks, 0).max() == 1
        for visible, box in zip(masks, found.boxes, strict=True):
            y, x = np.nonzero(visible)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert min(counts) == 0
    assert max(counts) > 3


def test_indices_without_annotations_are_what_they_were(shards: Path) -> None:
    """Format 2, and a fingerprint of the sample table, shards and classes alone."""
    index, content = open_index(shards), json.loads((shards / "index.json").read_text())
    digest = hashlib.sha256(np.load(shards / "samples.npy").tobytes())
    digest.update(json.dumps([[list(shard.values()) for shard in content["shards"]], content["classes"]]).encode())
    assert (content["format"], content["fingerprint"]) == (2, digest.hexdigest())
    assert sorted(content) == ["classes", "fingerprint", "format", "shards"]
    assert index.annotations is None
    assert index.annotation_table is None
    assert not (shards / "annotations.npy").exists()
    with pytest.raises(UsageError, match=r"needs shards with objects, but those in .* have no annotations; .* --coco"):
        require_annotations(index, "objects", "detection")


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    build_shards(Scenes(12, 48, 0, "objects"), tmp_path / "scenes", 1_000_000, 0, 1)
    return tmp_path / "scenes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table[:-1], "do not belong together"),
        (lambda table: table[["offset", "size"]], r"damaged or out of reach \(annotations.npy is no table"),
    ],
)
def test_a_changed_table_is_refused(scenes: Path, change: Any, message: str) -> None:
    np.save(scenes / "annotations.npy", change(np.load(scenes / "annotations.npy")))
    with pytest.raises(UsageError, match=message):
        open_index(scenes)


def test_a_missing_table_is_named(scenes: Path) -> None:
    (scenes / "annotations.npy").unlink()
    with pytest.raises(UsageError, match=r"has no annotations\.npy: run 'mixmae shards index"):
        open_index(scenes)


def findings(directory: Path) -> dict[Kind, int]:
    return dict(Counter(finding.kind for finding in check_shards(directory, 1).report.findings))


def overwrite(file: Path, row: Any, content: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(int(row["offset"]))
        stream.write(content.ljust(int(row["size"])))


def test_annotations_that_changed_are_found_read_and_repaired(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, tar = open_index(scenes), scenes / "000000.tar"
    assert index.annotation_table is not None
    sizes = index.annotation_table["size"]
    first, second = np.flatnonzero(sizes > 100)[:2]
    kept = {index.read(sample): index.read_annotation(sample) for sample in range(12) if sample not in (first, second)}
    overwrite(tar, index.annotation_table[first], b"[]")
    overwrite(tar, index.annotation_table[second], b"{]")
    assert findings(scenes) == {Kind.SHARD_CHANGED: 1, Kind.ANNOTATION_CHANGED: 1, Kind.DAMAGED_ANNOTATION: 1}
    with pytest.raises(UnusableError, match=r"other bytes in 000000\.tar than were indexed"):
        index.read_annotation(int(first))
    assert main(["check", str(scenes), "--repair", "--jobs", "1"]) == 0
    assert "2 lost" in capsys.readouterr().out
    repaired = open_index(scenes)
    assert {repaired.read(sample): repaired.read_annotation(sample) for sample in range(len(repaired))} == kept
    assert findings(scenes) == {}


def test_shards_of_others_are_judged_sample_by_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted by reason when they are indexed and when they are checked; a repair leaves what cannot be used out."""
    good = {"category": 1, "bbox": [4, 4, 16, 16], "segmentation": SQUARE, "id": 1}
    files = {
        "a.jpg": picture(0, 30, 40),
        "a.objects.json": json.dumps([good, good | {"id": 2, "segmentation": []}]).encode(),
        "b.jpg": picture(1, 30, 40),
        "c.jpg": picture(2, 30, 40),
        "c.objects.json": b'[{"category": "dog"}]',
        "d.jpg": picture(3, 30, 40),
        "d.objects.json": b"[]",
    }
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    assert main(["index", str(tmp_path), "--jobs", "1"]) == 0
    told = capsys.readouterr().out
    assert "not used: 1 annotations (empty mask): 0.tar: a.jpg, object 2" in told
    assert "not used: 1 annotations (missing annotation): 0.tar: b.jpg" in told
    assert "not used: 1 annotations (damaged annotation): 0.tar: c.jpg" in told
    index = open_index(tmp_path)
    assert (index.annotations, index.classes) == ("objects", ("0", "1"))
    states = [int(state) for state in index.annotation_table["state"]]  # type: ignore[index]
    assert states == [0, Reason.MISSING_ANNOTATION, Reason.DAMAGED_ANNOTATION, 0]
    with pytest.raises(UnusableError) as caught:
        index.read_annotation(1)
    assert caught.value.reason == Reason.MISSING_ANNOTATION
    with pytest.raises(UsageError, match=r"2 of 4 .* \(1 missing annotation, 1 damaged annotation\): 0.tar: b.jpg"):
        require_annotations(index, "objects", "detection")
    assert len(parse_objects(index.read_annotation(0), 30, 40)) == 1
    expected = {Kind.MISSING_ANNOTATION: 1, Kind.DAMAGED_ANNOTATION: 1, Kind.EMPTY_MASK: 1}
    assert findings(tmp_path) == expected
    assert main(["check", str(tmp_path), "--repair", "--jobs", "1"]) == 0
    assert findings(tmp_path) == {}
    assert len(open_index(tmp_path)) == 2


def test_two_kinds_of_annotations_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(buffer, "PNG")
    files = {"a.jpg": picture(0, 30, 40), "a.objects.json": b"[]", "b.jpg": picture(1, 30, 40)}
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    (tmp_path / "1.tar").write_bytes(tar_of({"c.jpg": picture(2, 30, 40), "c.seg.png": buffer.getvalue()}))
    with pytest.raises(UsageError, match=r"shards with \.objects\.json and \.seg\.png files; expected one kind"):
        main(["index", str(tmp_path), "--jobs", "1"])
    shutil.rmtree(tmp_path)
