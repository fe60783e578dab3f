"""Control connections: who is accepted, which ports are taken, what is passed over."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest
from torch._C._distributed_c10d import TCPStore

from mixmae.base.ports import PortError, free_port, listening_address, reserve_port
from mixmae.launch.supervision.listening import listen
from mixmae.launch.supervision.protocol import PORTS, Connection, authenticate_client, connect

SECRET = "right"


async def serve(port: int, secret: str = SECRET) -> "tuple[asyncio.Server, int, list[bool]]":
    """A coordinator that admits and hears one message; returns what it thought of each client."""
    accepted: list[bool] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        accepted.append(await authenticate_client(connection, secret))
        if accepted[-1] and (message := await connection.receive()):
            connection.send("echo", **message["fields"])
        await connection.close()

    server, found = await listen(handle, "127.0.0.1", port)
    return server, found, accepted


def run(test: Callable[[int], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(_as_coroutine(test), 30))


async def _as_coroutine(test: Callable[[int], Awaitable[None]]) -> None:
    await test(free_port())


def test_peers_with_the_secret_are_connected() -> None:
    async def test(port: int) -> None:
        server, _, accepted = await serve(port)
        connection = await connect("127.0.0.1", port, SECRET)
        assert connection is not None
        connection.send("hello", fields={"text": "ä\n" * 1000})
        assert await connection.receive() == {"kind": "echo", "text": "ä\n" * 1000}
        assert await connection.receive() is None  # closed
        assert accepted == [True]
        server.close()

    run(test)


def test_peers_without_the_secret_are_refused() -> None:
    async def test(port: int) -> None:
        server, _, accepted = await serve(port, "another")
        assert await connect("127.0.0.1", port, SECRET) is None
        server.close()
        assert accepted == [False]

    run(test)


def test_another_runs_coordinator_is_skipped() -> None:
    async def test(port: int) -> None:
        other, taken, _ = await serve(port, "another")
        own, found, accepted = await serve(port)
        assert (taken, found) == (port, port + 1)
        connection = await connect("127.0.0.1", port, SECRET)
        assert connection is not None
        connection.send("hello", fields={})
        assert await connection.receive() == {"kind": "echo"}
        assert accepted == [True]
        other.close()
        own.close()

    run(test)


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.0\r\n\r\n", b"[1]\n", b"\xff\xfe\n", b'{"kind": "answer"}\n', b""])
def test_other_protocols_are_refused(noise: bytes) -> None:
    async def test(port: int) -> None:
        server, _, accepted = await serve(port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(noise)
        writer.write_eof()
        assert b"challenge" in await reader.readline()
        assert await reader.read() == b""
        assert accepted == [False]
        writer.close()
        server.close()

    run(test)


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "another word": lambda lines: [lines[0].replace(b"one", b"two"), *lines[1:]],
    "twice": lambda lines: [lines[0], lines[0]],
    "left out": lambda lines: lines[1:],
    "another order": lambda lines: lines[::-1],
    "unsigned": lambda lines: [lines[0].partition(b" ")[2]],
    "nested": lambda lines: [b"[" * 100_000 + b"\n"],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_somebody_in_between_changes_ends_the_connection(change: Callable[[list[bytes]], list[bytes]]) -> None:
    """After a handshake that it passed on."""

    async def test(port: int) -> None:
        heard: list[object] = []
        done = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = Connection(reader, writer)
            assert await authenticate_client(connection, SECRET)
            while (message := await connection.receive()) is not None:
                heard.append(message["word"])
            done.set()
            await connection.close()

        server, _ = await listen(handle, "127.0.0.1", port)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        near: list[asyncio.StreamWriter] = []

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            near.append(writer)
            writer.write(await far_reader.readline())
            far_writer.write(await reader.readline())
            writer.write(await far_reader.readline())
            lines = [await reader.readline() for _ in range(2)]
            far_writer.writelines(change(lines))
            await done.wait()

        relay, relayed = await listen(between, "127.0.0.1", port + 1)
        connection = await connect("127.0.0.1", relayed, SECRET)
        assert connection is not None
        connection.send("say", word="one")
        connection.send("say", word="three")
        await done.wait()
        assert heard in ([], ["one"])
        for one in (far_writer, *near):
            one.close()
        await connection.close()
        relay.close()
        server.close()

    run(test)


def test_no_free_port_is_an_error() -> None:
    async def test(port: int) -> None:
        servers = [(await serve(port))[0] for _ in range(PORTS)]
        with pytest.raises(PortError, match=r"are all taken; set launch\.port"):
            await serve(port)
        for server in servers:
            server.close()

    run(test)


def test_the_address_to_listen_on() -> None:
    assert listening_address("127.0.0.1") == "127.0.0.1"
    assert listening_address("::1") == "::1"
    assert listening_address("localhost") in ("127.0.0.1", "::1")
    with pytest.raises(PortError, match="not known on its own host"):
        listening_address("no-such-host.invalid")


def test_a_reserved_port_is_for_torch_alone() -> None:
    port = free_port()
    first, second = reserve_port(port), reserve_port(port)
    assert first.getsockname()[1] == port
    assert second.getsockname()[1] == port + 1
    store = TCPStore("127.0.0.1", port, 1, True)
    store.set("key", "value")
    assert store.get("key") == b"value"

    async def listen_there() -> int:
        server, _, _ = await serve(port)
        found: int = server.sockets[0].getsockname()[1]
        server.close()
        return found

    assert asyncio.run(listen_there()) == port + 2
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port + 1))
    first.close()
    second.close()
