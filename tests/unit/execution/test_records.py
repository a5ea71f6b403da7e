"""A step retried very often: the first and last attempts whole, those between as counts by error type."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from pydantic_core import to_json

import pyworkflow_ray as pw
from pyworkflow_ray.engine.calls import Outcome
from pyworkflow_ray.engine.commands import Append
from pyworkflow_ray.engine.driver import Driver
from pyworkflow_ray.engine.events import (
    AttemptFailed,
    AttemptNote,
    AttemptsCounted,
    AttemptsFailed,
    CodeRef,
    ErrorInfo,
    Event,
    RunActivated,
    StepScheduled,
    StepStarted,
    event_adapter,
)
from pyworkflow_ray.engine.history import History, StepState
from pyworkflow_ray.execution.records import FAST_S, FIRST, LIMIT, Failure, Records
from pyworkflow_ray.testing.simulator import START_AT, Simulator
from tests.unit.execution.calls import each


@pw.step(max_retries=None)
def work() -> int:
    return 1


async def flow() -> int:
    return await work()


def failed(number: int, *, last: bool = False, delay_s: float = 0.0) -> Failure:
    name = "TimeoutError" if number % 3 else "ConnectionError"
    error = ErrorInfo(kind="transient", type=name, module="builtins", message=str(number))
    if last:
        return Failure(number, number, number + 1, error)
    return Failure(number, number, number + 1, error, delay_s, "fixed", number + 1 + delay_s)


def record(number: int, *, gather_s: float = 0.0) -> tuple[list[AttemptNote], Records]:
    streamed: list[AttemptNote] = []
    records = Records("1", 1, worker="7@here", node="here", report=streamed.append, gather_s=gather_s)
    for n in range(1, number + 1):
        records.failed(failed(n, last=n == number))
    return streamed, records


def numbers(found: Sequence[Event]) -> list[int]:
    covered = {one.attempt for one in each(found)}
    for one in found:
        covered |= set(range(one.first, one.last + 1)) if isinstance(one, AttemptsCounted) else set()
    return sorted(covered)


def test_fast_attempts_are_recorded_together_and_say_what_each_would_have_said() -> None:
    _, records = record(5)
    together, last = records.all()
    assert isinstance(together, AttemptsFailed)
    assert isinstance(last, AttemptFailed)
    apart = [failed(n) for n in range(1, 5)]
    for one, failure in zip(together.each(), apart, strict=True):
        assert Failure(*(getattr(one, name) for name in Failure._fields)) == failure
        assert (one.position, one.dispatch, one.worker, one.node) == ("1", 1, "7@here", "here")
    assert [one.attempt for one in together.after(2).each()] == [3, 4]
    assert together.after(0) == together
    assert event_adapter.validate_json(to_json(together)) == together


def test_an_attempt_that_waits_or_has_another_reason_stands_alone() -> None:
    records = Records("1", 1, report=lambda note: None)
    records.failed(failed(1))
    records.failed(failed(2, delay_s=FAST_S))
    records.failed(failed(3))
    records.failed(failed(4)._replace(delay_reason="server retry_after"))
    records.failed(failed(5)._replace(breaker="half_open"))
    assert [type(one) for one in records.all()] == [AttemptFailed] * 5


def test_what_is_gathered_is_told_once_with_the_attempt_that_runs() -> None:
    streamed, records = record(3, gather_s=math.inf)
    records.failed(failed(4))
    records.started(5, 9.0)
    assert numbers(streamed) == [1, 2, 3]  # the third was the last, which is told at once
    fourth, running = records.take()
    assert numbers([fourth]) == [4]
    assert isinstance(running, StepStarted)
    assert running.attempt == 5
    assert records.take() == []
    records.failed(failed(5))
    records.failed(failed(6, delay_s=2.0))
    assert numbers(streamed) == [1, 2, 3, 5, 6]  # a long wait is told at once


def test_an_owner_that_has_heard_of_some_takes_only_the_rest_of_an_outcome() -> None:
    step = StepState(StepScheduled(position="1", number=1, step="work", code=CodeRef(how="import", name="work")))
    history = History(steps={"1": step})
    _, records = record(6)
    together, last = records.all()
    assert isinstance(together, AttemptsFailed)
    history.apply(together.model_copy(update={"attempts": together.attempts[:2]}))
    assert not step.has(together)
    rest = step.unseen(together)
    assert numbers([rest]) == [3, 4, 5]
    history.apply(rest.model_copy(update={"seq": 1}))
    assert step.has(together)
    assert (step.attempt, step.retries_used, step.verdict) == (5, 5, None)
    assert [one.message for one in step.previous] == ["1", "2", "3", "4", "5"]
    history.apply(last.model_copy(update={"seq": 2}))
    assert step.verdict is not None


@pytest.mark.parametrize("number", [1, FIRST, FIRST + 1, LIMIT, LIMIT + 1, 5_000, 30_000])
def test_case_9_the_first_and_last_are_whole_and_every_attempt_is_in_the_outcome(number: int) -> None:
    streamed, records = record(number)
    outcome = records.all()
    assert numbers(outcome) == list(range(1, number + 1))
    whole = [one.attempt for one in each(outcome)]
    assert whole == sorted({*range(1, min(number, FIRST) + 1), *range(max(1, number - LIMIT + FIRST + 1), number + 1)})
    counts = [one for one in outcome if isinstance(one, AttemptsCounted)]
    assert all(sum(one.counts.values()) == one.last - one.first + 1 for one in counts)
    assert all(one.last < number for one in counts)
    assert len(outcome) <= LIMIT + 120
    assert len(streamed) <= FIRST + 120


@pytest.mark.parametrize("number", [FIRST + 30, 3_000, 30_000])
def test_a_worker_that_dies_takes_at_most_a_twentieth_of_the_numbers_with_it(number: int) -> None:
    streamed, _ = record(number)
    known = numbers(streamed)
    assert known == list(range(1, len(known) + 1))
    assert len(known) >= number * 0.95 - 1


def test_what_the_owner_confirmed_is_left_out_of_the_outcome() -> None:
    _, records = record(400)
    assert numbers(records.all(after=390)) == list(range(391, 401))


async def test_case_9_a_step_that_fails_three_thousand_times_keeps_its_log_small_and_its_numbers_exact(workflow_env):
    kinds: Counter[str] = Counter()

    @pw.step(max_retries=2_999, retry_delay=0)
    async def stubborn() -> int:
        number = pw.current_step().attempt
        if number == 3_000:
            return len(pw.current_step().previous)
        error = ConnectionError() if number % 2 else TimeoutError()
        kinds[type(error).__name__] += 1
        raise error

    @pw.workflow
    async def calls() -> int:
        return await stubborn()

    assert await workflow_env.run(calls) == 1_000
    events = workflow_env.events()
    assert len(events) < LIMIT + FIRST + 100  # the first ones have an event of their start
    step = workflow_env.steps()[0]
    assert (step.tries, step.state) == (3_000, "completed")
    seen: Counter[str] = Counter()
    for attempt in step.attempts:
        assert attempt.number == (sum(attempt.counts.values()) or 1)
        seen += Counter(attempt.counts) or Counter([attempt.error.type] if attempt.error else [])
    assert seen == kinds
    whole = [a.attempt for a in step.attempts if not a.counts]
    assert whole == [*range(1, FIRST + 1), *range(3_000 - LIMIT + FIRST, 3_001)]


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_counts_streamed_or_lost_on_the_way_come_to_the_same(lost: int) -> None:
    simulator = Simulator(flow, {})
    driver = Driver(flow, simulator.codec, rng=random.Random(0))
    driver.activate(simulator.store.events(), RunActivated(epoch=0), START_AT)
    _drain(driver)
    streamed, records = record(800)
    for note in streamed[: len(streamed) - lost]:
        driver.record(note, START_AT)
    driver.outcome(
        Outcome("1", 1, "completed", 801, attempts=records.all(), result=simulator.codec.encode(1)), START_AT
    )
    logged = _drain(driver)
    step = driver.history.steps["1"]
    assert (step.attempt, step.retries_used) == (801, 800)
    assert [failure.attempt for failure in step.previous] == [*range(1, FIRST + 1), *range(FIRST + 1, 801)]
    assert numbers(logged) == list(range(1, 801))


def _drain(driver: Driver) -> list[Event]:
    logged: list[Event] = []
    while effects := driver.effects():
        for effect in effects:
            if isinstance(effect, Append):
                logged.extend(effect.events)
                driver.durable(effect.events[-1].seq, START_AT)
    return logged
