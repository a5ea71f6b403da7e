"""The line between a run actor and its step hosts: a loopback socket on one node, Ray's actor calls between nodes.

The run actor opens an `Exchange`, step hosts a `Line` to it (`open_line`). A step is a question and an answer; by an
actor call each costs about as much CPU as a Ray task of its own (benchmarks/runs.py, docs/decisions/0010), by a socket
a tenth of that. Messages are pickles, so a peer first says a key that only Ray has carried.

Faults: the peer's process dies (its socket ends, and Ray tells the same); a stranger connects and says anything or
nothing (it has one thread of its own until it is turned away); sockets can't be used here (actor calls then).
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import pickle
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

import ray

from pyworkflow_ray.engine.calls import Outcome, StepCall
from pyworkflow_ray.engine.events import AttemptNote

log = logging.getLogger("pyworkflow_ray.line")

_HELLO_S = 10.0
_ATTEND_S = 10.0
_KEY_BYTES = 32


@dataclass(slots=True, frozen=True)
class Address:
    """Where an exchange listens: node (as `Process.node`), port on its loopback, and the key to be said."""

    node: str
    port: int
    key: bytes = field(repr=False)


class Exchange:
    """The run actor's end: a thread for each connection. `address` is None where no socket could be opened.

    step_done, attend: the run actor's answers, called in the connection's thread.
    """

    def __init__(
        self,
        node: str,
        *,
        step_done: Callable[[str, Outcome | None, str], StepCall | None],
        attend: Callable[[str, str, int, list[AttemptNote]], bool],
    ) -> None:
        self._step_done = step_done
        self._attend = attend
        self.address: Address | None = None
        try:
            self._server = socket.create_server(("127.0.0.1", 0), backlog=64)
        except OSError as error:
            log.debug("no loopback socket, actor calls instead: %s", error)
            return
        self.address = Address(node, self._server.getsockname()[1], secrets.token_bytes(_KEY_BYTES))
        threading.Thread(target=self._accept_loop, name="line", daemon=True).start()

    def close(self) -> None:
        """Take no more connections; those that are there go on."""
        if self.address is not None:
            with contextlib.suppress(OSError):
                self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
            self._server.close()

    def _accept_loop(self) -> None:
        while True:
            try:
                peer, _ = self._server.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(peer,), name="line-host", daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), peer:
            if not self._is_known(peer):
                return
            with _connection(peer) as connection:
                while True:
                    self._answer(connection, connection.recv_bytes())

    def _is_known(self, peer: socket.socket) -> bool:
        assert self.address is not None
        peer.settimeout(_HELLO_S)
        said = b""
        while len(said) < _KEY_BYTES:
            part = peer.recv(_KEY_BYTES - len(said))
            if not part:
                return False
            said += part
        peer.settimeout(None)
        return hmac.compare_digest(said, self.address.key)

    def _answer(self, connection: Connection, message: bytes) -> None:
        what, given = pickle.loads(message)
        if what == "next":
            connection.send_bytes(_dumps(self._step_done(*given)))
        elif what == "attend":
            connection.send_bytes(_dumps(self._attend(*given)))
        else:
            self._attend(*given)  # "note"


class Line(Protocol):
    """A step host's end."""

    def next(self, host_id: str, done: Outcome | None, node: str = "") -> StepCall | None:
        """Hand over the outcome of the last call, get the next one; None: end. Raises where the run actor is gone.

        node: id of the host's node, said with the first question."""
        ...

    def note(self, host_id: str, position: str, dispatch: int, notes: Sequence[AttemptNote]) -> None:
        """Stream attempts, waiting for nothing; they arrive before the outcome that follows. From `next`'s thread."""
        ...

    def attend(self, host_id: str, position: str, dispatch: int, notes: Sequence[AttemptNote]) -> bool:
        """Stream attempts and ask whether the call shall stop. From any one thread beside `next`'s."""
        ...

    def close(self) -> None: ...


def open_line(actor: Any, address: Address | None, node: str) -> Line:
    """The line of a step host on `node` to a run actor."""
    if address is not None and address.node == node:
        try:
            return _SocketLine(lambda: _connect(address))
        except OSError as error:
            log.debug("the loopback socket can't be reached, actor calls instead: %s", error)
    return _RayLine(actor)


class _SocketLine:
    """Two connections: one for the calls, one for the thread that looks after a long one, made when it first does."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._calls = connect()
        self._aside: Connection | None = None

    def next(self, host_id: str, done: Outcome | None, node: str = "") -> StepCall | None:
        self._calls.send_bytes(_dumps(("next", (host_id, done, node))))
        call: StepCall | None = pickle.loads(self._calls.recv_bytes())
        return call

    def note(self, host_id: str, position: str, dispatch: int, notes: Sequence[AttemptNote]) -> None:
        self._calls.send_bytes(_dumps(("note", (host_id, position, dispatch, list(notes)))))

    def attend(self, host_id: str, position: str, dispatch: int, notes: Sequence[AttemptNote]) -> bool:
        if self._aside is None:
            self._aside = self._connect()
        self._aside.send_bytes(_dumps(("attend", (host_id, position, dispatch, list(notes)))))
        if not self._aside.poll(_ATTEND_S):
            raise TimeoutError("the run actor does not answer")
        return bool(pickle.loads(self._aside.recv_bytes()))

    def close(self) -> None:
        self._calls.close()
        if self._aside is not None:
            self._aside.close()


class _RayLine:
    """Between nodes: nothing is known of the network but that Ray's calls go through it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def next(self, host_id: str, done: Outcome | None, node: str = "") -> StepCall | None:
        call: StepCall | None = ray.get(self._actor.step_done.remote(host_id, done, node))
        return call

    def note(self, host_id: str, position: str, dispatch: int, notes: Sequence[AttemptNote]) -> None:
        self._actor.attend.remote(host_id, position, dispatch, list(notes))

    def attend(self, host_id: str, position: str, dispatch: int, notes: Sequence[AttemptNote]) -> bool:
        return bool(ray.get(self._actor.attend.remote(host_id, position, dispatch, list(notes)), timeout=_ATTEND_S))

    def close(self) -> None:
        pass


def _connect(address: Address) -> Connection:
    peer = socket.create_connection(("127.0.0.1", address.port), timeout=_HELLO_S)
    peer.settimeout(None)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.sendall(address.key)
    return _connection(peer)


def _connection(peer: socket.socket) -> Connection:
    """`peer` with whole messages; the descriptor is the connection's from now on."""
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(peer.detach())


def _dumps(message: Any) -> bytes:
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
