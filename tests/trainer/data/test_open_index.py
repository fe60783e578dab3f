import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmae.base.errors import UsageError
from mixmae.trainer.data.index import SAMPLE, Shard, Table, fingerprint_of
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.check import check_shards
from mixmae.trainer.data.shards.cli import main
from mixmae.trainer.data.shards.indexing import write_index


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no directory", "does not exist"),
        ("no index", "mixmae shards index"),
        ("nothing", "holds no .tar files"),
        ("no samples", "has no samples.npy"),
        ("cut samples", "damaged or out of reach"),
        ("other samples", r"lists \d+ images"),
        ("format", "format 99"),
        ("list", "damaged or out of reach"),
        ("half", "damaged or out of reach"),
    ],
)
def test_broken_directories_are_explained(shards: Path, tmp_path: Path, damage: str, message: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    samples = copy / "samples.npy"
    content = json.loads((copy / "index.json").read_text())
    if damage == "no directory":
        shutil.rmtree(copy)
    elif damage == "no index":
        (copy / "index.json").unlink()
    elif damage == "nothing":
        shutil.rmtree(copy)
        copy.mkdir()
    elif damage == "no samples":
        samples.unlink()
    elif damage == "cut samples":
        samples.write_bytes(samples.read_bytes()[:-5])
    elif damage == "other samples":
        np.save(samples, np.load(samples)[:-1])
    elif damage == "format":
        (copy / "index.json").write_text(json.dumps({**content, "format": 99}))
    elif damage == "list":
        (copy / "index.json").write_text("[1]")
    elif damage == "half":
        (copy / "index.json").write_text(json.dumps({"format": content["format"]}))
    with pytest.raises(UsageError, match=message):
        open_index(copy)


def change_rows(**fields: object) -> Callable[[Table, dict[str, Any]], None]:
    def change(samples: Table, content: dict[str, Any]) -> None:
        for field, value in fields.items():
            samples[field][3] = value

    return change


def change_shard(**fields: object) -> Callable[[Table, dict[str, Any]], None]:
    return lambda samples, content: content["shards"][1].update(fields)


def change_index(**fields: object) -> Callable[[Table, dict[str, Any]], None]:
    return lambda samples, content: content.update(fields)


def move_counts(samples: Table, content: dict[str, Any]) -> None:
    content["shards"][0]["samples"] += 1
    content["shards"][1]["samples"] -= 1


def negative_count(samples: Table, content: dict[str, Any]) -> None:
    first = content["shards"][0]["samples"] + 1
    content["shards"][1]["samples"] += first
    content["shards"][0]["samples"] = -1


CONTRADICTIONS = {
    "negative offset": change_rows(offset=-5),
    "offset behind the end": change_rows(offset=2**62),
    "largest offset": change_rows(offset=2**63 - 1),
    "negative size": change_rows(size=-1),
    "size of 2 GiB": change_rows(size=2**31 - 1),
    "shard that is not there": change_rows(shard=99),
    "shard -1": change_rows(shard=-1),
    "unknown state": change_rows(state=17),
    "state between": change_rows(state=5),
    "largest state": change_rows(state=255),
    "label -3": change_rows(label=-3),
    "rows reversed": lambda samples, content: samples.__setitem__(slice(None), samples[::-1].copy()),
    "counts moved": move_counts,
    "count below 0": negative_count,
    "count that is no whole number": change_shard(samples=10.5),
    "count that is true": change_shard(samples=True),
    "count that is text": change_shard(samples="12"),
    "bytes below 0": change_shard(bytes=-1),
    "fewer bytes than there are": change_shard(bytes=10),
    "name with folders": change_shard(name="../../etc/passwd"),
    "name with NUL": change_shard(name="x\0y"),
    "name that commands a terminal": change_shard(name="a\x1b[31m.tar"),
    "name that is no text": change_shard(name=5),
    "empty name": change_shard(name=""),
    "further key": change_shard(extra=1),
    "classes that are a number": change_index(classes=5),
    "classes that are no text": change_index(classes=[1, None]),
    "shards that are text": change_index(shards="abc"),
    "no shards": change_index(shards=[]),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_an_index_that_contradicts_itself_is_one_line(kind: str, shards: Path, tmp_path: Path) -> None:
    """Also one whose fingerprint was made to fit."""
    shutil.copytree(shards, tmp_path / "copy")
    samples = np.load(tmp_path / "copy" / "samples.npy")
    content = json.loads((tmp_path / "copy" / "index.json").read_text())
    CONTRADICTIONS[kind](samples, content)
    with suppress(TypeError):  # of what is no list of shards
        content["fingerprint"] = fingerprint_of([Shard(**s) for s in content["shards"]], content["classes"], samples)
    np.save(tmp_path / "copy" / "samples.npy", samples)
    (tmp_path / "copy" / "index.json").write_text(json.dumps(content))
    with pytest.raises(UsageError) as caught:
        open_index(tmp_path / "copy")
    assert str(tmp_path / "copy") in str(caught.value)
    assert "mixmae shards index" in str(caught.value)


@pytest.mark.parametrize(
    "table",
    [
        np.zeros(54),
        np.zeros((54, 1), SAMPLE),
        np.zeros(54, [*SAMPLE.descr, ("more", "u1")]),
        np.zeros(54, SAMPLE.newbyteorder(">")),
    ],
)
def test_a_table_of_another_kind_is_refused(table: Table, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    np.save(tmp_path / "copy" / "samples.npy", table)
    with pytest.raises(UsageError, match="is no table of samples"):
        open_index(tmp_path / "copy")


@pytest.mark.parametrize("text", ["{" * 100_000, "[" * 100_000, "NaN", "null", '"text"', '{"format": NaN}', "\0"])
def test_json_that_is_no_index(text: str, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    (tmp_path / "copy" / "index.json").write_text(text)
    with pytest.raises(UsageError, match="index"):
        open_index(tmp_path / "copy")


@pytest.mark.parametrize("name", ["index.json", "samples.npy"])
def test_a_fifo_in_place_of_an_index_is_refused(name: str, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    os.mkfifo(tmp_path / "copy" / name)
    with pytest.raises(UsageError, match="is a FIFO, expected a regular file"):
        open_index(tmp_path / "copy")


def test_a_table_that_is_truncated_under_a_run_does_not_reach_it(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    index = open_index(tmp_path / "copy")
    (tmp_path / "copy" / "samples.npy").write_bytes(b"")
    assert len(index.read(len(index) - 1)) == index.samples["size"][-1]


def test_a_directory_without_shards_says_what_to_type(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "1.JPG").write_bytes(b"x")
    photos, above, parts, packed = (tmp_path / name for name in ("photos", "above", "parts", "packed"))
    above.mkdir()
    (above / "train").symlink_to(shards)
    for name in ("train", "val"):
        shutil.copytree(photos, parts / name)
    packed.mkdir()
    (packed / "0.tgz").write_bytes(b"x")
    for directory, remedy in (
        (photos, f"it holds images; 'mixmae shards build {photos} {photos}-shards' makes shards of them"),
        (above, f"its folders hold shards; name one of them: {above}/train"),
        (parts, f"'mixmae shards build {parts}/train {parts}-shards/train' and 'mixmae shards build {parts}/val "),
        (packed, "it holds no .tar files but 0.tgz; expected tars that are not compressed"),
    ):
        for reader in (open_index, write_index, lambda place: check_shards(place, 1)):
            with pytest.raises(UsageError, match=re.escape(remedy)):
                reader(directory)


def test_an_index_apart_from_its_shards(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored, apart = tmp_path / "stored", tmp_path / "index" / "of-stored"
    stored.mkdir()
    for tar in shards.glob("*.tar"):
        shutil.copy(tar, stored)
    argv = ["index", str(stored), "--output", str(apart), "--jobs", "1"]
    assert main(argv) == 0
    assert f"the index is in {apart}; name it as data.shards" in capsys.readouterr().out
    assert not (stored / "index.json").exists()
    index = open_index(apart)
    assert [index.read(sample) for sample in (0, 53)] == [open_index(shards).read(sample) for sample in (0, 53)]
    assert index.fingerprint == write_index(shutil.copytree(stored, tmp_path / "copy")).fingerprint
    assert main(["check", str(apart), "--jobs", "1"]) == 0
    with next(iter(stored.glob("*.tar"))).open("r+b") as file:
        file.truncate(5000)
    assert main(["check", str(apart), "--jobs", "1"]) == 1
    with pytest.raises(UsageError, match=f"--repair rewrites shards, and those of {apart} are in {stored}"):
        main(["check", str(apart), "--jobs", "1", "--repair"])
    stored.rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=f"is of shards in {stored}, which does not exist; mount it"):
        open_index(apart)
