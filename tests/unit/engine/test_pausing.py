"""Pauses that a step or a person asks for, fresh attempts at a resume, and retries that are woken."""

from __future__ import annotations

import asyncio
import random

import pytest

from pyworkflow_ray.engine.calls import Outcome
from pyworkflow_ray.engine.commands import Dispatch, Finish, Park, Pause
from pyworkflow_ray.engine.driver import Driver
from pyworkflow_ray.engine.events import RunActivated
from pyworkflow_ray.step import step
from pyworkflow_ray.testing.simulator import START_AT, Simulator
from tests.unit.engine.test_driver import Run


@step(max_retries=1, retry_delay=60, on_exhausted="pause", total_timeout="1h")
def careful(n: int) -> int:
    return n


@step(max_retries=5, retry_delay=60)
def later(n: int) -> int:
    return n


@step(idempotent=False)
def charge(n: int) -> int:
    return n


async def one():
    return await careful(1)


async def two():
    return await asyncio.gather(careful(1), charge(2))


async def then_more():
    async def first():
        return await careful(1)

    async def second():
        return [await charge(2), await later(3)]

    return await asyncio.gather(first(), second())


def exhaust(run, position="1", dispatch=1, attempt=2, why="exhausted"):
    record = run.failure(position, dispatch, attempt).model_copy(update={"why": why})
    run.do("outcome", Outcome(position, dispatch, "failed", attempt, [record], error=record.error, why=why))


def hand_back(run, position="1", dispatch=1, attempt=1, after=60.0):
    due = run.now + after
    record = run.failure(position, dispatch, attempt, retry_at=due)
    run.do("outcome", Outcome(position, dispatch, "handed_back", attempt, [record], retry_at=due))
    return due


def exhausted_run(flow=one):
    run = Run(flow)
    hand_back(run)
    again = run.again(flow, cause="wake", charged=False, now=START_AT + 60)
    exhaust(again)
    return again


def calls(run):
    return [e.call for e in run.of(Dispatch)]


# on_exhausted="pause" -------------------------------------------------------------------------------------------------


def test_case_13_a_step_that_used_up_its_attempts_pauses_its_run_with_the_error_in_view():
    run = exhausted_run()
    (pause,) = run.of(Pause)
    assert (pause.event.reason, pause.event.details["step"]) == ("step_exhausted", careful.definition.name)
    assert "LookupError: no" in pause.event.message
    assert "runs resume simulated" in pause.event.message
    assert run.types()[-2:] == ["attempt_failed", "run_paused"]
    assert "step_failed" not in run.types()


def test_case_13_a_resume_grants_a_fresh_set_of_attempts_at_once_and_numbers_go_on():
    run = exhausted_run()
    again = run.again(one, epoch=2, cause="resume", charged=False, now=START_AT + 86_400)
    (call,) = calls(again)
    assert (call.first_attempt, call.retries_used, call.not_before, call.began_at) == (3, 0, None, None)
    assert [failure.attempt for failure in call.previous] == [1, 2]
    again.complete("1", 7, attempt=3)
    assert again.of(Finish)
    hand = run.again(one, epoch=2, cause="resume", charged=False)
    hand_back(hand, attempt=3)
    exhaust(Run(one, hand.events, epoch=3, cause="wake", now=START_AT + 9_000), attempt=4)


def test_a_step_may_use_up_its_attempts_and_be_resumed_again_and_again():
    run = exhausted_run()
    for n in range(3):
        run = run.again(one, epoch=2 + n, cause="resume", charged=False, now=run.now + 3600)
        assert [call.first_attempt for call in calls(run)] == [3 + n]
        exhaust(run, attempt=3 + n)
        assert len(run.of(Pause)) == 1


def test_a_total_timeout_that_is_used_up_pauses_too_but_a_permanent_error_fails():
    run = Run(one)
    exhaust(run, attempt=1, why="deadline")
    assert run.of(Pause)
    run = Run(one)
    exhaust(run, attempt=1, why="permanent")
    assert not run.of(Pause)
    assert run.types()[-1] == "run_failed"


