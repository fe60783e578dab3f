import errno
import fcntl
import gc
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmae.base.errors import UsageError
from mixmae.trainer.data.stores.open_store import open_store
from mixmae.trainer.data.stores.pipe import PipeStore
from mixmae.trainer.data.stores.remote import RemoteStore
from mixmae.trainer.data.stores.store import LocalStore, Store
from mixmae.trainer.recipe.sections.data import Cache, Network
from tests.trainer.data.servers import Fault, HttpServer, S3Server, http_server, s3_server

BLOCK = 1000
SIZES = {"a.tar": 3500, "b.tar": 2 * BLOCK, "c.tar": 999}
FORK = multiprocessing.get_context("fork")
SHELL = Network(allow_shell=True, retries=2, timeout=5)


@cache
def _content(name: str) -> bytes:
    return random.Random(name).randbytes(SIZES[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name in SIZES:
        (folder / name).write_bytes(_content(name))
    (folder / "index.json").write_bytes(b"{}")
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[HttpServer]:
    with http_server(folder) as server:
        yield server


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        for name in SIZES:
            server.put(f"train/{name}", _content(name))
        yield server


def _remote(
    location: str, directory: Path | None = None, retries: int = 3, timeout: float = 5.0, max_bytes: int = 10**6
) -> RemoteStore:
    network, cache = Network(retries=retries, timeout=timeout), Cache(dir=directory, max_bytes=max_bytes)
    return RemoteStore(location, network, cache, block_bytes=BLOCK, first_delay=0.01)


def _blocks(directory: Path) -> list[Path]:
    return [file for file in directory.glob("*/*/*") if file.is_file()]


def _check_everything(store: Store, seed: int = 0) -> None:
    ranges = [(name, begin, min(300, size - begin)) for name, size in SIZES.items() for begin in range(0, size, 300)]
    random.Random(seed).shuffle(ranges)
    for name, offset, size in ranges:
        assert store.read(name, offset, size) == _content(name)[offset : offset + size]


def _in_three_processes(store: Store) -> None:
    processes = [FORK.Process(target=_check_everything, args=(store, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]


_RANGES = st.sampled_from(sorted(SIZES)).flatmap(
    lambda name: st.tuples(st.just(name), st.integers(0, SIZES[name]), st.integers(0, SIZES[name]))
)


@settings(max_examples=60, deadline=None)
@given(_RANGES)
def test_every_store_reads_the_same_bytes(stores: list[Store], drawn: tuple[str, int, int]) -> None:
    name, one, other = drawn
    begin, end = sorted((one, other))
    for store in stores:
        assert store.read(name, begin, end - begin) == _content(name)[begin:end]


@pytest.fixture(scope="module")
def stores(folder: Path, s3: S3Server) -> Iterator[list[Store]]:
    with http_server(folder) as server:
        opened: list[Store] = [
            open_store(folder),
            open_store(f"file://{folder}"),
            _remote(server.url),
            _remote(f"{s3.url}/train"),
            PipeStore(f"pipe:cat {folder}/{{}}", SHELL, Cache(), first_delay=0.01),
        ]
        yield opened
        for store in opened:
            store.close()


def test_every_store_knows_sizes_and_reads_whole_files(stores: list[Store]) -> None:
    for store in stores:
        for name, size in SIZES.items():
            assert store.size(name) == size
            assert store.read_whole(name) == _content(name)


def test_every_store_says_where_a_file_ends(stores: list[Store]) -> None:
    for store in stores:
        for offset in (3400, 3500, 9500):
            with pytest.raises(OSError, match=rf"a\.tar'? ends at 3500, expected {offset + 200}"):
                store.read("a.tar", offset, 200)


def test_every_store_misses_what_is_not_there(stores: list[Store]) -> None:
    for store in stores:
        kind = OSError if isinstance(store, PipeStore) else FileNotFoundError
        with pytest.raises(kind, match=r"d\.tar"):
            store.read("d.tar", 0, 1)
        with pytest.raises(kind, match=r"d\.tar"):
            store.size("d.tar")
        with pytest.raises(UsageError, match="without folders"):
            store.read("../a.tar", 0, 1)


def test_every_store_takes_hints(stores: list[Store]) -> None:
    for store in stores:
        store.will_need("a.tar", 0, 3000)
        store.forget("a.tar", 0, 3000)
        assert store.read("a.tar", 0, 3000) == _content("a.tar")[:3000]
        assert (store.directory is None) == (not isinstance(store, LocalStore))


def test_paths_and_file_urls_are_local(folder: Path) -> None:
    for location in (str(folder), folder, f"file://{folder}", f"local://{folder}"):
        store = open_store(location)
        assert isinstance(store, LocalStore)
        assert store.directory == folder


def test_few_descriptors_stay_open(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number}.tar").write_bytes(bytes([number]))
    with closing(LocalStore(tmp_path)) as store:
        before = _descriptors()
        for _ in range(2):
            for number in range(100):
                assert store.read(f"{number}.tar", 0, 1) == bytes([number])
        assert 0 < len(_descriptors()) - len(before) <= 64
        store.close()
        assert _descriptors() == before


def test_a_stale_handle_is_opened_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread, failures = os.pread, [OSError(errno.ESTALE, "Stale file handle")]

    def stale_once(*arguments: int) -> bytes:
        if failures:
            raise failures.pop()
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", stale_once)
    with closing(LocalStore(folder)) as store:
        assert store.read("a.tar", 10, 10) == _content("a.tar")[10:20]
        assert store.retried == 1


def test_short_reads_are_completed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 7), offset))
    with closing(LocalStore(folder)) as store:
        assert store.read("a.tar", 10, 100) == _content("a.tar")[10:110]


def test_a_replaced_local_file_is_read_anew_after_forget(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"old")
    with closing(LocalStore(tmp_path)) as store:
        assert store.read("a.tar", 0, 3) == b"old"
        (tmp_path / "new").write_bytes(b"new")
        (tmp_path / "new").rename(tmp_path / "a.tar")
        store.forget("a.tar", 0, 3)
        assert store.read("a.tar", 0, 3) == b"new"


def test_each_block_crosses_the_network_once(server: HttpServer, tmp_path: Path) -> None:
    with closing(_remote(server.url, tmp_path)) as store:
        assert store.read_whole("index.json") == b"{}"  # a connection is open when the children are forked
        server.requests.clear()
        _in_three_processes(store)
        assert len(server.requests) == 7
        assert sorted(server.requests) == sorted(set(server.requests))
        _check_everything(store)
        assert store.read_whole("index.json") == b"{}"
        assert len(server.requests) == 8


def test_a_child_leaves_its_parents_connection_alone(server: HttpServer) -> None:
    with closing(_remote(server.url, retries=0)) as store:

        def use_and_drop() -> None:
            nonlocal store
            assert store.read("a.tar", 1000, 10) == _content("a.tar")[1000:1010]
            store.close()
            del store
            gc.collect()

        store.read("a.tar", 0, 1)
        child = FORK.Process(target=use_and_drop)
        child.start()
        child.join(120)
        assert child.exitcode == 0
        assert store.read("b.tar", 0, 10) == _content("b.tar")[:10]


def test_cached_blocks_outlive_a_store(server: HttpServer, tmp_path: Path) -> None:
    with closing(_remote(server.url, tmp_path)) as store:
        _check_everything(store)
    server.requests.clear()
    server.heads.clear()
    with closing(_remote(server.url + "/", tmp_path)) as store:
        _check_everything(store)
    assert server.requests == []
    assert server.heads == []


def test_a_cache_that_is_too_small_still_gives_right_bytes(server: HttpServer, tmp_path: Path) -> None:
    with closing(_remote(server.url, tmp_path, max_bytes=2500)) as store:
        _in_three_processes(store)
        _check_everything(store)
    assert 0 < sum(file.stat().st_size for file in _blocks(tmp_path)) <= 2500


def test_a_damaged_block_is_fetched_anew_after_forget(server: HttpServer, tmp_path: Path) -> None:
    with closing(_remote(server.url, tmp_path)) as store:
        _check_everything(store)
        for file in _blocks(tmp_path):
            file.write_bytes(bytes(file.stat().st_size))
        assert store.read("a.tar", 900, 200) == bytes(200)
        server.requests.clear()
        store.forget("a.tar", 900, 200)
        assert store.read("a.tar", 900, 200) == _content("a.tar")[900:1100]
        assert server.requests == [("/a.tar", "bytes=0-999"), ("/a.tar", "bytes=1000-1999")]
        assert store.read("a.tar", 2000, 10) == bytes(10)


def test_a_truncated_block_is_fetched_anew(server: HttpServer, tmp_path: Path) -> None:
    with closing(_remote(server.url, tmp_path)) as store:
        _check_everything(store)
        for file in _blocks(tmp_path):
            os.truncate(file, 400)
        _check_everything(store)


def test_places_with_equal_names_are_kept_apart(server: HttpServer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"other")
    with (
        http_server(tmp_path) as other,
        closing(_remote(server.url, tmp_path / "cache")) as first,
        closing(_remote(other.url, tmp_path / "cache")) as second,
    ):
        for _ in range(2):
            assert first.read("a.tar", 0, 5) == _content("a.tar")[:5]
            assert second.read("a.tar", 0, 5) == b"other"


@pytest.mark.parametrize("fault", ["503", "cut", "stall"])
def test_failures_that_pass_are_tried_again(server: HttpServer, fault: Fault) -> None:
    server.fail(fault, fault)
    server.stall = 4.0
    with closing(_remote(server.url, timeout=2.0 if fault == "stall" else 60.0)) as store:
        assert store.read("a.tar", 1500, 1000) == _content("a.tar")[1500:2500]
        assert store.retried == 2
        _in_three_processes(store)


def test_a_reset_connection_is_tried_again(server: HttpServer) -> None:
    with closing(_remote(server.url)) as store:
        store.read_whole("index.json")
        server.fail("reset", "reset")
        assert store.read("a.tar", 0, 10) == _content("a.tar")[:10]
        assert store.retried in (1, 2)  # aiohttp itself tries a connection that it kept once more


@pytest.mark.parametrize(
    ("fault", "kind", "message", "tries"),
    [
        ("503", OSError, "a.tar: HTTP 503", 4),
        ("cut", OSError, "a.tar: ClientPayloadError", 4),
        ("stall", TimeoutError, "a.tar: no answer within 0.1 s", 4),
        ("no ranges", OSError, "a.tar: the server ignores ranges: 1000 bytes were asked for and 3500 came", 1),
        ("404", FileNotFoundError, "a.tar does not exist", 1),
        ("403", PermissionError, "a.tar: access denied", 1),
    ],
)
def test_failures_that_last_are_named(
    server: HttpServer, fault: Fault, kind: type[OSError], message: str, tries: int
) -> None:
    server.always, server.stall = fault, 0.5
    with closing(_remote(server.url, timeout=0.1 if fault == "stall" else 60)) as store:
        with pytest.raises(kind, match=f"{server.url}/{message}"):
            store.read("a.tar", 0, 10)
        assert store.retried == tries - 1
    assert len(server.requests) == tries


def test_a_server_that_is_gone_is_named(tmp_path: Path) -> None:
    with http_server(tmp_path) as gone:
        pass
    with closing(_remote(gone.url)) as store:
        for call in (lambda: store.read("a.tar", 0, 1), lambda: store.size("a.tar")):
            with pytest.raises(OSError, match=rf"{gone.url}/a\.tar: ClientConnectorError") as caught:
                call()
            assert not isinstance(caught.value, FileNotFoundError)
        assert store.retried == 3  # once it is known to be down, a read is tried once


def test_a_size_that_is_refused_is_not_a_missing_file(tmp_path: Path) -> None:
    with http_server(tmp_path) as server, closing(_remote(server.url)) as store:
        server.fail("503", "403")  # to the GET that follows a HEAD without success
        with pytest.raises(PermissionError, match="access denied"):
            store.size("a.tar")
        assert store.retried == 1


def test_secrets_of_a_url_stay_out_of_messages(server: HttpServer) -> None:
    location = server.url.replace("//", "//me:secret@") + "?signature=secret"
    with closing(_remote(location)) as store:
        assert store.read("a.tar", 0, 10) == _content("a.tar")[:10]
        assert server.requests[0][0] == "/a.tar?signature=secret"
        server.always = "503"
        with pytest.raises(OSError, match="HTTP 503") as caught:
            store.read("b.tar", 0, 10)
        assert "secret" not in str(caught.value)


def test_s3_is_read_through_the_environments_endpoint(s3: S3Server, tmp_path: Path) -> None:
    with closing(_remote(f"{s3.url}/train", tmp_path)) as store:
        _in_three_processes(store)
        _check_everything(store)
        assert store.retried == 0
    with closing(_remote("s3://nobucket/train")) as store, pytest.raises(FileNotFoundError, match=r"nobucket.*a\.tar"):
        store.read("a.tar", 0, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_nothing_stays_after_close(
    server: HttpServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use_all() -> None:
        for store in (
            LocalStore(folder),
            _remote(server.url),
            PipeStore(f"pipe:cat {folder}/{{}}", SHELL, Cache()),
        ):
            _check_everything(store)
            store.close()

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    use_all()  # fsspec's own thread stays for the process
    gc.collect()
    before = _descriptors()
    use_all()
    assert _settled(before) <= before  # what earlier tests left may be closed meanwhile
    assert list(tmp_path.iterdir()) == []


def _settled(expected: set[int]) -> set[int]:
    """This process's descriptors, once the server's threads too have closed theirs."""
    deadline = time.monotonic() + 60
    while not (now := _descriptors()) <= expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return now


def _descriptors() -> set[int]:
    return {file for file in range(512) if _is_open(file)}


def _is_open(file: int) -> bool:
    try:
        fcntl.fcntl(file, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def test_a_store_works_on_after_close_and_beside_another(server: HttpServer, tmp_path: Path) -> None:
    with closing(_remote(server.url, tmp_path / "1")) as first, closing(_remote(server.url, tmp_path / "2")) as second:
        first.read("a.tar", 0, 1)
        second.close()
        assert first.read("a.tar", 3000, 500) == _content("a.tar")[3000:]


def test_a_command_runs_only_where_it_may(folder: Path) -> None:
    location = f"pipe:cat {folder}/{{}}"
    with pytest.raises(UsageError, match=r"in a shell on every node; data\.network\.allow_shell=true"):
        open_store(location)
    with pytest.raises(UsageError, match="where the file's name goes"):
        open_store("pipe:cat a.tar", SHELL)
    with closing(open_store(location, SHELL)) as store:
        assert store.read("a.tar", 5, 5) == _content("a.tar")[5:10]


@pytest.mark.parametrize("location", ["simplecache::pipe:cat {}", "simplecache::pipe://cat {}", "pipe://cat {}"])
def test_no_other_url_is_a_command(location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        store = open_store(location)
    except UsageError:
        return
    with pytest.raises(FileNotFoundError):
        store.read("a.tar", 0, 1)


def test_a_command_runs_once_per_file(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = f"pipe:echo {{}} >> {log}; cat {folder}/{{}}"
    with closing(PipeStore(command, SHELL, Cache(dir=tmp_path / "cache"))) as store:
        _in_three_processes(store)
        _check_everything(store)
    assert sorted(log.read_text().split()) == sorted(SIZES)


def test_a_name_is_no_part_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "a;touch b").write_bytes(b"fine")
    with closing(PipeStore(f"pipe:cd {tmp_path}; cat {{}}", SHELL, Cache())) as store:
        assert store.read("a;touch b", 0, 4) == b"fine"
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("command", "kind", "message"),
    [
        ("echo first >&2; echo no such key {} >&2; exit 3", OSError, r"a\.tar.* ended with code 3: no such key a\.tar"),
        ("exit 4 # {}", OSError, "ended with code 4: it printed nothing"),
        ("sleep 60 # {}", TimeoutError, r"sleep 60 # a\.tar.*: no output within 0\.2 s"),
        ("exec >&-; sleep 60 # {}", TimeoutError, r"no output within 0\.2 s"),
    ],
)
def test_a_failing_command_is_named(command: str, kind: type[OSError], message: str) -> None:
    network = Network(allow_shell=True, retries=1, timeout=0.2 if kind is TimeoutError else 60.0)
    with closing(PipeStore(f"pipe:{command}", network, Cache(), first_delay=0.01)) as store:
        with pytest.raises(kind, match=message):
            store.read("a.tar", 0, 1)
        assert store.retried == 1


def test_a_slow_command_may_go_on(folder: Path) -> None:
    network = Network(allow_shell=True, retries=0, timeout=1.5)
    command = f"pipe:for i in 1 2 3 4 5; do sleep 0.4; echo $i; done; cat {folder}/{{}}"
    with closing(PipeStore(command, network, Cache())) as store:
        assert store.read("a.tar", 0, 11) == b"1\n2\n3\n4\n5\n" + _content("a.tar")[:1]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("gopher://host/photos", "unknown kind of URL 'gopher'"),
        ("simplecache::https://host/photos", "unknown kind of URL"),
        ("adl://host/photos", "needs a package that is not installed: .*adlfs"),
    ],
)
def test_urls_that_cannot_be_read_are_refused(location: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_store(location)


@pytest.mark.parametrize(("scheme", "module", "extra"), [("s3", "s3fs", "s3"), ("https", "aiohttp", "http")])
def test_a_missing_package_is_named(scheme: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    with pytest.raises(UsageError, match=rf"pip install 'mixmae\[{extra}\]'"):
        open_store(f"{scheme}://host/photos")


def test_a_cache_without_room_for_a_block_is_refused() -> None:
    with pytest.raises(UsageError, match=r"data\.cache\.max_bytes=1000000, expected room for a block of 8388608"):
        open_store("https://host/photos", cache=Cache(max_bytes=10**6))


def test_http_goes_through_the_proxy_of_the_environment(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's name resolves to nothing: only a proxy knows it."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    with closing(RemoteStore("http://data.invalid", Network(retries=0, timeout=5.0), Cache())) as store:
        assert store.read("a.tar", 8, 7) == _content("a.tar")[8:15]
        assert store.read_whole("a.tar") == _content("a.tar")
    assert {path for path, _ in server.requests} == {"http://data.invalid/a.tar"}
