"""A resume that comes between a run's last event and its actor's report is not lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.engine.events import CodeRef, ErrorInfo, RunFailed, RunPaused, StepScheduled
from pyworkflow_ray.errors import RunError
from pyworkflow_ray.runtime import taking
from pyworkflow_ray.runtime.messages import RunReport
from pyworkflow_ray.storage.compact import Rules, compact
from tests.journals import created
from tests.unit.runtime.test_wake import Owner


def _held(tmp_path: Path, *, paused: bool) -> Owner:
    owner = Owner(tmp_path)
    storage = owner.dispatcher.storage
    storage.create_run(created("order-42", storage.storage_id))
    if paused:
        journal, _ = storage.activate("order-42", "", first=True)
        journal.append([RunPaused(seq=1, reason="code", message="why")]).result()
        journal.close()
    return owner


def test_a_pause_that_the_log_has_and_the_controller_has_not_is_waited_for(tmp_path: Path) -> None:
    owner = _held(tmp_path, paused=True)
    wait_for = owner.dispatcher.changed.wait_for

    def report_meanwhile(predicate: Callable[[], bool], timeout: float | None = None) -> Any:
        owner.dispatcher.report_locked(owner.pool, owner.slot, RunReport("order-42", "paused", message="why"))
        return wait_for(predicate, timeout)

    owner.dispatcher.changed.wait_for = report_meanwhile  # type: ignore[method-assign]
    assert taking.resume(owner.dispatcher, "order-42") == "asked"
    assert [assignment.cause for assignment in owner.pool.queue] == ["resume"]


def test_a_run_that_goes_on_is_left_alone_at_once(tmp_path: Path) -> None:
    owner = _held(tmp_path, paused=False)

    def never(predicate: Callable[[], bool], timeout: float | None = None) -> Any:
        raise AssertionError("nothing to wait for")

    owner.dispatcher.changed.wait_for = never  # type: ignore[method-assign]
    assert taking.resume(owner.dispatcher, "order-42") == "nothing"
    assert not owner.pool.queue


def test_a_failed_run_that_was_undone_is_not_resumed(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    storage = owner.dispatcher.storage
    storage.create_run(created("order-42", storage.storage_id))
    journal, _ = storage.activate("order-42", "", first=True)
    code = CodeRef(how="import", name="refund")
    undo = StepScheduled(seq=1, position="2", number=2, step="refund", code=code, compensates=True)
    failed = RunFailed(seq=2, position="1", error=ErrorInfo(kind="permanent", type="ValueError"))
    journal.append([undo, failed]).result()
    journal.finish()
    owner.dispatcher.runs.clear()
    with pytest.raises(RunError, match=r"its compensations have run.*runs rerun order-42"):
        taking.resume(owner.dispatcher, "order-42")


def test_a_failed_run_that_was_compacted_is_not_resumed_and_the_error_says_so(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    storage = owner.dispatcher.storage
    storage.create_run(created("order-42", storage.storage_id))
    journal, _ = storage.activate("order-42", "", first=True)
    journal.append([RunFailed(seq=1, error=ErrorInfo(kind="permanent", type="E", message="m"))]).result()
    journal.finish()
    compact(storage, Rules(failed_after_s=1.0))
    owner.dispatcher.runs.clear()
    with pytest.raises(RunError, match="was compacted since"):
        taking.resume(owner.dispatcher, "order-42")
