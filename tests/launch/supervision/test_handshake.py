"""What anybody who reaches the coordinator's port, or took it before, may send before being admitted."""

import asyncio

import pytest

from mixmae.launch.supervision.protocol import LONGEST, Connection, authenticate_client, connect

LINES = {
    "deep": b"[" * 50_000 + b"\n",
    "not ASCII": '{"kind": "answer", "proof": "caf\u00e9"}\n'.encode(),
    "surrogate": b'{"kind": "answer", "proof": "\\ud800"}\n',
    "no proof": b'{"kind": "answer"}\n',
    "a list as proof": b'{"kind": "answer", "proof": [1]}\n',
    "not UTF-8": b"\xff\xfe\n",
    "no JSON": b"GET / HTTP/1.1\r\n\r\n",
    "too long": b"x" * (LONGEST + 1),
    "nothing": b"",
}


SERVED = {
    **LINES,
    "a surrogate as challenge": b'{"kind": "challenge", "challenge": "\\ud800"}\n',
    "a list as challenge": b'{"kind": "challenge", "challenge": [1]}\n{"kind": "welcome", "proof": null}\n',
}
"""What a program may say that listens on a port of the coordinator's range."""


@pytest.mark.parametrize("line", LINES)
def test_invalid_clients_are_refused_without_an_error(line: str) -> None:
    async def run() -> bool:
        answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = Connection(reader, writer)
            try:
                answered.set_result(await authenticate_client(connection, "secret"))
            except Exception as error:  # would be a traceback on the console of the run
                answered.set_exception(error)
            await connection.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0, limit=LONGEST) as server:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(LINES[line])
            writer.write_eof()
            admitted = await answered
            writer.close()
            return admitted

    assert not asyncio.run(run())


@pytest.mark.parametrize("line", SERVED)
def test_other_programs_on_the_port_are_passed_over_without_an_error(line: str) -> None:
    async def run() -> Connection | None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(SERVED[line])
            writer.write_eof()
            await reader.read()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            address, port = server.sockets[0].getsockname()
            return await connect(address, port, "secret")

    assert asyncio.run(run()) is None
