"""A breaker's actor tells the processes of its node: real sockets, no Ray."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest

from pyworkflow_ray.resilience.breaker import BreakerState, View
from pyworkflow_ray.runtime import breaker_line
from pyworkflow_ray.runtime.breaker_line import Teller, Views, follow
from pyworkflow_ray.runtime.line import Address

OPEN = View(version=7, state=BreakerState.OPEN, open_for_s=60.0)


class Process:
    """One that follows the line."""

    def __init__(self, address: Address) -> None:
        self.heard: asyncio.Queue[Views] = asyncio.Queue()
        self.follows = asyncio.ensure_future(follow(address, self.heard.put_nowait))


@pytest.fixture
async def line() -> AsyncIterator[tuple[Teller, Address]]:
    teller = Teller("node", lambda: [(None, View(version=6))])
    address = await teller.address()
    assert address is not None
    assert await teller.address() is address
    yield teller, address
    assert teller._server is not None
    teller._server.close()


async def test_who_comes_hears_how_it_is_and_then_each_change(line: tuple[Teller, Address]) -> None:
    teller, address = line
    processes = [Process(address) for _ in range(5)]
    for process in processes:
        assert await process.heard.get() == [(None, View(version=6))]
    teller.tell([("host-7", OPEN)])
    for process in processes:
        assert await process.heard.get() == [("host-7", OPEN)]
        process.follows.cancel()


async def test_a_stranger_hears_nothing(line: tuple[Teller, Address]) -> None:
    teller, address = line
    stranger = Process(dataclasses.replace(address, key=b"x" * breaker_line.KEY_BYTES))
    await stranger.follows
    assert stranger.heard.empty()
    reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
    writer.write(b"x" * (breaker_line.NONCE_BYTES + breaker_line.PROOF_BYTES))
    assert len(await reader.read()) == breaker_line.PROOF_BYTES + breaker_line.NONCE_BYTES  # turned away
    assert not teller._peers
    writer.close()


async def test_nothing_is_taken_from_a_stranger_at_the_actors_port() -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonce = await reader.readexactly(breaker_line.NONCE_BYTES)
        writer.write(nonce * 2 + breaker_line._framed([(None, OPEN)]))
        await reader.read()
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        process = Process(Address("node", server.sockets[0].getsockname()[1], b"k" * breaker_line.KEY_BYTES))
        await process.follows
        assert process.heard.empty()


async def test_the_end_of_a_process_is_noticed(line: tuple[Teller, Address]) -> None:
    teller, address = line
    process = Process(address)
    await process.heard.get()
    process.follows.cancel()
    while teller._peers:
        await asyncio.sleep(0)
    teller.tell([(None, OPEN)])


async def test_the_end_of_the_actor_ends_the_line(line: tuple[Teller, Address]) -> None:
    teller, address = line
    process = Process(address)
    await process.heard.get()
    for peer in teller._peers:
        peer.transport.abort()
    await process.follows


async def test_who_does_not_read_is_cut_off(line: tuple[Teller, Address], monkeypatch: pytest.MonkeyPatch) -> None:
    teller, address = line
    monkeypatch.setattr(breaker_line, "MAX_UNREAD_BYTES", 1000)
    reader, writer = await asyncio.open_connection("127.0.0.1", address.port, limit=100)
    writer.write(b"n" * breaker_line.NONCE_BYTES)
    answer = await reader.readexactly(breaker_line.PROOF_BYTES + breaker_line.NONCE_BYTES)
    writer.write(breaker_line._proof(address.key, b"process", answer[breaker_line.PROOF_BYTES :]))
    while not teller._peers:
        await asyncio.sleep(0)
    for _ in range(20_000):
        teller.tell([("k" * 256, OPEN)] * 20)
        if not teller._peers:
            break
        await asyncio.sleep(0)
    assert not teller._peers
    writer.close()
    assert reader is not None


async def test_an_actor_that_is_gone_can_not_be_followed() -> None:
    with pytest.raises(OSError):
        await follow(Address("node", 1, b""), lambda views: None)


async def test_without_sockets_there_is_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(*args: object) -> None:
        raise OSError("no sockets")

    monkeypatch.setattr(asyncio, "start_server", refused)
    assert await Teller("node", list).address() is None
