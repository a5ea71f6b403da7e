"""Whoever waits for a run is told of its end: by news, or by a look where news may have been missed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from pyworkflow_ray.engine.events import Payload
from pyworkflow_ray.runtime.following import Follower
from pyworkflow_ray.runtime.messages import Change, Cursor, News
from pyworkflow_ray.storage.storage import Storage
from tests.journals import created, ended

RESULT = Payload(enc="json", data=42, size=2)
SOON_S = 20  # nobody waits so long unless something is wrong


class Desk:
    """A controller whose news the test writes. It counts what it is asked."""

    def __init__(self) -> None:
        self.said: queue.SimpleQueue[list[Change] | Exception] = queue.SimpleQueue()
        self.asked: queue.SimpleQueue[Cursor | None] = queue.SimpleQueue()
        self.states_asked: list[list[str]] = []
        self.running: set[str] = set()
        self.told = 0

    def watch(self, cursor: Cursor | None, timeout_s: float, gather_s: float) -> Future[News]:
        answer: Future[News] = Future()
        threading.Thread(target=self.answer, args=(cursor, timeout_s, answer), daemon=True).start()
        self.asked.put(cursor)
        return answer

    def answer(self, cursor: Cursor | None, timeout_s: float, answer: Future[News]) -> None:
        if cursor is None:
            return answer.set_result(News(("me", self.told), [], reset=True))
        try:
            said = self.said.get(timeout=timeout_s)
        except queue.Empty:
            return answer.set_result(News(cursor, []))
        if isinstance(said, Exception):
            return answer.set_exception(said)
        self.told += len(said)
        answer.set_result(News(("me", self.told), said))

    def states(self, run_ids: list[str]) -> dict[str, str]:
        self.states_asked.append(run_ids)
        return {run_id: "running" for run_id in run_ids if run_id in self.running}

    def polls_without_a_break(self) -> None:
        """Returns once a poll with a cursor is under way."""
        while self.asked.get(timeout=SOON_S) is None:
            pass


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path)


@pytest.fixture
def follower(desk: Desk, storage: Storage) -> Iterator[Follower]:
    follower = Follower(storage, watch=desk.watch, states=desk.states)
    yield follower
    follower.close()


def completed(run_id: str) -> Change:
    return (run_id, "completed", RESULT.model_dump_json().encode())


def submit(follower: Follower, run_id: str) -> None:
    follower.submitted([run_id], follower.announce([run_id]))


def test_a_run_that_was_submitted_during_the_poll_is_told_with_its_result_and_never_looked_up(
    follower: Follower, desk: Desk
) -> None:
    desk.polls_without_a_break()
    submit(follower, "a")
    assert follower.certain("a")
    future = follower.ended("a")
    assert not future.done()
    desk.said.put([completed("a")])
    future.result(SOON_S)
    assert follower.result_of("a") == RESULT
    assert follower.certain("a")
    assert follower.ended("a").done()
    assert desk.states_asked == []


def test_an_end_that_is_told_before_the_submission_is_answered_is_not_missed(follower: Follower, desk: Desk) -> None:
    desk.polls_without_a_break()
    unbroken = follower.announce(["a", "b"])
    waits = follower.ended("b")
    desk.said.put([completed("a"), ("b", "failed", None)])
    waits.result(SOON_S)
    follower.submitted(["a", "b"], unbroken)
    assert follower.result_of("a") == RESULT
    assert follower.result_of("b") is None  # a failure is read from the storage
    assert not follower.certain("b")


def test_a_run_is_looked_up_where_the_poll_broke_while_it_was_submitted(
    follower: Follower, desk: Desk, storage: Storage
) -> None:
    desk.polls_without_a_break()
    unbroken = follower.announce(["order-42"])
    desk.said.put(ConnectionError("the controller is away"))
    desk.polls_without_a_break()  # again, after the break
    storage.create_run(created("order-42", storage.storage_id))
    journal, _ = storage.activate("order-42", "", first=True)
    journal.append([ended(1)]).result()
    journal.finish()
    follower.submitted(["order-42"], unbroken)
    follower.ended("order-42").result(SOON_S)


def test_runs_that_are_waited_for_are_looked_up_when_the_poll_breaks(follower: Follower, desk: Desk) -> None:
    desk.polls_without_a_break()
    submit(follower, "a")
    desk.running.add("a")
    future = follower.ended("a")
    desk.said.put(ConnectionError("the controller is away"))
    desk.polls_without_a_break()
    desk.said.put([("other", "completed", None)])
    desk.polls_without_a_break()
    assert ["a"] in desk.states_asked
    assert not future.done()
    assert follower.certain("a")  # the controller knows it, and the poll goes on


def test_a_run_of_another_owner_is_looked_up_until_it_has_ended(
    follower: Follower, desk: Desk, storage: Storage
) -> None:
    storage.create_run(created("order-42", storage.storage_id))
    future = follower.ended("order-42")
    while not desk.states_asked:
        desk.asked.get(timeout=SOON_S)
    assert not follower.certain("order-42")
    journal, _ = storage.activate("order-42", "", first=True)
    journal.append([ended(1)]).result()
    journal.finish()
    future.result(SOON_S)


def test_a_submission_that_was_refused_leaves_nothing_behind(follower: Follower, desk: Desk) -> None:
    desk.polls_without_a_break()
    follower.announce(["a"])
    follower.withdraw(["a"])
    assert not follower.certain("a")
    submit(follower, "b")
    follower.withdraw(["b"])  # as after every submission: what was made stays
    assert follower.certain("b")


def test_a_kept_result_is_never_that_of_a_new_run_of_the_id(follower: Follower, desk: Desk) -> None:
    desk.polls_without_a_break()
    submit(follower, "a")
    future = follower.ended("a")
    desk.said.put([completed("a")])
    future.result(SOON_S)
    submit(follower, "a")  # retention removed the first one meanwhile
    assert follower.result_of("a") is None
    assert not follower.ended("a").done()


def test_a_future_that_was_forgotten_is_left_alone(follower: Follower, desk: Desk) -> None:
    desk.polls_without_a_break()
    submit(follower, "a")
    first, second = follower.ended("a"), follower.ended("a")
    follower.forget("a", first)
    desk.said.put([completed("a")])
    second.result(SOON_S)
    assert not first.done()
