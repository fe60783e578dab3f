"""Tars that were made to mislead a reader end in one line, quickly, and name the shard."""

import io
import os
import re
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from mixmae.base.errors import UsageError, run_cli
from mixmae.trainer.data.faults import Reason
from mixmae.trainer.data.shards.cli import main
from mixmae.trainer.data.shards.files import shard_bytes
from mixmae.trainer.data.shards.indexing import write_index
from mixmae.trainer.data.shards.members import DamagedTarError, members, recover_members
from mixmae.trainer.data.shards.scan import MAX_FILE_BYTES, SampleTable, scan_shard
from tests.helpers import tar_of

GOOD = tar_of({"a.jpg": b"x" * 600, "b.jpg": b"y" * 600}, tarfile.USTAR_FORMAT)


def with_header(content: bytes, at: int, change: Callable[[bytearray], None]) -> bytes:
    """The tar with another header at an offset, and its checksum put right."""
    header = bytearray(content[at : at + 512])
    change(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + 512 :]


def size_of(number: int) -> Callable[[bytearray], None]:
    def change(header: bytearray) -> None:
        header[124:136] = (
            b"\x80" + number.to_bytes(11, "big") if number >= 0 else (256**12 + number).to_bytes(12, "big")
        )

    return change


def pax(*records: bytes) -> bytes:
    """A tar whose first member has an extended header of these records, right or wrong."""
    body = b"".join(records)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, len(body)
        tar.addfile(info, io.BytesIO(body))
        info = tarfile.TarInfo("c.jpg")
        info.size = 600
        tar.addfile(info, io.BytesIO(b"z" * 600))
    return buffer.getvalue()


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(str(length)) + len(key) + len(value) + 3 != length:
        length = len(str(length)) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def chain(kind: bytes, links: int) -> bytes:
    """Extended headers, each of which is followed by another one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for _ in range(links):
            info = tarfile.TarInfo("chain")
            info.type, info.size = kind, 5
            tar.addfile(info, io.BytesIO(b"name\0"))
    return buffer.getvalue()


HOSTILE = {
    "size that leads back to itself": with_header(GOOD, 0, size_of(-512)),
    "size that leads back": with_header(GOOD, 1536, size_of(-1536 - 512)),
    "size that leads before the start": with_header(GOOD, 0, size_of(-10_000)),
    "most negative size": with_header(GOOD, 0, size_of(-(2**63))),
    "largest size": with_header(GOOD, 0, size_of(2**87)),
    "size beyond 64 bits in an extended header": pax(record(b"size", b"9" * 40)),
    "negative size in an extended header": pax(record(b"size", b"-512")),
    "size that is no number": pax(record(b"size", b"many")),
    "record of length 0": pax(b"0 a=b\n"),
    "record of a length that lies": pax(b"9999999 a=b\n"),
    "record without an equals sign": pax(b"7 abcd\n"),
    "map of a sparse file that is no map": pax(record(b"GNU.sparse.map", b"1,b,2"), record(b"GNU.sparse.size", b"9")),
    "sparse file of 2^80 bytes": pax(record(b"GNU.sparse.size", b"1" + b"0" * 24), record(b"GNU.sparse.map", b"0,5")),
    "sparse file without its map": pax(record(b"GNU.sparse.major", b"1"), record(b"GNU.sparse.minor", b"0")),
    "long names in a chain": chain(tarfile.GNUTYPE_LONGNAME, 200),
    "extended headers in a chain": chain(tarfile.XHDTYPE, 200),
    "times that are no numbers": pax(record(b"mtime", b"nan"), record(b"uid", b"x")),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tars_end_in_words(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "0.tar"
    file.write_bytes(HOSTILE[kind])
    found = recover_members(file)
    assert all(0 <= member.offset <= member.offset + member.size <= len(HOSTILE[kind]) for member in found)
    with suppress(DamagedTarError):
        members(file)
    assert run_cli(main, ["index", str(tmp_path), "--jobs", "1"]) in (0, 2)
    told = capsys.readouterr()
    assert not re.search("Traceback|literal|Python|argument|offset-sized|unpack", told.err)
    assert any(words in told.err + told.out for words in ("0.tar", "1 shards", "hold no images"))
    assert run_cli(main, ["check", str(tmp_path), "--jobs", "1"]) == 1
    assert run_cli(main, ["check", str(tmp_path), "--jobs", "1", "--repair"]) in (0, 2)


def test_a_flood_of_damage_takes_no_longer_than_reading(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(with_header(GOOD, 1536, size_of(-1536 - 512)) * 20)
    assert {member.name for member in recover_members(tmp_path / "0.tar")} >= {"a.jpg"}


def test_an_image_larger_than_the_index_can_say_is_too_large_and_not_read(tmp_path: Path) -> None:
    file = tmp_path / "0.tar"
    header = with_header(tar_of({"a.jpg": b""}, tarfile.USTAR_FORMAT)[:512], 0, size_of(MAX_FILE_BYTES + 1))
    with file.open("wb") as stream:  # sparse on the disk
        stream.write(header)
        stream.truncate(512 + MAX_FILE_BYTES + 1 + 10_240)

    def never(image: bytes) -> int:
        raise AssertionError("read")

    with shard_bytes(file) as content:
        (row,) = SampleTable(members(file), content, never, ()).table
    assert (row["state"], row["size"]) == (Reason.TOO_LARGE, 0)


@pytest.mark.parametrize("command", ["index", "check", "build"])
def test_a_fifo_is_no_shard(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").write_bytes(GOOD)
    os.mkfifo(tmp_path / "shards" / "1.tar")
    arguments = [command, str(tmp_path / "shards"), *([str(tmp_path / "out")] if command == "build" else [])]
    assert run_cli(main, [*arguments, "--jobs", "1"]) == (1 if command == "check" else 2)
    told = capsys.readouterr()
    assert "is a FIFO, expected a regular file" in told.err + told.out


@pytest.mark.parametrize("kind", ["folder", "link to nothing", "circle of links"])
def test_other_things_called_tar_are_no_shards(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.tar").write_bytes(GOOD)
    if kind == "folder":
        (tmp_path / "1.tar").mkdir()
    else:
        (tmp_path / "1.tar").symlink_to("1.tar" if kind == "circle of links" else "nowhere")
    assert run_cli(main, ["index", str(tmp_path), "--jobs", "1"]) == 2
    assert "1.tar" in capsys.readouterr().err
    assert run_cli(main, ["check", str(tmp_path), "--jobs", "1"]) == 1
    assert "unreadable shard" in capsys.readouterr().out


def test_a_shard_that_is_truncated_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(GOOD)

    def truncate(image: bytes) -> int:
        os.truncate(tmp_path / "0.tar", 1000)
        return 0

    with pytest.raises(OSError, match=r"0\.tar was truncated at byte [0-9]+ while it was read"):
        scan_shard(tmp_path / "0.tar", truncate)


def test_shards_that_shrink_under_a_reader_never_kill_it(tmp_path: Path) -> None:
    file = tmp_path / "0.tar"
    file.write_bytes(GOOD)
    stop = threading.Event()

    def harass() -> None:
        while not stop.is_set():
            file.write_bytes(GOOD)
            time.sleep(0.001)
            os.truncate(file, 700)

    thread = threading.Thread(target=harass)
    thread.start()
    try:
        for _ in range(30):
            try:
                write_index(tmp_path)
            except UsageError as error:
                assert "0.tar" in str(error) or "no images" in str(error)  # noqa: PT017
    finally:
        stop.set()
        thread.join()
