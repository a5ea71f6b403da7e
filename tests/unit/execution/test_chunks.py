"""A chunk of a map in its worker: each item with the whole attempt loop, and none at the cost of another."""

from __future__ import annotations

import asyncio
import datetime as dt
import random
from collections import Counter
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.engine.calls import ChunkResult, Outcome
from pyworkflow_ray.engine.chunks import pack_items
from pyworkflow_ray.engine.events import Payload
from pyworkflow_ray.execution import hooks
from pyworkflow_ray.execution.chunks import WHOLE_TRACEBACKS, execute_chunk_async
from pyworkflow_ray.execution.interrupt import Interrupt
from pyworkflow_ray.execution.worker import execute_call
from tests.unit.execution.calls import CODEC, call_of

SEEN: list[Any] = []


@pytest.fixture(autouse=True)
def _seen() -> None:
    SEEN.clear()


class Clock(Interrupt):
    """Time that passes by waiting only."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        SEEN.append(("waited", seconds))
        self.now += seconds
        return False


def chunk(
    step: Any,
    items: list[Any],
    *,
    first: int = 0,
    stop_after: int | None = None,
    wait_max_s: float = 60.0,
    **fields: Any,
) -> Outcome:
    clock = Clock()
    given = pack_items(CODEC, items, first, stop_after)
    call = call_of(step, position=f"3[{first}:{first + len(items)}]", chunk=given, **fields)
    return execute_call(
        call,
        step.definition,
        CODEC,
        report=SEEN.append,
        interrupt=clock,
        clock=clock,
        wait_max_s=wait_max_s,
        kill_stuck=False,
        rng=random.Random(0),
        worker="worker-1",
        node="node-1",
    )


def result(outcome: Outcome) -> ChunkResult:
    assert outcome.status == "completed"
    assert outcome.chunk is not None
    return outcome.chunk


def values(outcome: Outcome) -> list[Any]:
    found = result(outcome)
    stored = CODEC.decode(found.results) if found.results is not None else [None] * found.done
    if found.single:
        stored = [None if one is None else CODEC.decode(Payload.model_validate(one)) for one in stored]
    return list(stored)


@pw.step(max_retries=2, retry_delay=5)
def flaky(n: int) -> int:
    SEEN.append((n, pw.current_step().attempt))
    if n < 0 and pw.current_step().attempt <= -n:
        raise ConnectionError(f"no {n}")
    return n


def test_an_item_that_waits_for_its_retry_is_put_aside_and_the_others_go_on() -> None:
    outcome = chunk(flaky, [1, -1, 2, 3])
    assert SEEN == [(1, 1), (-1, 1), (2, 1), (3, 1), ("waited", 5.0), (-1, 2)]
    assert values(outcome) == [1, -1, 2, 3]
    assert result(outcome).retried == {"ConnectionError": 1}


def test_items_that_would_wait_long_are_handed_back_once_all_others_have_ended() -> None:
    outcome = chunk(flaky, [-1, 1, -2, 2], first=10, wait_max_s=1.0)
    found = result(outcome)
    assert [seen for seen in SEEN if isinstance(seen[0], int)] == [(-1, 1), (1, 1), (-2, 1), (2, 1)]
    assert values(outcome) == [None, 1, None, 2]
    assert [(item.index, item.attempt, item.retries_used, item.retry_at) for item in found.waiting] == [
        (10, 1, 1, 1005.0),
        (12, 1, 1, 1005.0),
    ]
    assert [previous.message for previous in found.waiting[0].previous] == ["no -1"]
    assert found.failures == []


def test_an_item_that_uses_up_its_attempts_fails_and_the_others_do_not() -> None:
    outcome = chunk(flaky, [1, -3, -2], first=10)
    assert values(outcome) == [1, None, -2]
    (failure,) = result(outcome).failures
    assert (failure.index, failure.attempt, failure.why) == (11, 3, "exhausted")
    error = CODEC.decode_error(result(outcome).errors[failure.error])
    assert (type(error), str(error)) == (ConnectionError, "no -3")
    assert len([note for note in error.__notes__ if note.startswith("attempt ")]) == 3
    assert result(outcome).retried == {"ConnectionError": 4}


def test_a_single_item_goes_on_from_the_attempts_it_has_had() -> None:
    outcome = chunk(flaky, [-3], first_attempt=2, retries_used=1)
    assert [seen for seen in SEEN if seen[0] == -3] == [(-3, 2), (-3, 3)]
    assert result(outcome).failures[0].attempt == 3


def test_nothing_is_streamed_and_the_outcome_names_its_worker() -> None:
    outcome = chunk(flaky, [1, -1])
    assert all(isinstance(seen, tuple) for seen in SEEN)
    assert (outcome.worker, outcome.node, outcome.dispatch) == ("worker-1", "node-1", 7)
    assert (outcome.started_at, outcome.ended_at) == (1000.0, 1005.0)


@pw.step
def asks(n: int) -> list[Any]:
    step = pw.current_step()
    SEEN.append(step.idempotency_key)
    return [list(step.fence), step.attempt, step.run_id]


def test_each_item_has_its_own_key_and_the_fence_of_its_dispatch() -> None:
    assert values(chunk(asks, [5, 5], first=3)) == [[[2, 7, 1], 1, "order-42"]] * 2
    first = list(SEEN)
    SEEN.clear()
    chunk(asks, [5], first=4, dispatch=9)
    assert len(set(first)) == 2
    assert SEEN.count(first[1]) == len(SEEN) == 1


def test_arguments_are_validated_item_by_item() -> None:
    @pw.step
    def typed(on: dt.date) -> str:
        return on.isoformat()

    outcome = chunk(typed, ["2026-01-02", "no date", dt.date(2026, 1, 3)])
    assert values(outcome) == ["2026-01-02", None, "2026-01-03"]
    assert [result(outcome).errors[f.error].type for f in result(outcome).failures] == ["ValidationError"]


def test_values_that_are_no_json_come_back_exactly_and_one_that_can_not_be_stored_fails_alone() -> None:
    @pw.step
    def odd(n: int) -> Any:
        return {1: (1, 2), 2: (x for x in ()), 3: dt.date(2026, 1, 1), 4: None, 5: {1: "int key"}}[n]

    outcome = chunk(odd, [1, 2, 3, 4, 5])
    assert values(outcome) == [(1, 2), None, dt.date(2026, 1, 1), None, {1: "int key"}]
    assert [f.index for f in result(outcome).failures] == [1]


def test_values_of_a_chunk_that_are_json_are_one_payload() -> None:
    found = result(chunk(flaky, list(range(1000))))
    assert not found.single
    assert found.results is not None
    assert found.results.size < 4 * 1000


def test_equal_errors_are_stored_once_and_of_many_distinct_ones_the_later_have_no_traceback() -> None:
    @pw.step
    def refuse(n: int) -> None:
        raise ValueError("same" if n < 100 else f"item {n}")

    same = result(chunk(refuse, list(range(100))))
    assert (len(same.failures), len(same.errors)) == (100, 1)
    assert same.results is None
    distinct = result(chunk(refuse, list(range(100, 130))))
    assert len(distinct.errors) == 30
    assert [bool(error.traceback) for error in distinct.errors] == [True] * WHOLE_TRACEBACKS + [False] * 10


def test_the_chunk_ends_early_once_more_items_have_failed_than_allowed() -> None:
    outcome = chunk(flaky, [1, -5, -6, 2, -7, 3], stop_after=1)
    found = result(outcome)
    assert found.done == 6
    assert {f.index: f.why for f in found.failures} == {1: "exhausted", 2: "exhausted", 4: "stopped"}

    @pw.step
    def refuse(n: int) -> None:
        SEEN.append(n)
        raise ValueError(n)

    found = result(chunk(refuse, [1, 2, 3, 4], stop_after=1))
    assert (found.done, len(found.failures)) == (2, 2)
    assert SEEN[-2:] == [1, 2]


def test_an_interrupt_ends_the_chunk_as_cancelled() -> None:
    interrupt = Interrupt()

    @pw.step
    def stops(n: int) -> int:
        SEEN.append(n)
        if n == 2:
            interrupt.cancel()
        return n

    call = call_of(stops, position="3[0:4]", chunk=pack_items(CODEC, [1, 2, 3, 4], 0, None))
    outcome = execute_call(call, stops.definition, CODEC, report=SEEN.append, interrupt=interrupt, kill_stuck=False)
    assert outcome.status == "cancelled"
    assert SEEN == [1, 2]


def test_async_items_share_one_loop_and_time_out_one_by_one() -> None:
    @pw.step(timeout=0.05)
    async def sleeps(n: int) -> int:
        SEEN.append(id(asyncio.get_running_loop()))
        if n == 1:
            await asyncio.sleep(30)
        return n

    outcome = chunk(sleeps, [0, 1, 2])
    assert values(outcome) == [0, None, 2]
    assert [e.type for e in result(outcome).errors] == ["StepTimeoutError"]
    assert len(set(SEEN)) == 1


async def test_on_a_running_loop_a_chunk_is_the_same() -> None:
    @pw.step(max_retries=1, retry_delay="10ms")
    async def once_more(n: int) -> int:
        if pw.current_step().attempt == 1:
            raise ConnectionError
        return n

    call = call_of(once_more, position="3[0:3]", chunk=pack_items(CODEC, [1, 2, 3], 0, None))
    outcome = await execute_chunk_async(call, once_more.definition, CODEC)
    assert values(outcome) == [1, 2, 3]
    assert result(outcome).retried == {"ConnectionError": 3}


def test_the_breaker_is_asked_for_each_item() -> None:
    breaker = pw.CircuitBreaker(name="of-a-chunk", failure_threshold=2)

    @pw.step(breaker=breaker)
    def down(n: int) -> None:
        SEEN.append(n)
        raise ConnectionError("down")

    clock = Clock()
    call = call_of(down, position="3[0:5]", chunk=pack_items(CODEC, [0, 1, 2, 3, 4], 0, None))
    outcome = execute_call(
        call,
        down.definition,
        CODEC,
        report=SEEN.append,
        interrupt=clock,
        breaker=breaker.guard(),
        kill_stuck=False,
    )
    found = result(outcome)
    assert SEEN == [0, 1]
    assert Counter(found.errors[f.error].type for f in found.failures) == {"ConnectionError": 2, "CircuitOpenError": 3}


def test_hooks_are_told_of_each_retry_of_an_item(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setitem(hooks._own, "retry", [told.append])
    chunk(flaky, [1, -2, -3], first=10)
    assert [(e.position, e.attempt, e.delay, e.run_id) for e in told] == [
        ("3[11:12]", 1, 5.0, "order-42"),
        ("3[12:13]", 1, 5.0, "order-42"),
        ("3[11:12]", 2, 5.0, "order-42"),
        ("3[12:13]", 2, 5.0, "order-42"),
    ]
