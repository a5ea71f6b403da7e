"""A wake that meets a run on its way into parking is not lost, whichever the controller hears of first."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.engine.events import CodeEnvironment
from pyworkflow_ray.runtime.dispatcher import Dispatcher, Known
from pyworkflow_ray.runtime.messages import Assignment, RunReport, RuntimeConfig
from pyworkflow_ray.runtime.pool import Pool, Slot
from pyworkflow_ray.storage.storage import Storage

LATER = 4e9


class Actor:
    """A run actor whose answers are given by hand."""

    def __init__(self) -> None:
        self.wake = self
        self.answers: list[Future[bool]] = []

    def remote(self, run_id: str) -> Any:
        self.answers.append(Future())
        return self

    def future(self) -> Future[bool]:
        return self.answers[-1]


class Owner:
    """A dispatcher that hands nothing out, with one run in the hands of one actor."""

    def __init__(self, root: Path) -> None:
        storage = Storage.open(root)
        self.dispatcher = Dispatcher(RuntimeConfig(storage.root, storage.storage_id), 2)
        self.dispatcher.draining = True
        self.dispatcher.then = lambda ref, do: ref.future().add_done_callback(do)
        self.pool = Pool(CodeEnvironment(key="k", python="3.11"), 1, 2)
        self.actor = Actor()
        self.slot = Slot("slot", self.actor, "", {"order-42": Assignment("order-42")}, executing=True)
        self.known = Known("order-42", self.pool, state="running", slot=self.slot)
        self.dispatcher.runs["order-42"] = self.known

    def wake(self) -> None:
        with self.dispatcher.lock:
            self.dispatcher.wake_locked(self.known)

    def answer(self, had_it: bool) -> None:
        self.actor.answers[-1].set_result(had_it)

    def report_parked(self) -> None:
        with self.dispatcher.lock:
            self.dispatcher.report_locked(self.pool, self.slot, RunReport("order-42", "parked", due_at=LATER))

    def woken(self) -> list[tuple[str, bool]]:
        return [(a.cause, a.wake) for a in self.pool.queue]


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    return Owner(tmp_path)


def test_the_actor_has_parked_it_and_its_report_comes_later(owner: Owner) -> None:
    owner.wake()
    owner.answer(had_it=False)
    assert owner.woken() == []
    owner.report_parked()
    assert owner.woken() == [("wake", True)]


def test_the_actor_has_parked_it_and_its_report_comes_first(owner: Owner) -> None:
    owner.wake()
    owner.report_parked()
    owner.answer(had_it=False)
    assert owner.woken() == [("wake", True)]


def test_the_actor_that_had_it_has_woken_it_and_it_parks_again_in_peace(owner: Owner) -> None:
    owner.wake()
    owner.answer(had_it=True)
    owner.report_parked()
    assert owner.woken() == []
    assert owner.known.state == "parked"


def test_a_parked_run_is_woken_once(owner: Owner) -> None:
    owner.report_parked()
    owner.wake()
    owner.wake()
    assert owner.woken() == [("wake", True)]


def test_a_run_that_waits_for_an_actor_takes_the_wake_along(owner: Owner) -> None:
    owner.known.slot = None
    with owner.dispatcher.lock:
        owner.dispatcher.enqueue_locked(owner.known, Assignment("order-42", cause="recovery"))
    owner.wake()
    assert owner.woken() == [("recovery", True)]
