"""The driver, input by input: what a torn commit, a resume, a pause or a stubborn body leave behind."""

from __future__ import annotations

import asyncio
import gc
import random

import pytest

from pyworkflow_ray.engine.calls import Outcome
from pyworkflow_ray.engine.commands import Append, Dispatch, Finish, Limits, Pause
from pyworkflow_ray.engine.driver import Driver
from pyworkflow_ray.engine.events import AttemptFailed, RunActivated, StepStarted
from pyworkflow_ray.engine.history import failed_positions
from pyworkflow_ray.step import step
from pyworkflow_ray.testing.simulator import START_AT, Simulator

PLAIN_CALLS = []


@step(max_retries=3)
def work(n: int) -> int:
    PLAIN_CALLS.append(n)
    return n


@step(idempotent=False)
def charge(n: int) -> int:
    return n


class Run:
    """A driver with a store that confirms at once, unless told to hold."""

    def __init__(self, flow, events=None, *, epoch=0, cause="start", now=START_AT, created=None, **activation):
        self.simulator = Simulator(flow, {})
        self.codec = self.simulator.codec
        self.events = list(events or self.simulator.store.events())
        if created:
            self.events[0] = self.events[0].model_copy(update=created)
        self.now, self.seen = now, []
        limits = activation.pop("limits", None)
        self.driver = Driver(flow, self.codec, rng=random.Random(0), limits=limits)
        self.driver.activate(list(self.events), RunActivated(epoch=epoch, cause=cause, **activation), now)
        self.drain()

    def drain(self):
        while effects := self.driver.effects():
            for effect in effects:
                self.seen.append(effect)
                if isinstance(effect, Append):
                    self.events.extend(effect.events)
                    self.driver.durable(effect.events[-1].seq, self.now)

    def do(self, name, *args, **kwargs):
        getattr(self.driver, name)(*args, **kwargs, now=self.now)
        self.drain()

    def of(self, kind):
        return [e for e in self.seen if isinstance(e, kind)]

    def dispatched(self):
        return [e.call.position for e in self.of(Dispatch)]

    def types(self):
        return [e.type for e in self.events]

    def start(self, position, dispatch=1, attempt=1):
        self.do("record", StepStarted(position=position, dispatch=dispatch, attempt=attempt, started_at=self.now))

    def complete(self, position, value, dispatch=1, attempt=1):
        self.do("outcome", Outcome(position, dispatch, "completed", attempt, result=self.codec.encode(value)))

    def failure(self, position, dispatch=1, attempt=1, retry_at=None):
        return AttemptFailed(
            position=position,
            dispatch=dispatch,
            attempt=attempt,
            started_at=self.now,
            ended_at=self.now,
            error=self.codec.encode_error(LookupError("no"), "permanent"),
            retry_at=retry_at,
        )

    def fail(self, position, dispatch=1, attempt=1):
        record = self.failure(position, dispatch, attempt)
        outcome = Outcome(position, dispatch, "failed", attempt, [record], error=record.error, why="permanent")
        self.do("outcome", outcome)

    def cut_after(self, kind):
        last = max(i for i, e in enumerate(self.events) if e.type == kind)
        return self.events[: last + 1]

    def again(self, flow, events=None, **options):
        options = {"epoch": 1, "cause": "recovery", "charged": True, "now": self.now + 1, **options}
        return Run(flow, events or self.events, **options)


def test_a_step_that_is_not_idempotent_is_never_repeated_when_the_commit_of_its_loss_was_torn():
    async def flow():
        return await charge(1)

    run = Run(flow)
    run.do("lost", "1", 1, cause="worker_died", charged=True)
    again = run.again(flow, run.cut_after("step_lost"))
    assert again.dispatched() == []
    assert again.events[-1].error.type == "StepLostError"


def test_a_permanent_failure_is_not_tried_again_when_its_commit_was_torn():
    async def flow():
        return await work(1)

    run = Run(flow)
    run.start("1")
    run.fail("1")
    again = run.again(flow, run.cut_after("attempt_failed"))
    assert again.dispatched() == []
    assert (again.events[-1].type, again.events[-1].error.type) == ("run_failed", "LookupError")


def test_a_hand_back_is_durable_soon_although_another_step_goes_on():
    async def flow():
        await asyncio.gather(charge(1), work(2))

    run = Run(flow)
    due = run.now + 3600
    record = run.failure("t1.1", retry_at=due)
    run.do("outcome", Outcome("t1.1", 1, "handed_back", 1, [record], retry_at=due))
    assert run.driver.next_due <= run.now + Limits().flush_after_s
    run.now = run.driver.next_due
    run.do("tick")
    assert "step_handed_back" in run.types()
    again = run.again(flow)
    assert "t1.1" not in again.dispatched()
    assert "step_failed" not in again.types()
    again.now = due
    again.do("tick")
    assert again.of(Dispatch)[-1].call.first_attempt == 2


