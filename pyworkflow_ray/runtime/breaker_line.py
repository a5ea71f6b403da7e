"""The line from a breaker's actor to the processes of its node: a loopback socket, by which changes are told at once.

The actor opens a `Teller`, each process's channel follows it (`follow`). Between nodes the actor answers calls that
wait for a change: each costs both ends about a millisecond of CPU, so fifty processes of one machine would hear of an
opening a quarter of a second late (benchmarks/breakers.py); by a socket they hear of it within some milliseconds.
Messages are pickles, so both ends prove first that they have the key, which Ray alone has carried.

Faults: the actor dies (its sockets end, and the process asks it again); a stranger connects and says anything or
nothing (turned away), or listens at a dead actor's port (nothing it says is taken); a process does not read (it is cut
off, and asks the actor); sockets can't be used here (calls then).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import pickle
import secrets
from collections.abc import Callable
from typing import Any

from pyworkflow_ray.resilience.breaker import View
from pyworkflow_ray.runtime.line import Address

log = logging.getLogger("pyworkflow_ray.breaker")

Views = list[tuple[str | None, View]]  # by key

KEY_BYTES = NONCE_BYTES = PROOF_BYTES = 32
HELLO_S = 10.0
MAX_UNREAD_BYTES = 1_000_000


class Teller:
    """The actor's end. All methods run on its event loop.

    greeting: all that there is to say to a process that has just come.
    """

    def __init__(self, node: str, greeting: Callable[[], Views]) -> None:
        self._node = node
        self._greeting = greeting
        self._peers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._address: Address | None = None

    async def address(self) -> Address | None:
        """Where it listens, from the first question on; None where no socket could be opened."""
        if self._server is None:
            try:
                self._server = await asyncio.start_server(self._meet, "127.0.0.1", 0)
            except OSError as error:
                log.debug("no loopback socket, calls instead: %s", error)
                return None
            port = self._server.sockets[0].getsockname()[1]
            self._address = Address(self._node, port, secrets.token_bytes(KEY_BYTES))
        return self._address

    def tell(self, views: Views) -> None:
        """Say it to all; nobody is waited for."""
        if not self._peers:
            return
        message = _framed(views)
        for peer in list(self._peers):
            if peer.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
                self._peers.discard(peer)
                peer.transport.abort()
            else:
                peer.write(message)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._address is not None
        try:
            if await asyncio.wait_for(self._knows_the_key(reader, writer, self._address.key), HELLO_S):
                writer.write(_framed(self._greeting()))
                self._peers.add(writer)
                await reader.read(1)  # it says nothing more: this is its end
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            pass
        finally:
            self._peers.discard(writer)
            writer.close()

    @staticmethod
    async def _knows_the_key(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> bool:
        nonce = secrets.token_bytes(NONCE_BYTES)
        writer.write(_proof(key, b"actor", await reader.readexactly(NONCE_BYTES)) + nonce)
        return hmac.compare_digest(await reader.readexactly(PROOF_BYTES), _proof(key, b"process", nonce))


async def follow(address: Address, hear: Callable[[Views], Any]) -> None:
    """Hear all that the actor says until the line ends.

    Raises:
        OSError: the line can't be opened.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
    try:
        nonce = secrets.token_bytes(NONCE_BYTES)
        writer.write(nonce)
        answer = await asyncio.wait_for(reader.readexactly(PROOF_BYTES + NONCE_BYTES), HELLO_S)
        if not hmac.compare_digest(answer[:PROOF_BYTES], _proof(address.key, b"actor", nonce)):
            return
        writer.write(_proof(address.key, b"process", answer[PROOF_BYTES:]))
        while True:
            size = int.from_bytes(await reader.readexactly(4), "big")
            hear(pickle.loads(await reader.readexactly(size)))
    except (ConnectionError, asyncio.IncompleteReadError):
        return
    finally:
        writer.close()


def _proof(key: bytes, who: bytes, nonce: bytes) -> bytes:
    return hmac.digest(key, who + nonce, "sha256")


def _framed(views: Views) -> bytes:
    message = pickle.dumps(views, protocol=pickle.HIGHEST_PROTOCOL)
    return len(message).to_bytes(4, "big") + message
