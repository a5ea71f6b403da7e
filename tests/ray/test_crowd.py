"""A thousand HTTP calls that wait, from one run: concurrent, and in one process. A real server is the oracle."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import crowd_flows
import pytest

import pyworkflow_ray as pw

pytestmark = pytest.mark.ray


class Server:
    """Answers when `count` requests wait, and not before; `most` tells how many have waited at once. Requests for a
    number below `at_once` are answered at once."""

    def __init__(self) -> None:
        self.count, self.most, self.waiting, self.at_once = 1, 0, 0, 0
        self.loop = asyncio.new_event_loop()
        self.gate = asyncio.Event()
        server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=2_000))
        self.port = server.sockets[0].getsockname()[1]
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode().lstrip("/")
        if int(number) >= self.at_once:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            if self.waiting >= self.count:
                self.gate.set()
            await self.gate.wait()
            self.waiting -= 1
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(number)}\r\n\r\n{number}".encode())
        await writer.drain()
        writer.close()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("count", [100, pytest.param(1_000, marks=pytest.mark.slow)])
def test_calls_that_wait_are_concurrent_in_one_process(server: Server, count: int) -> None:
    server.count = count
    handle = pw.start(crowd_flows.crowd, server.port, count)
    answers = handle.result(120)
    assert [number for number, _ in answers] == list(range(count))
    assert server.most == count
    assert len({pid for _, pid in answers}) == 1


@pytest.mark.usefixtures("runtime")
def test_a_call_that_waits_holds_up_none_of_the_others(server: Server) -> None:
    """The run's own thread executes the first call; what follows from the others must not wait for it."""
    count = 10
    server.count, server.at_once = count + 1, count  # answered: the first calls; held: the other and all second ones
    handle = pw.start(crowd_flows.chain, server.port, count)
    assert handle.result(60)[1:] == list(range(count, 2 * count))