def test_the_runs_own_end_does_not_pause_it():
    @step(max_retries=5, on_exhausted="pause")
    def hurried(n: int) -> int:
        return n

    async def flow():
        return await hurried(1)

    run = Run(flow, created={"max_duration_s": 100.0})
    exhaust(run, attempt=1, why="deadline")
    assert run.types()[-1] == "run_failed"


def test_the_pause_waits_for_what_runs_and_begins_nothing_more():
    run = Run(then_more)
    exhaust(run, "t1.1", attempt=1)
    assert not run.of(Pause)
    run.complete("t2.1", 2)
    assert run.dispatched() == ["t1.1", "t2.1"], "the next step of the other branch is held"
    assert run.of(Pause)
    assert run.types()[-2:] == ["step_handed_back", "run_paused"]
    again = run.again(then_more, cause="resume", charged=False)
    assert [(c.position, c.first_attempt) for c in calls(again)] == [("t1.1", 2), ("t2.2", 1)]
    again.complete("t1.1", 1, attempt=2)
    again.complete("t2.2", 3)
    assert again.of(Finish)


def test_a_step_that_is_not_idempotent_is_not_lost_by_a_pause():
    run = Run(two)
    exhaust(run, "t1.1", attempt=1)
    run.complete("t2.1", 2)
    again = run.again(two, cause="resume", charged=False)
    assert [c.position for c in calls(again)] == ["t1.1"]


def test_an_owner_that_dies_on_the_way_into_the_pause_pauses_again():
    run = exhausted_run()
    again = run.again(one, run.cut_after("attempt_failed"), epoch=2)
    assert again.dispatched() == []
    assert again.of(Pause)
    late = Run(one)
    exhaust(late, attempt=1, why="deadline")
    assert late.again(one, late.cut_after("attempt_failed")).of(Pause)


def test_a_cancelled_run_does_not_pause():
    async def stubborn():
        try:
            await later(1)
        finally:
            await careful(2)

    run = Run(stubborn)
    run.do("cancel", "enough")
    exhaust(run, "2", attempt=1)
    assert not run.of(Pause)
    assert run.types()[-1] == "run_cancelled"


def test_a_cancel_ends_the_wait_for_a_pause():
    run = Run(two)
    exhaust(run, "t1.1", attempt=1)
    run.do("cancel", "enough")
    assert not run.of(Pause)
    assert run.types()[-1] == "run_cancelled"


def test_case_9_a_resume_takes_the_policy_that_the_code_now_gives_and_a_recovery_does_not():
    run = exhausted_run()
    changed = careful.options(max_retries=7)

    async def newer():
        return await changed(1)

    recovered = Run(newer, run.cut_after("step_dispatched"), epoch=2, cause="recovery", now=run.now)
    assert [c.policy.max_retries for c in calls(recovered)] == [1]
    resumed = run.again(newer, epoch=2, cause="resume", charged=False)
    assert [c.policy.max_retries for c in calls(resumed)] == [7]
    assert resumed.events[-1].policy.max_retries == 7
    later_on = Run(one, resumed.events, epoch=3, cause="recovery", now=run.now)
    assert [c.policy.max_retries for c in calls(later_on)] == [7], "it holds from the resume on"


def test_a_failed_run_that_is_resumed_takes_the_new_policy_too():
    async def flow():
        return await later(1)

    run = Run(flow)
    run.fail("1")
    changed = later.options(max_retries=9)

    async def newer():
        return await changed(1)

    again = run.again(newer, cause="resume", charged=False, resets=["1"])
    assert [c.policy.max_retries for c in calls(again)] == [9]


# By hand --------------------------------------------------------------------------------------------------------------


def test_a_run_is_paused_by_hand_once_what_runs_has_ended():
    run = Run(then_more)
    run.do("pause")
    assert not run.of(Pause)
    run.complete("t1.1", 1)
    run.complete("t2.1", 2)
    (pause,) = run.of(Pause)
    assert pause.event.reason == "user"
    again = run.again(then_more, cause="resume", charged=False)
    assert [c.position for c in calls(again)] == ["t2.2"]
    again.complete("t2.2", 3)
    assert again.of(Finish)


