import gzip
import hashlib
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmae.trainer.data.faults import JPEG, PILLOW, Reason
from mixmae.trainer.data.index import INVALID_LABEL, UNLABELLED
from mixmae.trainer.data.shards.labels import LabelCodes
from mixmae.trainer.data.shards.members import DamagedTarError, Member, members, recover_members
from mixmae.trainer.data.shards.scan import scan_shard
from tests.helpers import tar_of

FILES = {
    "a.jpg": b"one" * 300,
    "a.cls": b"0",
    "d/b.x.PNG": b"",
    "d/b.json": b"{}",
    "notes": b"?",
    "d/e.png": b"5" * 512,
}


def write(folder: Path, content: bytes) -> Path:
    (folder / "0.tar").write_bytes(content)
    return folder / "0.tar"


def taken(content: bytes, found: list[Member]) -> list[tuple[str, str, bytes]]:
    return [(m.key, m.extension, content[m.offset : m.offset + m.size]) for m in found]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(format: int, tmp_path: Path) -> None:
    content = tar_of(FILES, format)
    found = list(members(write(tmp_path, content)))
    assert taken(content, found) == [
        ("a", "jpg", FILES["a.jpg"]),
        ("a", "cls", b"0"),
        ("d/b", "x.png", b""),
        ("d/b", "json", b"{}"),
        ("d/e", "png", b"5" * 512),
    ]
    assert recover_members(tmp_path / "0.tar") == found


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(format: int, tmp_path: Path) -> None:
    files = {f"{'folder/' * 40}ä{number}.jpg": bytes([number]) for number in range(3)}
    found = list(members(write(tmp_path, tar_of(files, format))))
    assert [f"{m.key}.{m.extension}" for m in found] == list(files)


def test_members_about_the_shard_are_no_samples(tmp_path: Path) -> None:
    found = list(members(write(tmp_path, tar_of({"__a.b__": b"1", "__c.jpg": b"2", "d/__e.f__": b"3"}))))
    assert [m.key for m in found] == ["__c", "d/__e"]


def test_tables_hold_one_row_a_sample(tmp_path: Path) -> None:
    files = {
        "a.cls": b"2",
        "a.jpg": b"A",
        "b.jpg": b"B",
        "b.cls": b" 1\n",
        "c.jpeg": b"C",
        "d.cls": b"0",
        "e.webp": b"",
    }
    file = write(tmp_path, tar_of(files | {"f.png": b"F", "f.cls": b"7", "g.png": b"G", "g.cls": b"w"}))
    states = {b"A": JPEG, b"B": PILLOW, b"C": JPEG, b"": Reason.EMPTY, b"F": JPEG, b"G": PILLOW}
    shard, table, names, *_ = scan_shard(file, states.__getitem__, classes=("x", "y", "z"))
    content = file.read_bytes()
    assert shard == ("0.tar", 7, len(content), hashlib.sha256(content).hexdigest())
    assert [content[row["offset"] : row["offset"] + row["size"]] for row in table] == [
        b"A",
        b"B",
        b"C",
        b"",
        b"",
        b"F",
        b"G",
    ]
    assert table["label"].tolist() == [2, 1, -1, 0, -1, INVALID_LABEL, INVALID_LABEL - 1]
    assert names == ["w"]
    assert table["state"].tolist() == [
        JPEG, PILLOW, JPEG, Reason.MISSING, Reason.EMPTY, JPEG, PILLOW
    ]  # fmt: skip
    assert table["hash"][0] == xxhash.xxh3_64_intdigest(b"A")


@pytest.mark.parametrize(
    ("text", "classes", "label"),
    [
        (b"3", [], 3),
        (b" 3\n", [], 3),
        (b"3", ["a", "b", "c"], INVALID_LABEL),
        (b"b\n", ["a", "b", "c"], 1),
        (b"-1", [], UNLABELLED),
        (b"", [], UNLABELLED),
        (b" \n", [], UNLABELLED),
        (b"-2", [], INVALID_LABEL),
        (b"2147483648", [], INVALID_LABEL),
        (b"1.0", [], INVALID_LABEL),
        (b"\xff\xfe", [], INVALID_LABEL),
        (b"two\nlines", [], INVALID_LABEL),
        (b"x" * 1000, [], INVALID_LABEL),
        ("größe".encode(), [], INVALID_LABEL - 1),
    ],
)
def test_labels_are_numbers_or_names(text: bytes, classes: list[str], label: int) -> None:
    assert LabelCodes(classes).encode(text) == label


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "empty"),
        (lambda content: content[:700], "unexpected end"),
        (lambda content: content[:1536], "without the mark that ends a tar"),
        (lambda content: content[:1700], "no valid header at byte 1536"),
        (lambda content: content[:1540] + b"?" + content[1541:], "no valid header at byte 1536"),
        (lambda content: b"?" + content[1:], "bad checksum"),
        (gzip.compress, "compressed with gzip"),
        (lambda content: b"no tar at all", "header"),
    ],
)
def test_damaged_tars_are_found(damage: object, message: str, tmp_path: Path) -> None:
    assert callable(damage)
    file = write(tmp_path, damage(tar_of(FILES)))
    with pytest.raises(DamagedTarError, match=message):
        list(members(file))
    with pytest.raises(DamagedTarError, match=message):
        scan_shard(file, lambda image: JPEG)


def test_an_empty_tar_is_whole(tmp_path: Path) -> None:
    shard, table, *_ = scan_shard(write(tmp_path, tar_of({})), lambda image: JPEG)
    assert (shard.samples, len(table)) == (0, 0)


LONG = {f"{'folder/' * 20}{number}.jpg": bytes([number]) * 700 for number in range(3)} | FILES


@settings(max_examples=150, deadline=None)
@given(st.integers(0), st.integers(1, 255), st.sampled_from([FILES, LONG]))
def test_one_flipped_byte_costs_no_other_member(
    tmp_path_factory: pytest.TempPathFactory, at: int, flip: int, files: dict[str, bytes]
) -> None:
    content = tar_of(files)
    end = len(content.rstrip(b"\0"))
    at %= end
    file = write(tmp_path_factory.mktemp("flipped"), content)
    whole = taken(content, list(members(file)))
    damaged = content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :]
    file.write_bytes(damaged)
    saved = taken(damaged, recover_members(file))
    assert len([one for one in whole if one not in saved]) <= 1
    with suppress(DamagedTarError):
        assert len(list(members(file))) >= len(whole) - 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0))
def test_a_cut_costs_nothing_before_it(tmp_path_factory: pytest.TempPathFactory, at: int) -> None:
    content = tar_of(FILES)
    at %= len(content) - 9216  # the padding that may be missing
    file = write(tmp_path_factory.mktemp("cut"), content)
    whole = [m for m in members(file) if m.offset + m.size <= at]
    file.write_bytes(content[:at])
    assert recover_members(file) == whole
    if at < len(content.rstrip(b"\0")):
        with pytest.raises(DamagedTarError):
            list(members(file))
