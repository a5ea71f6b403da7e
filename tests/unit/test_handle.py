"""A handle of a run that ended before anybody waited for it: nobody tells of that end again."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path

import pytest

from pyworkflow_ray import handle as handle_module
from pyworkflow_ray.handle import RunHandle
from pyworkflow_ray.storage.lease import Lease
from pyworkflow_ray.storage.storage import Storage
from tests.journals import created, ended


class NoNews(Future):
    """The news that never comes: who waits for it has missed the end."""

    def result(self, timeout=None):
        raise AssertionError("waits for news of an ended run")


class SilentClient:
    """A client that is never told of anything; `before_ended` happens while the handle registers with it."""

    def __init__(self, before_ended=lambda: None):
        self.before_ended = before_ended
        self.forgotten = 0
        self.follower = self

    def certain(self, run_id):
        return False

    def result_of(self, run_id):
        return None

    def ended(self, run_id):
        self.before_ended()
        return NoNews()

    def forget(self, run_id, future):
        self.forgotten += 1


@pytest.fixture
def run(tmp_path: Path):
    storage = Storage.open(tmp_path)
    storage.create_run(created("order-42", storage.storage_id))

    def finish():
        journal, _ = storage.activate("order-42", "", first=True)
        journal.append([ended(1)]).result()
        journal.finish()

    return RunHandle("order-42", storage), finish


def test_the_result_of_an_ended_run_is_there_without_any_news(run, monkeypatch):
    handle, finish = run
    client = SilentClient()
    monkeypatch.setattr(handle_module, "client_of", lambda storage: client)
    finish()
    assert handle.result(timeout=0) == 1
    assert client.forgotten == 1


def test_an_end_while_the_handle_registers_is_not_missed(run, monkeypatch):
    handle, finish = run
    client = SilentClient(before_ended=finish)
    monkeypatch.setattr(handle_module, "client_of", lambda storage: client)
    assert handle.result() == 1


def test_awaiting_an_end_while_the_handle_registers_misses_nothing(run, monkeypatch):
    handle, finish = run
    client = SilentClient(before_ended=finish)
    monkeypatch.setattr(handle_module, "client_of", lambda storage: client)

    async def bounded():
        return await asyncio.wait_for(handle._value_async(), 5)

    assert asyncio.run(bounded()) == 1


def test_explain_knows_whether_anybody_holds_the_run(tmp_path: Path):
    storage = Storage.open(tmp_path)
    lease = Lease.join(storage)
    storage.create_run(created("order-42", storage.storage_id), lease=lease.id)
    handle = RunHandle("order-42", storage)
    held = handle.explain()
    lease.close()
    left = handle.explain()
    assert "recover" not in held.next
    assert "recover" in left.next
