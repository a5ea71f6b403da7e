"""Compensations: in reverse order, durably, whenever the run can't complete, and whatever dies meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.engine.commands import Limits
from pyworkflow_ray.engine.events import Event
from tests.unit.engine.crashing import CrashingRun, World, crash_everywhere

LEDGER: list[str] = []


@pw.step
def book(what: str) -> str:
    LEDGER.append(f"book {what}")
    return what


@pw.step
def release(what: str) -> None:
    LEDGER.append(f"release {what}")


@pw.step(max_retries=2, retry_delay=5)
def release_late(what: str) -> None:
    LEDGER.append(f"try {what}")
    if pw.current_step().attempt < 3:
        raise ConnectionError("not yet")


@pw.step
def can_not(what: str) -> None:
    LEDGER.append(f"can not {what}")
    raise LookupError(f"no {what}")


@pw.step
def pay() -> None:
    raise PermissionError("card declined")


@pw.step
def slow() -> None:
    raise AssertionError("never ends")


STEPS = (book, release, release_late, can_not, pay, slow)


@pytest.fixture(autouse=True)
def _ledger() -> None:
    LEDGER.clear()


def world(**given: Any) -> World:
    return World(STEPS, never=frozenset({slow.definition.name}), **given)


def waits_for_ever(events: list[Event]) -> bool:
    return any(getattr(e, "step", "") == slow.definition.name for e in events)


async def trip() -> str:
    run = pw.current_run()
    for what in ("flight", "hotel", "car"):
        await book(what)
        run.on_failure(release, what)
    await pay()
    return "booked"


def released(run: CrashingRun) -> list[str]:
    """What was undone, by the completions that the log has."""
    undone = {e.position: e.args[0].data for e in run.events if e.type == "step_scheduled" and e.compensates}  # type: ignore[attr-defined]
    return [undone[e.position] for e in run.events if e.type == "step_completed" and e.position in undone]  # type: ignore[attr-defined]


def test_a_failed_run_is_undone_in_reverse_order_and_fails_with_its_own_error() -> None:
    run = CrashingRun(trip, world()).run()
    assert run.ending() == ("failed", "PermissionError", "card declined", run.ending()[3])
    assert LEDGER == ["book flight", "book hotel", "book car", "release car", "release hotel", "release flight"]
    assert run.events[-1].position == "4"  # type: ignore[attr-defined]  # the step that failed the run, not the last


def test_a_run_that_completes_undoes_nothing() -> None:
    async def flow() -> str:
        pw.current_run().on_failure(release, "flight")
        return await book("flight")

    run = CrashingRun(flow, world()).run()
    assert run.ending() == ("completed", "'flight'")
    assert LEDGER == ["book flight"]


def test_after_a_crash_at_every_event_each_compensation_is_completed_once_in_order() -> None:
    calm, crashed = crash_everywhere(trip, world)
    assert len(crashed) >= 15
    for run in (calm, *crashed):
        assert released(run) == ["car", "hotel", "flight"]


def test_a_cancelled_run_is_undone_in_reverse_order_with_a_crash_at_every_event() -> None:
    async def flow() -> None:
        for what in ("flight", "hotel"):
            await book(what)
            pw.current_run().on_failure(release, what)
        await slow()

    calm, crashed = crash_everywhere(flow, lambda: world(cancel_when=waits_for_ever))
    assert calm.ending() == ("cancelled", "enough", "None")
    assert calm.steps("step_cancelled") == ["slow"]
    for run in (calm, *crashed):
        assert released(run) == ["hotel", "flight"]


def test_a_body_that_swallows_its_cancel_and_returns_is_undone() -> None:
    async def flow() -> str:
        pw.current_run().on_failure(release, "flight")
        try:
            await slow()
        except asyncio.CancelledError:
            pass
        return "done"

    run = CrashingRun(flow, world(cancel_when=waits_for_ever)).run()
    assert run.ending()[0] == "cancelled"
    assert LEDGER == ["release flight"]


async def stubborn() -> None:
    pw.current_run().on_failure(release, "flight")
    pw.current_run().on_failure(release_late, "hotel")
    while True:
        try:
            await slow()
        except asyncio.CancelledError:
            pass


def test_a_body_that_outlasts_its_grace_is_abandoned_and_undone_with_a_crash_at_every_event() -> None:
    calm, crashed = crash_everywhere(stubborn, lambda: world(cancel_when=waits_for_ever))
    assert "body_abandoned" in calm.types()
    assert calm.ending() == ("cancelled", "enough", "None")
    assert LEDGER[:4] == ["try hotel", "try hotel", "try hotel", "release flight"]
    for run in crashed:
        assert released(run) == ["hotel", "flight"]


def test_compensations_that_take_longer_than_the_grace_are_not_cut_short() -> None:
    async def flow() -> None:
        pw.current_run().on_failure(release_late, "hotel")
        await slow()

    run = CrashingRun(
        flow, world(cancel_when=waits_for_ever, limits=Limits(cancel_grace_s=1.0, park_after_s=100.0))
    ).run()
    assert run.ending() == ("cancelled", "enough", "None")
    assert LEDGER == ["try hotel"] * 3
    assert run.steps("step_completed") == ["release_late"]


def test_a_run_over_its_max_duration_is_undone_and_fails_with_the_timeout() -> None:
    async def flow() -> None:
        pw.current_run().on_failure(release_late, "hotel")
        await slow()

    calm, crashed = crash_everywhere(flow, lambda: world(created={"max_duration_s": 60.0}))
    assert calm.ending()[:2] == ("failed", "StepTimeoutError")
    for run in (calm, *crashed):
        assert released(run) == ["hotel"]


def test_a_compensation_that_fails_is_reported_and_does_not_stop_the_others() -> None:
    async def flow() -> None:
        pw.current_run().on_failure(release, "flight")
        pw.current_run().on_failure(can_not, "hotel")
        pw.current_run().on_failure(release, "car")
        await pay()

    calm, crashed = crash_everywhere(flow, world)
    assert LEDGER[:3] == ["release car", "can not hotel", "release flight"]
    _, kind, _, notes = calm.ending()
    assert kind == "PermissionError"
    assert [n for n in notes if "can_not failed: LookupError: no hotel" in n]
    assert len(crashed) >= 8


def test_what_fails_while_a_cancelled_run_is_undone_is_the_error_of_its_cancel() -> None:
    async def flow() -> None:
        pw.current_run().on_failure(can_not, "hotel")
        await slow()

    run = CrashingRun(flow, world(cancel_when=waits_for_ever)).run()
    assert run.ending() == ("cancelled", "enough", "ExceptionGroup('compensations failed', [LookupError('no hotel')])")


def test_a_cancel_while_a_failed_run_is_undone_changes_nothing() -> None:
    calm, _ = crash_everywhere(trip, world)
    first = next(i for i, e in enumerate(calm.events) if getattr(e, "compensates", False))
    struck = 0
    for number in range(first + 1, len(calm.events)):
        run = CrashingRun(trip, world(cancel_when=lambda events, n=number: len(events) >= n)).run()  # type: ignore[misc]
        struck += "run_cancel_requested" in run.types()
        assert (run.ending()[:2], released(run)) == (("failed", "PermissionError"), ["car", "hotel", "flight"])
    assert struck >= 6


def test_whatever_else_runs_is_cancelled_before_the_first_compensation_begins() -> None:
    async def other() -> None:
        await slow()
        await book("too late")

    async def sleeper() -> None:
        await asyncio.sleep(3600)
        await book("too late")

    async def flow() -> None:
        tasks = [asyncio.create_task(other()), asyncio.create_task(sleeper())]
        pw.current_run().on_failure(release, "flight")
        await book("flight")
        assert tasks
        await pay()

    calm, crashed = crash_everywhere(flow, world)
    for run in (calm, *crashed):
        begun = next(e.seq for e in run.events if getattr(e, "compensates", False))
        ended = [e.seq for e in run.events if e.type in ("step_cancelled", "timer_cancelled")]
        assert len(ended) == 2
        assert max(ended) < begun
    assert "book too late" not in LEDGER


def test_a_result_that_can_not_be_stored_undoes_the_run() -> None:
    async def flow() -> Any:
        pw.current_run().on_failure(release, "flight")
        return (n for n in [1])

    run = CrashingRun(flow, world()).run()
    assert run.ending()[0] == "failed"
    assert LEDGER == ["release flight"]


def test_arguments_are_taken_as_they_were_when_registered() -> None:
    @pw.step
    def note(items: list[str]) -> None:
        LEDGER.extend(items)

    async def flow() -> None:
        items = ["flight"]
        pw.current_run().on_failure(note, items)
        items.append("hotel")
        await pay()

    CrashingRun(flow, World((*STEPS, note))).run()
    assert LEDGER == ["flight"]


def test_what_can_not_be_registered_is_refused_where_it_is_registered() -> None:
    seen: list[str] = []

    async def flow() -> None:
        run = pw.current_run()
        for call in (
            lambda: run.on_failure(print, 1),
            lambda: run.on_failure(release),
            lambda: run.on_failure(book, 1),
        ):
            try:
                call()
            except (pw.ConfigurationError, TypeError, ValueError) as error:
                seen.append(type(error).__name__)

    CrashingRun(flow, world()).run()
    assert seen == ["ConfigurationError", "TypeError", "ValidationError"]


def test_a_step_can_not_register() -> None:
    @pw.step
    def wrong() -> None:
        pw.current_run().on_failure(release, "x")

    async def flow() -> None:
        await wrong()

    run = CrashingRun(flow, World((wrong,))).run()
    assert run.ending()[:2] == ("failed", "ConfigurationError")
    assert "workflow's body" in run.ending()[2]
