"""The line between run actor and step host: whole messages, in order, to nobody who does not know the key."""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pyworkflow_ray.engine.calls import Outcome, StepCall
from pyworkflow_ray.engine.events import AttemptFailed, AttemptNote, CodeRef, ErrorInfo
from pyworkflow_ray.resilience.policy import RetryPolicy
from pyworkflow_ray.runtime.line import Address, Exchange, open_line

CALL = StepCall(
    "run-1", "uid", "storage", 0, "flow", "1", 1, 0, 1, "step", CodeRef(how="import", name="x"), [], {}, RetryPolicy()
)
DONE = Outcome("1", 1, "completed", 1)
ERROR = ErrorInfo(type="E", module="m", message="", kind="transient")
FAILED = AttemptFailed(seq=-1, position="1", dispatch=1, attempt=1, error=ERROR, started_at=1.0, ended_at=2.0, at=2.0)


class Owner:
    """Answers as a run actor does, and remembers what it was told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.answers: list[StepCall | None] = [CALL, None]
        self.exchange = Exchange("here", step_done=self.step_done, attend=self.attend)

    def step_done(self, host_id: str, outcome: Outcome | None, node: str = "") -> StepCall | None:
        self.told.append(("next", host_id, outcome))
        return self.answers.pop(0)

    def attend(self, host_id: str, position: str, dispatch: int, notes: list[AttemptNote]) -> bool:
        self.told.append(("attend", host_id, position, dispatch, notes))
        return bool(notes)

    @property
    def address(self) -> Address:
        assert self.exchange.address is not None
        return self.exchange.address


@pytest.fixture
def owner() -> Iterator[Owner]:
    owner = Owner()
    yield owner
    owner.exchange.close()


def refused(owner: Owner, say: Callable[[socket.socket], object]) -> bool:
    """Whether a peer that says this is turned away without an answer."""
    with socket.create_connection(("127.0.0.1", owner.address.port), timeout=20) as peer:
        try:
            say(peer)
            return peer.recv(1) == b""
        except ConnectionError:
            return True


def test_a_host_gets_its_calls_and_hands_over_outcomes_after_the_attempts_before_them(owner: Owner) -> None:
    line = open_line(None, owner.address, "here")
    assert line.next("h1", None) == CALL
    line.note("h1", "1", 1, [FAILED])
    assert line.next("h1", DONE) is None
    line.close()
    assert owner.told == [("next", "h1", None), ("attend", "h1", "1", 1, [FAILED]), ("next", "h1", DONE)]


def test_the_thread_that_looks_after_a_call_is_answered_while_the_host_waits_for_its_next(owner: Owner) -> None:
    asked, answer = threading.Event(), threading.Event()

    def step_done(host_id: str, outcome: Outcome | None, node: str) -> StepCall | None:
        asked.set()
        answer.wait(20)
        return None

    exchange = Exchange("here", step_done=step_done, attend=owner.attend)
    line = open_line(None, exchange.address, "here")
    host = threading.Thread(target=line.next, args=("h1", None), daemon=True)
    host.start()
    assert asked.wait(20)
    assert line.attend("h1", "1", 1, [FAILED]) is True
    assert line.attend("h1", "1", 1, []) is False
    answer.set()
    host.join(20)
    line.close()
    exchange.close()


def test_whoever_does_not_know_the_key_is_turned_away_unread(owner: Owner) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return owner.told.append, (("exploded",),)

    message = pickle.dumps(("next", ("h1", None)))
    assert refused(owner, lambda peer: peer.sendall(b"x" * 32 + len(message).to_bytes(4, "big") + message))
    assert refused(owner, lambda peer: peer.sendall(owner.address.key[:31] + b"x"))
    assert refused(owner, lambda peer: peer.shutdown(socket.SHUT_WR))
    assert owner.told == []
    line = open_line(None, owner.address, "here")  # and others are served meanwhile
    assert line.next("h1", None) == CALL
    line.close()


def test_a_silent_stranger_holds_up_nobody(owner: Owner) -> None:
    with socket.create_connection(("127.0.0.1", owner.address.port), timeout=20):
        line = open_line(None, owner.address, "here")
        assert line.next("h1", None) == CALL
        line.close()


def test_a_host_whose_run_actor_is_gone_is_told_so(owner: Owner) -> None:
    def gone(host_id: str, outcome: Outcome | None, node: str) -> StepCall | None:
        raise EOFError  # ends the connection, as the end of the process does

    exchange = Exchange("here", step_done=gone, attend=owner.attend)
    line = open_line(None, exchange.address, "here")
    with pytest.raises((EOFError, ConnectionError)):
        line.next("h1", None)
    exchange.close()


def test_an_address_does_not_show_its_key(owner: Owner) -> None:
    assert owner.address.key.hex() not in repr(owner.address)
    assert repr(owner.address.key) not in repr(owner.address)


def test_another_node_or_no_socket_goes_by_actor_calls(owner: Owner) -> None:
    closed = Owner()
    address = closed.address
    closed.exchange.close()
    for line in (
        open_line("actor", owner.address, "elsewhere"),
        open_line("actor", None, "here"),
        open_line("actor", address, "here"),
    ):
        assert line._actor == "actor"  # type: ignore[attr-defined]
    assert owner.told == []
