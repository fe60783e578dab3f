import errno
import hashlib
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from mixmae.base.errors import UsageError
from mixmae.trainer.data.faults import Reason, UnusableError
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.cli import main
from mixmae.trainer.data.shards.indexing import write_index
from tests.helpers import tar_of


def test_shards_are_webdataset_shards(shards: Path) -> None:
    index = open_index(shards)
    urls = [str(shards / shard.name) for shard in index.shards]
    theirs = {s["__key__"]: (s["jpg"], int(s["cls"])) for s in webdataset.WebDataset(urls, shardshuffle=False)}
    assert len(theirs) == len(index) == 54
    for number in range(len(index)):
        key = index.name_of(number).split(": ")[1].removesuffix(".jpg")
        assert theirs[key] == (index.read(number), index.samples[number]["label"])


def test_index_tells_counts_sizes_and_checksums(shards: Path) -> None:
    index = open_index(shards)
    assert len(index.shards) > 2
    for number, shard in enumerate(index.shards):
        content = (shards / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert shard.samples == int((index.samples["shard"] == number).sum())


def test_an_index_can_be_made_for_foreign_shards(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy, ignore=shutil.ignore_patterns("index.json", "samples.npy"))
    assert main(["index", str(copy), "--jobs", "1"]) == 0
    assert np.array_equal(open_index(copy).samples, open_index(shards).samples)


def test_an_index_made_again_keeps_the_names_of_the_classes(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    assert main(["index", str(tmp_path / "copy"), "--jobs", "1"]) == 0
    assert open_index(tmp_path / "copy").fingerprint == open_index(shards).fingerprint


def test_what_cannot_be_used_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"a.jpg": b"", "b.json": b"{}", "c.PNG": b"no image", "d.webp": b"", "notes": b"", "e.cls": b"1"}
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    assert main(["index", str(tmp_path), "--jobs", "1"]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == (
        "5 samples cannot be used (2 empty, 2 missing, 1 not an image): "
        "0.tar: a.jpg, 0.tar: b.json, 0.tar: c.PNG and 2 more"
    )
    index = open_index(tmp_path)
    assert index.samples["state"].tolist() == [
        Reason.EMPTY, Reason.MISSING, Reason.NOT_AN_IMAGE, Reason.EMPTY, Reason.MISSING
    ]  # fmt: skip
    assert index.samples["label"].tolist() == [-1, -1, -1, -1, 1]
    with pytest.raises(UnusableError) as caught:
        index.read(0)
    assert caught.value.reason == Reason.EMPTY


def test_what_changed_since_is_told(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    index = open_index(tmp_path / "copy")
    assert index.shard_sizes().tolist() == [shard.bytes for shard in index.shards]
    (tmp_path / "copy" / "000000.tar").unlink()
    with (tmp_path / "copy" / "000001.tar").open("ab") as stream:
        stream.write(b"more")
    was = index.shards[1].bytes
    assert index.shard_sizes().tolist()[:2] == [-1, was + 4]
    (tmp_path / "copy" / "000001.tar").unlink()
    fewer = write_index(tmp_path / "copy", index.classes)
    assert (
        fewer.first_difference(index.listing()) == "000000.tar had name=000000.tar, now 000002.tar with name=000002.tar"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("empty tar", "hold no images"),
        ("cut tar", r"0\.tar is not a whole, .* 'mixmae shards check"),
        ("none", "no .tar"),
    ],
)
def test_what_cannot_be_indexed_is_explained(damage: str, message: str, tmp_path: Path) -> None:
    if damage == "empty tar":
        tarfile.open(tmp_path / "0.tar", "w").close()
    elif damage == "cut tar":
        (tmp_path / "0.tar").write_bytes(tar_of({"a.jpg": b"x" * 2000})[:1500])
    with pytest.raises(UsageError, match=message):
        main(["index", str(tmp_path), "--jobs", "1"])


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", read_only)
    (tmp_path / "0.tar").write_bytes(b"never read")
    with pytest.raises(UsageError, match=r"files cannot be written there \(Read-only file system\)"):
        write_index(tmp_path)


@pytest.mark.parametrize("listing", [{}, {"shards": None}, {"shards": [1]}, {"shards": [{"name": "a"}]}])
def test_a_damaged_listing_of_a_run_is_no_traceback(listing: dict[str, Any], shards: Path) -> None:
    assert "then abc" in open_index(shards).first_difference({"fingerprint": "abc", **listing})


def test_a_fifo_in_place_of_a_shard_costs_its_samples_and_no_time(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    index = open_index(tmp_path / "copy")
    (tmp_path / "copy" / index.shards[0].name).unlink()
    os.mkfifo(tmp_path / "copy" / index.shards[0].name)
    with pytest.raises(UnusableError, match="is a FIFO, expected a regular file"):
        index.read(0)
