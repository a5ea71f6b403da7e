"""A run that failed of a map's failures is resumed: the failed items alone are executed again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.engine.events import RunFailed
from pyworkflow_ray.engine.history import failed_positions
from pyworkflow_ray.observability.view import explain
from tests.unit.engine.crashing import CrashingRun, World

DOWN: set[int] = set()
EXECUTED: Counter[int] = Counter()


@pw.step
def work(n: int) -> int:
    EXECUTED[n] += 1
    if n in DOWN:
        raise ValueError(f"no {n}")
    return 10 * n


@pw.step
def note(text: str) -> str:
    return text


async def flow() -> list[Any]:
    await note("before")
    batch = await work.map(range(30), concurrency=2, chunk_size=4)
    await note(f"{len(batch.failed)} failed")
    batch.raise_if_failed()
    return [batch.results, await note("after")]


@pytest.fixture(autouse=True)
def _ledger() -> None:
    EXECUTED.clear()
    DOWN.clear()


def failed_run(body: Any = flow) -> CrashingRun:
    DOWN.update((0, 5, 6, 7, 29))
    run = CrashingRun(body, World((work, note))).run()
    assert isinstance(run.ended, RunFailed)
    return run


def resumed(run: CrashingRun, body: Any = flow, **world: Any) -> CrashingRun:
    again = CrashingRun(body, World((work, note), **world))
    again.events = list(run.events)
    again.first = ("resume", failed_positions(run.events))
    return again.run()


def test_only_the_failed_items_are_executed_again_and_the_run_completes() -> None:
    run = failed_run()
    assert run.ended.position == "2"  # type: ignore[union-attr]
    DOWN.clear()
    EXECUTED.clear()
    again = resumed(run)
    assert again.ending() == ("completed", repr([[10 * n for n in range(30)], "after"]))
    assert dict(EXECUTED) == {0: 1, 5: 1, 6: 1, 7: 1, 29: 1}
    notes = [e.args[0].data for e in again.events if e.type == "step_scheduled"]  # type: ignore[attr-defined]
    assert notes == ["before", "5 failed", "0 failed", "after"]


def test_after_a_crash_at_every_event_of_the_resumed_run_it_ends_the_same() -> None:
    run = failed_run()
    DOWN.clear()
    calm = resumed(run)
    for number in range(len(run.events) + 1, len(calm.events)):
        EXECUTED.clear()
        again = resumed(run, crash_after=number)
        assert again.crashes == 1
        assert again.ending() == calm.ending(), f"a crash after event {number}"
        assert set(EXECUTED) <= {0, 5, 6, 7, 29}


def test_items_that_fail_again_fail_the_run_again_and_it_is_resumed_again() -> None:
    run = failed_run()
    DOWN.intersection_update({6})
    second = resumed(run)
    assert second.ending()[:3] == ("failed", "ExceptionGroup", "1 of 30 items failed (ValueError 1) (1 sub-exception)")
    DOWN.clear()
    EXECUTED.clear()
    third = resumed(second)
    assert third.ending()[0] == "completed"
    assert dict(EXECUTED) == {6: 1}


def test_a_map_that_stopped_early_goes_on_with_what_it_had_not_done() -> None:
    async def stops() -> list[Any]:
        batch = await work.map(range(30), concurrency=2, chunk_size=4, max_failures=1)
        batch.raise_if_failed(max_failures=1)
        return batch.results

    run = failed_run(stops)
    assert "step_cancelled" in run.types()
    done = {n for n in EXECUTED if n not in DOWN}
    DOWN.clear()
    EXECUTED.clear()
    again = resumed(run, stops)
    assert again.ending() == ("completed", repr([10 * n for n in range(30)]))
    recorded = {n for e in run.events if e.type == "chunk_completed" for n in range(e.first, e.first + e.done)}  # type: ignore[attr-defined]
    assert not set(EXECUTED) & (done & recorded)


def test_a_step_that_is_not_idempotent_is_tried_again_by_resume_and_not_by_the_crash_after_it() -> None:
    once = work.options(idempotent=False)

    async def careful() -> list[Any]:
        batch = await once.map(range(30), chunk_size=3)
        batch.raise_if_failed()
        return batch.results

    run = failed_run(careful)
    DOWN.clear()
    assert resumed(run, careful).ending()[0] == "completed"
    crashed = resumed(run, careful, crash_after=len(run.events) + 1)
    assert crashed.ending()[1] == "ExceptionGroup"
    assert "StepLostError" in crashed.ending()[2]


def test_the_view_counts_what_is_tried_again() -> None:
    run = failed_run()
    view = explain(run.events, run.now)
    assert view.verdict == "failed in work"
    assert view.steps[1].outcome == "30 of 30 done, 5 failed (ValueError 5)"
    DOWN.clear()
    after = explain(resumed(run).events, run.now + 10)
    assert after.steps[1].outcome == "30 of 30 done"
    assert [a.status for a in after.steps[1].attempts] == ["succeeded", "succeeded"]