def stubborn():
    async def flow():
        while True:
            try:
                await work(1)
            except asyncio.CancelledError:
                pass

    return flow


def test_a_run_that_ignores_its_max_duration_fails_with_a_timeout():
    run = Run(stubborn(), created={"max_duration_s": 5.0})
    for after in (5, 15):
        run.now = START_AT + after
        run.do("tick")
    assert run.events[-1].type == "run_failed"
    assert run.events[-1].error.type == "StepTimeoutError"


def test_a_forced_end_whose_commit_was_torn_is_made_again():
    run = Run(stubborn())
    run.do("cancel", "enough")
    run.now += 10
    run.do("tick")
    assert run.types()[-2:] == ["step_cancelled", "run_cancelled"]
    again = run.again(stubborn(), run.events[:-1])
    assert not again.of(Pause)
    again.now += 10
    again.do("tick")
    assert again.types()[-1] == "run_cancelled"


def test_a_cancelled_body_that_waits_for_nothing_is_ended_after_its_grace():
    async def flow():
        try:
            await work(1)
        except asyncio.CancelledError:
            await asyncio.Event().wait()

    run = Run(flow)
    run.do("cancel", None)
    assert not run.of(Pause)
    assert run.driver.next_due == run.now + Limits().cancel_grace_s
    run.now += 10
    run.do("tick")
    assert run.of(Finish)[0].event.type == "run_cancelled"


def resume(run, flow, **options):
    return run.again(flow, cause="resume", charged=False, resets=failed_positions(run.events), **options)


def test_a_resumed_run_tries_the_failed_step_again_and_keeps_what_was_done():
    async def flow():
        return [await work(1), await work(2)]

    run = Run(flow)
    run.complete("1", 1)
    run.fail("2")
    resumed = resume(run, flow)
    assert [(e.call.position, e.call.first_attempt, e.call.retries_used) for e in resumed.of(Dispatch)] == [("2", 2, 0)]
    resumed.complete("2", 2, attempt=2)
    assert resumed.events[-1].result.data == [1, 2]


def test_a_resumed_run_tries_again_what_was_cancelled_beside_the_failure():
    async def flow():
        return await asyncio.gather(work(1), work(2), work(3))

    run = Run(flow)
    run.complete("t1.1", 1)
    run.fail("t2.1")
    assert run.types()[-2:] == ["step_cancelled", "run_failed"]
    resumed = resume(run, flow)
    assert sorted(resumed.dispatched()) == ["t2.1", "t3.1"]
    resumed.complete("t2.1", 2, attempt=2)
    resumed.complete("t3.1", 3)
    assert resumed.events[-1].result.data == [1, 2, 3]


def test_a_second_failure_during_the_clean_up_of_the_first_is_not_forgotten_by_resume():
    async def flow():
        second = asyncio.ensure_future(work(2))
        try:
            await work(1)
        finally:
            await asyncio.wait([second])
        return await second

    run = Run(flow)
    run.fail("1")
    run.fail("t1.1")
    assert (run.events[-1].type, run.events[-1].position) == ("run_failed", "1")
    resumed = resume(run, flow)
    resumed.complete("1", 1, attempt=2)
    assert (resumed.events[-1].type, resumed.events[-1].position) == ("run_failed", "t1.1")


def test_a_completion_kept_by_resume_is_dropped_when_the_body_now_cancels_its_step():
    async def flow():
        tasks = [asyncio.ensure_future(work(n)) for n in (1, 2, 3)]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0] in done:
            await asyncio.wait(pending)
            tasks[0].result()
        for task in pending:
            task.cancel()
        return [await task for task in done] + [await work(9)]

    run = Run(flow)
    run.fail("t1.1")
    run.complete("t2.1", 2)
    run.complete("t3.1", 3)
    assert run.events[-1].type == "run_failed"
    resumed = resume(run, flow)
    resumed.complete("1", 9)
    assert resumed.events[-1].result.data == [2, 9]


def test_a_timeout_round_the_failed_step_has_its_remaining_time_after_resume():
    async def flow():
        async with asyncio.timeout(3600):
            return await work(1)

    run = Run(flow)
    run.now += 600
    run.fail("2")
    resumed = resume(run, flow, now=run.now + 86_400)
    resumed.do("tick")
    assert resumed.driver.history.open_timers == {"1": resumed.now + 3000}
    resumed.complete("2", 1, attempt=2)
    assert resumed.events[-1].result.data == 1