def test_a_parked_run_is_paused_without_dispatching_anything():
    async def flow():
        return await later(1)

    run = Run(flow)
    due = hand_back(run)
    paused = Run.__new__(Run)
    _begin(paused, flow, run.events, now=due + 1, before=lambda driver: driver.pause(due + 1))
    assert paused.dispatched() == []
    assert paused.of(Pause)
    again = paused.again(flow, epoch=2, cause="resume", charged=False)
    assert [c.first_attempt for c in calls(again)] == [2]


def _nothing(driver):
    pass


def _begin(run, flow, events, *, now, before=_nothing, after=_nothing):
    """An activation as a run actor makes it: what a person asked for is done before the effects are carried out."""
    run.simulator = Simulator(flow, {})
    run.codec, run.events, run.now, run.seen = run.simulator.codec, list(events), now, []
    run.driver = Driver(flow, run.codec, rng=random.Random(0))
    before(run.driver)
    run.driver.activate(list(events), RunActivated(epoch=1, cause="wake"), now)
    after(run.driver)
    run.drain()


def test_a_run_that_ends_before_it_can_pause_ends():
    run = Run(one)
    run.do("pause")
    run.complete("1", 7)
    assert run.of(Finish)
    assert not run.of(Pause)


def test_a_pausing_run_asks_for_no_tick_because_of_a_retry_that_is_due():
    async def flow():
        return await asyncio.gather(later(1), charge(2))

    run = Run(flow)
    hand_back(run, "t1.1")
    run.do("pause")
    run.now += 120
    run.do("tick")
    assert run.dispatched() == ["t1.1", "t2.1"]
    assert run.driver.next_due is None or run.driver.next_due > run.now, "it must not spin"
    run.complete("t2.1", 2)
    assert run.of(Pause)


def test_pausing_twice_or_after_the_end_changes_nothing():
    run = Run(one)
    run.do("pause")
    run.do("pause")
    run.complete("1", 7)
    run.do("pause")
    assert len(run.of(Finish)) == 1


# wake -----------------------------------------------------------------------------------------------------------------


def woken():
    async def flow():
        return await asyncio.gather(later(1), asyncio.sleep(3600))

    run = Run(flow)
    hand_back(run, "t1.1", after=1800.0)
    assert run.of(Park)
    again = Run.__new__(Run)
    _begin(again, flow, run.events, now=START_AT + 10, after=lambda driver: driver.wake(START_AT + 10))
    return flow, again


def test_case_13_a_wake_makes_parked_retries_happen_now_and_leaves_sleeps_as_they_are():
    _, run = woken()
    (call,) = calls(run)
    assert (call.position, call.first_attempt, call.not_before) == ("t1.1", 2, None)
    assert "timer_fired" not in run.types()


def test_a_woken_retry_is_not_waited_for_again_after_a_crash():
    flow, run = woken()
    again = run.again(flow, epoch=2, cause="recovery", charged=True, now=run.now + 5)
    assert [c.first_attempt for c in calls(again)] == [2], "the wake is durable"
    assert again.now < START_AT + 1800


@pytest.mark.parametrize("when", ["ended", "paused"])
def test_a_wake_of_a_run_that_does_not_go_on_changes_nothing(when):
    run = exhausted_run() if when == "paused" else Run(one)
    if when == "ended":
        run.complete("1", 7)
    events = len(run.events)
    run.do("wake")
    assert len(run.events) == events


# After a restart ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "at_once"), [(3, 3), (100, 0)])
def test_case_12_many_retries_that_fell_due_while_nobody_owned_the_run_do_not_begin_together(count, at_once):
    async def flow():
        return await asyncio.gather(*(later(n) for n in range(count)))

    run = Run(flow)
    for n in range(count):
        hand_back(run, f"t{n + 1}.1")
    again = run.again(flow, now=START_AT + 3600)
    assert len(calls(again)) == at_once
    begun = []
    while len(calls(again)) < count:
        before = len(calls(again))
        again.now = again.driver.next_due
        again.do("tick")
        begun += [again.now - START_AT - 3600] * (len(calls(again)) - before)
    assert max(begun, default=0.0) <= 2.0
    assert all(sum(k <= 2 * at < k + 1 for at in begun) <= 32 for k in range(4))
    assert len({round(at, 9) for at in begun}) == len(begun), "with jitter"
