import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

from mixmae.base.errors import UsageError
from mixmae.trainer.data.stores.cache import BlockCache

PLACE = "0123456789abcdef"
FORK = multiprocessing.get_context("fork")


def _bytes_in(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob(f"{PLACE}/*/*"))


def _never() -> bytes:
    raise AssertionError("this block was here")


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_block_is_fetched_once(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "a" / "b", 100)
    assert cache.read(f"{PLACE}/0.tar/0", 2, 3, lambda: b"0123456789") == b"234"
    assert cache.read(f"{PLACE}/0.tar/0", 5, 5, _never) == b"56789"
    assert (cache.reads, cache.fetches) == (2, 1)
    assert BlockCache(tmp_path / "a" / "b", 100).read(f"{PLACE}/0.tar/0", 0, 1, _never) == b"0"
    assert (tmp_path / "a" / "b" / PLACE / "0.tar" / "0").read_bytes() == b"0123456789"


def test_a_temporary_cache_that_was_cleaned_away_is_made_anew() -> None:
    cache = BlockCache(None, 100)
    for content in (b"one", b"two"):
        assert cache.read(f"{PLACE}/0.tar/0", 0, 3, partial(bytes, content)) == content
        assert cache.directory.stat().st_mode & 0o777 == 0o700
        shutil.rmtree(cache.directory)
    cache.close()


def test_a_dropped_block_is_fetched_anew(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 100)
    cache.drop(f"{PLACE}/0.tar/0")
    cache.read(f"{PLACE}/0.tar/0", 0, 3, lambda: b"old")
    cache.drop(f"{PLACE}/0.tar/0")
    assert cache.read(f"{PLACE}/0.tar/0", 0, 3, lambda: b"new") == b"new"


def test_a_block_that_is_too_short_is_fetched_anew(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 100)
    cache.read(f"{PLACE}/0.tar/0", 0, 3, lambda: b"0123456789")
    os.truncate(tmp_path / PLACE / "0.tar" / "0", 5)
    assert cache.read(f"{PLACE}/0.tar/0", 2, 3, _never) == b"234"
    assert cache.read(f"{PLACE}/0.tar/0", 4, 3, lambda: b"0123456789") == b"456"
    assert cache.read(f"{PLACE}/0.tar/0", 7, 3, _never) == b"789"


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 35)
    for number in range(3):
        cache.read(f"{PLACE}/0.tar/{number}", 0, 1, lambda: bytes(10))
        file = tmp_path / PLACE / "0.tar" / str(number)
        os.utime(file, (time.time() - 60 + number,) * 2)
    cache.read(f"{PLACE}/0.tar/0", 0, 1, _never)  # now the latest used
    cache.read(f"{PLACE}/0.tar/3", 0, 1, lambda: bytes(10))
    assert sorted(file.name for file in (tmp_path / PLACE / "0.tar").iterdir()) == ["0", "2", "3"]


def test_it_never_holds_more_than_its_bound(tmp_path: Path) -> None:
    cache, generator = BlockCache(tmp_path, 1000), random.Random(0)
    for number in range(200):
        size = generator.randint(1, 300)
        cache.read(f"{PLACE}/{number % 7}.tar/{number}", 0, 1, lambda size=size: bytes(size))  # type: ignore[misc]
        assert 0 < _bytes_in(tmp_path) <= 1000
        if number % 10 == 0:
            cache.drop(f"{PLACE}/{number % 7}.tar/{number}")


@pytest.mark.parametrize("noted", ["", "not a number"])
def test_a_damaged_count_is_made_anew(tmp_path: Path, noted: str) -> None:
    for number in range(20):
        BlockCache(tmp_path, 100).read(f"{PLACE}/0.tar/{number}", 0, 1, lambda: bytes(30))
        if number == 3:
            (tmp_path / ".bytes").write_text(noted)
    assert _bytes_in(tmp_path) == 90


