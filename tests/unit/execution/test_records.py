"""A step retried very often: the first and last attempts whole, those between as counts by error type."""

from __future__ import annotations

import random
from collections import Counter

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.engine.calls import Outcome
from pyworkflow_ray.engine.commands import Append
from pyworkflow_ray.engine.driver import Driver
from pyworkflow_ray.engine.events import AttemptFailed, AttemptRecord, AttemptsCounted, ErrorInfo, Event, RunActivated
from pyworkflow_ray.execution.records import FIRST, LIMIT, Records
from pyworkflow_ray.testing.simulator import START_AT, Simulator


@pw.step(max_retries=None)
def work() -> int:
    return 1


async def flow() -> int:
    return await work()


def failed(number: int, *, last: bool = False) -> AttemptFailed:
    name = "TimeoutError" if number % 3 else "ConnectionError"
    error = ErrorInfo(kind="transient", type=name, module="builtins", message=str(number))
    delay = None if last else 0.0
    return AttemptFailed(
        at=number, position="1", dispatch=1, attempt=number, started_at=number, ended_at=number + 1, error=error,
        delay_s=delay, retry_at=None if last else number + 1,
    )  # fmt: skip


def record(number: int) -> tuple[list[AttemptRecord], Records]:
    streamed: list[AttemptRecord] = []
    records = Records(streamed.append)
    for n in range(1, number + 1):
        records.add(failed(n, last=n == number))
    return streamed, records


def numbers(found: list[AttemptRecord]) -> list[int]:
    covered: set[int] = set()
    for one in found:
        covered |= set(range(one.first, one.last + 1)) if isinstance(one, AttemptsCounted) else {one.attempt}
    return sorted(covered)


@pytest.mark.parametrize("number", [1, FIRST, FIRST + 1, LIMIT, LIMIT + 1, 5_000, 30_000])
def test_case_9_the_first_and_last_are_whole_and_every_attempt_is_in_the_outcome(number: int) -> None:
    streamed, records = record(number)
    outcome = records.all()
    assert numbers(outcome) == list(range(1, number + 1))
    whole = [one.attempt for one in outcome if isinstance(one, AttemptFailed)]
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
    assert numbers([e for e in logged if isinstance(e, AttemptFailed | AttemptsCounted)]) == list(range(1, 801))


def _drain(driver: Driver) -> list[Event]:
    logged: list[Event] = []
    while effects := driver.effects():
        for effect in effects:
            if isinstance(effect, Append):
                logged.extend(effect.events)
                driver.durable(effect.events[-1].seq, START_AT)
    return logged