def test_arguments_that_the_code_does_not_take_any_more_pause_the_run():
    async def flow(n):
        return n

    run = Run(flow)
    assert run.of(Pause)[0].event.reason == "code"
    assert "TypeError" in run.of(Pause)[0].event.message
    assert run.driver.next_due is None


def test_a_body_that_sleeps_for_next_to_nothing_does_not_keep_other_inputs_out():
    async def flow():
        other = asyncio.ensure_future(work(1))
        while not other.done():
            await asyncio.sleep(1e-9)
        return await other

    run = Run(flow)
    run.do("tick")
    run.complete("t1.1", 1)
    run.do("tick")
    assert run.events[-1].type == "run_completed"


def test_timers_due_at_the_same_moment_fire_in_the_order_they_were_started():
    async def flow():
        woken = []

        async def sleeper(n):
            await asyncio.sleep(1)
            woken.append(n)

        await asyncio.gather(*(sleeper(n) for n in range(12)))
        return woken

    run = Run(flow)
    run.now += 1
    run.do("tick")
    assert run.events[-1].result.data == list(range(12))


def test_a_body_that_can_not_be_dropped_never_goes_on_as_plain_python():
    async def flow():
        tries = 0
        while tries < 50:
            tries += 1
            try:
                await work(7)
            except:  # noqa: E722
                pass

    run = Run(flow)
    run.driver.evict()
    PLAIN_CALLS.clear()
    del run
    gc.collect()
    assert PLAIN_CALLS == []


def test_a_generator_left_half_way_is_not_closed_by_the_loop_outside():
    async def numbers():
        try:
            yield 1
            yield 2
        finally:
            PLAIN_CALLS.append(asyncio.get_running_loop())

    async def flow():
        async for _ in numbers():
            break

    async def shell():
        run = Run(flow)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return run, asyncio.get_running_loop()

    PLAIN_CALLS.clear()
    run, outer = asyncio.run(shell())
    assert run.events[-1].type == "run_completed"
    assert len(PLAIN_CALLS) == 1
    assert PLAIN_CALLS[0] is not outer


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_body_that_raises_what_ends_a_process_fails_its_run_only(error):
    async def flow():
        await work(1)
        raise error("out")

    run = Run(flow)
    run.complete("1", 1)
    assert (run.events[-1].type, run.events[-1].error.type) == ("run_failed", error.__name__)


def test_owners_that_died_before_they_wrote_a_word_count_as_lost():
    async def flow():
        return await work(1)

    run = Run(flow, created={"max_recoveries": 2})
    assert not run.again(flow, epoch=2).of(Pause)
    assert run.again(flow, epoch=3).of(Pause)[0].event.reason == "max_recoveries"


def test_a_run_paused_for_its_limits_can_be_cancelled():
    async def flow():
        while True:
            await work(1)

    run = Run(flow, limits=Limits(max_events=5))
    for n in range(1, 3):
        run.complete(str(n), 1)
    assert run.of(Pause)[0].event.reason == "event_limit"
    again = run.again(flow, cause="cancel", charged=False, limits=Limits(max_events=5))
    again.do("cancel", None)
    assert not again.of(Pause)
    assert again.events[-1].type == "run_cancelled"


@step(max_retries=9, retry_delay=60, total_timeout=100)
def patient(n: int) -> int:
    return n


def patient_run():
    async def flow():
        return await patient(1)

    run = Run(flow)
    run.start("1")
    due = run.now + 60
    record = run.failure("1", retry_at=due)
    run.do("outcome", Outcome("1", 1, "handed_back", 1, [record], retry_at=due))
    return flow, run, due


def test_the_total_timeout_goes_on_in_the_next_activation():
    flow, run, due = patient_run()
    again = run.again(flow, cause="wake", charged=False, now=due)
    (call,) = [e.call for e in again.of(Dispatch)]
    assert call.began_at == START_AT


def test_a_step_whose_total_timeout_passed_while_nobody_had_it_fails_with_its_last_error():
    flow, run, _ = patient_run()
    again = run.again(flow, now=START_AT + 101)
    assert again.dispatched() == []
    failed = next(e for e in again.events if e.type == "step_failed")
    assert (failed.why, failed.error.type) == ("deadline", "LookupError")
    assert again.events[-1].type == "run_failed"


def test_a_worker_that_ended_itself_at_the_total_timeout_timed_out_and_was_not_lost():
    flow, run, due = patient_run()
    again = run.again(flow, cause="wake", charged=False, now=due)
    again.start("1", attempt=2)
    again.now = START_AT + 100.5
    again.do("lost", "1", 1, cause="worker_died", charged=True)
    assert "step_lost" not in again.types()
    failed = next(e for e in again.events if e.type == "step_failed")
    assert (failed.why, failed.error.type, failed.attempt) == ("deadline", "StepTimeoutError", 2)