def test_other_files_in_its_directory_stay(tmp_path: Path) -> None:
    mine = tmp_path / "photos" / "2024" / "1.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(bytes(500))
    for number in range(20):
        BlockCache(tmp_path, 100).read(f"{PLACE}/0.tar/{number}", 0, 1, lambda: bytes(30))
    assert mine.exists()
    assert _bytes_in(tmp_path) == 90


def test_a_block_larger_than_the_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.cache\.max_bytes=9 .* 10 bytes"):
        BlockCache(tmp_path, 9).read(f"{PLACE}/0.tar/0", 0, 1, lambda: bytes(10))


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"data\.cache\.dir=.*file/cache cannot be made"):
        BlockCache(tmp_path / "file" / "cache", 9)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full disk")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / ".partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"block cache {tmp_path} is full .*max_bytes=100 "):
        BlockCache(tmp_path, 100).read(f"{PLACE}/0.tar/0", 0, 1, lambda: bytes(10))
    assert _bytes_in(tmp_path) == 0


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> bytes:
        raise OSError("network is down")

    cache = BlockCache(tmp_path, 100)
    with pytest.raises(OSError, match="network is down"):
        cache.read(f"{PLACE}/0.tar/0", 0, 1, failing)
    assert cache.read(f"{PLACE}/0.tar/0", 0, 3, lambda: b"012") == b"012"


def test_one_process_fetches_what_many_want(tmp_path: Path) -> None:
    cache, fetches = BlockCache(tmp_path / "cache", 10_000), tmp_path / "fetches"

    def fetch(number: int) -> bytes:
        with fetches.open("a") as log:
            log.write(f"{number}\n")
        time.sleep(0.02)
        return bytes([number]) * 100

    def read_all() -> None:
        for number in range(10):
            assert cache.read(f"{PLACE}/0.tar/{number}", 10, 5, lambda: fetch(number)) == bytes([number]) * 5  # noqa: B023

    _run_all([FORK.Process(target=read_all) for _ in range(4)])
    assert sorted(fetches.read_text().split()) == sorted(str(number) for number in range(10))


def test_bytes_are_right_while_processes_thrash_a_small_cache(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 500)

    def read_all(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(150):
            number = generator.randrange(12)
            read = cache.read(f"{PLACE}/0.tar/{number}", 20, 50, lambda: bytes([number]) * 100)  # noqa: B023
            assert read == bytes([number]) * 50
            with FileLock(tmp_path / ".lock"):  # nobody inserts or removes meanwhile
                assert _bytes_in(tmp_path) <= 500

    _run_all([FORK.Process(target=read_all, args=(seed,)) for seed in range(4)])


def test_a_killed_fetcher_blocks_nobody(tmp_path: Path) -> None:
    cache, started = BlockCache(tmp_path / "cache", 100), tmp_path / "started"

    def hang() -> bytes:
        started.write_bytes(b"")
        time.sleep(60)
        return b""

    process = FORK.Process(target=cache.read, args=(f"{PLACE}/0.tar/0", 0, 3, hang))
    process.start()
    _wait_for(started.exists)
    read: list[bytes] = []
    waiting = threading.Thread(target=lambda: read.append(cache.read(f"{PLACE}/0.tar/0", 0, 3, lambda: b"012")))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    waiting.join(5)
    assert read == [b"012"]


def test_a_temporary_directory_goes_with_its_maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = BlockCache(None, 100)
    (directory,) = tmp_path.glob("mixmae-*")
    _run_all([FORK.Process(target=cache.close)])
    assert directory.is_dir()
    cache.read(f"{PLACE}/0.tar/0", 0, 1, lambda: b"0")
    cache.close()
    assert not directory.exists()
    forgotten = BlockCache(None, 100)
    assert forgotten.directory.is_dir()
    directory = forgotten.directory
    del forgotten
    assert not directory.exists()


def _run_all(processes: "list[multiprocessing.context.ForkProcess]") -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * len(processes)
