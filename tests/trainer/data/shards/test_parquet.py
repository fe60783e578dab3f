"""Parquet files and image folders of the Hugging Face hub become shards."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixmae.base.errors import UsageError
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.cli import main
from mixmae.trainer.data.shards.sources import open_source

pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'mixmae[parquet]'")
pq = pytest.importorskip("pyarrow.parquet")


def image(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


IMAGES = [image(number, "JPEG" if number % 3 else "PNG") for number in range(20)]


def write(file: Path, rows: range, features: dict[str, Any] | None = None, **labels: Any) -> None:
    """Rows of IMAGES as the `datasets` library writes them."""
    cells = [{"bytes": IMAGES[row], "path": f"photos/{row}.png" if row % 2 else None} for row in rows]
    table = pa.table(
        {"image": pa.array(cells), **{name: values[rows.start : rows.stop] for name, values in labels.items()}}
    )
    if features is not None:
        told = {"image": {"_type": "Image"}, **features}
        table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": told}}).encode()})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=5)


def test_a_data_set_of_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels: list[int | None] = [row % 2 for row in range(19)] + [None]
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    for number, rows in enumerate((range(12), range(12, 20))):
        write(tmp_path / "set" / "data" / f"train-0000{number}-of-00002.parquet", rows, features, label=labels)
    write(tmp_path / "set" / "data" / "validation-00000-of-00001.parquet", range(4), features, label=labels)
    with pytest.raises(UsageError, match="holds train, validation: parts of a data set") as caught:
        main(["build", str(tmp_path / "set"), str(tmp_path / "out")])
    pattern = str(tmp_path / "set" / "data" / "train-*.parquet")
    assert f"'mixmae shards build '{pattern}' OUT/train'" in str(caught.value).replace('"', "'")
    assert main(["build", pattern, str(tmp_path / "out" / "train"), "--jobs", "1"]) == 0
    index = open_index(tmp_path / "out" / "train")
    found = {index.read(sample): int(index.samples["label"][sample]) for sample in range(len(index))}
    assert found == {content: -1 if label is None else label for content, label in zip(IMAGES, labels, strict=True)}
    assert index.classes == ("cat", "dog")
    names = {index.name_of(sample).partition(": ")[2] for sample in range(20)}
    assert {"photos/1.jpg", "train-00000-of-00002/00000000.png", "train-00001-of-00002/00000006.png"} <= names
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]


def test_labels_are_names_numbers_or_nothing(tmp_path: Path) -> None:
    def classes_and_labels(name: str, **labels: Any) -> tuple[tuple[str, ...], set[int]]:
        write(tmp_path / f"{name}.parquet", range(6), **labels)
        assert main(["build", str(tmp_path / f"{name}.parquet"), str(tmp_path / name), "--jobs", "1"]) == 0
        index = open_index(tmp_path / name)
        return index.classes, set(index.samples["label"].tolist())

    assert classes_and_labels("names", label=["b", "a", None, "b", "a", "b"]) == (("a", "b"), {-1, 0, 1})
    assert classes_and_labels("numbers", label=[3, 4, 5, 3, 4, 5]) == ((), {3, 4, 5})
    assert classes_and_labels("nothing", caption=["x"] * 6) == ((), {-1})
    several = classes_and_labels("several", label=[["b", "a"], ["a"], [], None, ["a"], ["a"]])
    assert several == ((",", "a,", "b,a"), {-1, 0, 1, 2})


def test_lists_of_a_class_label_have_its_names(tmp_path: Path) -> None:
    """Features as `datasets` 5.2 writes those of Sequence(ClassLabel(...))."""
    features = {"objects": {"feature": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "_type": "List"}}
    write(tmp_path / "set.parquet", range(3), features, objects=[[0, 1], [1], []])
    assert main(["build", str(tmp_path / "set.parquet"), str(tmp_path / "out"), "--jobs", "1"]) == 0
    index = open_index(tmp_path / "out")
    found = {index.read(sample): index.classes[index.samples["label"][sample]] for sample in range(3)}
    assert found == dict(zip(IMAGES, ("cat,dog", "dog,", ","), strict=False))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": ["a"]}, "has 0 columns of images among text; expected one"),
        ({"image": [b"x"], "png": [b"x"]}, "has 2 columns of images among image, png"),
        ({"image": [b"x"], "label": [0.5]}, "label holds values of the kind float"),
        ({"image": [b"x"], "label": [[0, 1]]}, r"label is \[0, 1\]; expected a list of class names without commas"),
        ({"image": [b"x"], "label": [-3]}, "label has values from -3 to -3"),
        ({"image": pa.array([], pa.binary())}, "no rows"),
        ({"image": [None], "label": [0]}, "has 0 columns of images among image, label"),
    ],
)
def test_what_is_no_data_set_is_one_line(table: dict[str, Any], message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(table), tmp_path / "set.parquet")
    with pytest.raises(UsageError, match=message):
        main(["build", str(tmp_path / "set.parquet"), str(tmp_path / "out"), "--jobs", "1"])
    assert [path.name for path in tmp_path.iterdir()] == ["set.parquet"]


FINE_AND_COARSE = {
    "fine_label": {"_type": "ClassLabel", "names": ["tulip", "wasp"]},
    "coarse_label": {"_type": "ClassLabel", "names": ["flower", "insect", "fish"]},
}


def test_of_several_columns_of_labels_one_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns: dict[str, Any] = {"fine_label": [0, 1, 1], "coarse_label": [0, 1, 2], "caption": ["x"] * 3}
    write(tmp_path / "set.parquet", range(3), FINE_AND_COARSE, **columns)
    argv = ["build", str(tmp_path / "set.parquet"), str(tmp_path / "out"), "--jobs", "1"]
    with pytest.raises(UsageError, match=r"has 2 columns of labels, .*; name one: --label-column fine_label"):
        main(argv)
    with pytest.raises(UsageError, match=r"--label-column x: .* has the columns image, fine_label, coarse_label, capt"):
        main([*argv, "--label-column", "x"])
    assert main([*argv, "--label-column", "coarse_label"]) == 0
    index = open_index(tmp_path / "out")
    assert (sorted(index.samples["label"].tolist()), index.classes) == ([0, 1, 2], ("flower", "insect", "fish"))
    assert f"not used: columns of {tmp_path / 'set.parquet'}: fine_label, caption" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--label-column goes with Parquet files"):
        main(["build", str(tmp_path / "out"), str(tmp_path / "again"), "--label-column", "label"])


@pytest.mark.parametrize(
    ("features", "columns"),
    [({}, {}), ({}, {"label": [0] * 3}), ({"label": FINE_AND_COARSE["coarse_label"]}, {"label": [0] * 3})],
)
def test_files_of_other_columns_are_refused(features: dict[str, Any], columns: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", range(3), {"label": FINE_AND_COARSE["fine_label"]}, label=[0] * 3)
    write(tmp_path / "b.parquet", range(3), features, **columns)
    with pytest.raises(UsageError, match=r"b.parquet has images image and .*a.parquet has images image and labels lab"):
        main(["build", str(tmp_path), str(tmp_path.parent / "out"), "--jobs", "1"])


def test_what_stands_beside_parquet_files_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "set"
    write(source / "data" / "a.parquet", range(3))
    for name in ("1.jpg", "data/b.PARQUET", "README.md", "more/2.jpg", ".gitattributes"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(IMAGES[0])
    assert main(["build", str(source), str(tmp_path / "out"), "--jobs", "1"]) == 0
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "not used: 1 .PARQUET files beside Parquet files: b.PARQUET",
        "not used: 1 .jpg files beside Parquet files: 1.jpg",
        "not used: 1 .md files beside Parquet files: README.md",
        "not used: 1 subdirectories beside Parquet files: more",
    ]


def test_files_called_train_and_test_are_parts(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / f"{name}.parquet", range(3))
    with pytest.raises(UsageError, match="holds test, train: parts of a data set") as caught:
        main(["build", str(tmp_path), str(tmp_path.parent / "out")])
    assert f"'mixmae shards build {tmp_path}/train.parquet OUT/train'" in str(caught.value)


def test_rows_whose_image_is_elsewhere_are_counted_as_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [{"bytes": IMAGES[0], "path": None}, {"bytes": None, "path": "/data/1.jpg"}, None, {"bytes": b""}]
    pq.write_table(pa.table({"image": pa.array(cells)}), tmp_path / "set.parquet")
    assert main(["build", str(tmp_path / "set.parquet"), str(tmp_path / "out"), "--jobs", "1"]) == 0
    assert "skipped 2 missing, 1 empty: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_an_image_folder_of_the_hub(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(image(number))
    rows = [{"file_name": f"{number}.png", "label": "ab"[number - 1], "text": "x"} for number in (1, 2)]
    csv = "\n".join(["file_name,label,text", *(",".join(row.values()) for row in rows)])
    (tmp_path / name).write_text(csv if name.endswith("csv") else "\n".join(map(json.dumps, rows)))
    source = open_source(str(tmp_path / name))
    assert {entry.key: source.classes[entry.label] for entry in source.entries} == {"1": "a", "2": "b"}
    assert capsys.readouterr().err == f"not used: columns of {tmp_path / name}: text\n"
