"""Steps called as plain functions, and steps called inside steps."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.execution.plain import waits_removed
from tests.unit.execution.calls import execute


def test_a_plain_call_retries_and_gives_the_value_itself() -> None:
    seen: list[Any] = []
    value = threading.Lock()  # nothing is stored, so it need not be storable

    @pw.step(max_retries=2, retry_delay=0)
    def flaky() -> Any:
        seen.append(pw.current_step())
        if len(seen) < 3:
            raise ConnectionError("refused")
        return value

    assert flaky() is value
    assert [step.attempt for step in seen] == [1, 2, 3]
    assert len({step.idempotency_key for step in seen}) == 1
    assert [step.fence for step in seen] == sorted({step.fence for step in seen})
    assert seen[0].run_id is None
    assert [failure.message for failure in seen[2].previous] == ["refused", "refused"]


async def test_an_async_plain_call_raises_the_last_exception_itself() -> None:
    error = ConnectionError("refused")

    @pw.step(max_retries=1, retry_delay=0)
    async def fails() -> None:
        raise error

    with pytest.raises(ConnectionError) as caught:
        await fails()
    assert caught.value is error
    assert len(error.__notes__) == 2


def test_waits_can_be_removed() -> None:
    calls = []

    @pw.step(max_retries=3, retry_delay=3_600)
    def fails() -> None:
        calls.append(1)
        raise ConnectionError("refused")

    with waits_removed(), pytest.raises(ConnectionError):
        fails()  # type: ignore[unused-coroutine]
    assert len(calls) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), asyncio.CancelledError()], ids=repr)
def test_case_6_what_is_no_exception_passes_through_a_plain_call(error: BaseException) -> None:
    calls = []

    @pw.step(max_retries=5, retry_delay=0)
    def sync() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        sync()  # type: ignore[unused-coroutine]
    assert caught.value is error
    assert len(calls) == 1
    assert not hasattr(error, "__notes__"), "it was taken for a failed attempt"


async def test_case_6_cancelling_an_async_plain_call_cancels_it_at_once_in_attempt_and_wait() -> None:
    begun = asyncio.Event()
    calls = []

    @pw.step(max_retries=5, retry_delay=3_600, timeout=3_600)
    async def step(fails: bool) -> None:
        calls.append(1)
        begun.set()
        if fails:
            raise ConnectionError("refused")
        await asyncio.sleep(3_600)

    for fails in (False, True):
        calls.clear()
        begun.clear()
        task = asyncio.create_task(step(fails))
        await begun.wait()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(calls) == 1


def test_the_breaker_of_a_plain_call() -> None:
    breaker = pw.CircuitBreaker("test-plain-breaker", failure_threshold=2)

    @pw.step(breaker=breaker, max_retries=5, retry_delay=0)
    def by_object() -> None:
        raise ConnectionError("refused")

    @pw.step(breaker="test-plain-breaker")
    def by_name() -> None:
        raise AssertionError("executed")

    with pytest.raises(pw.CircuitOpenError) as caught:
        by_object()  # type: ignore[unused-coroutine]
    assert len(caught.value.__notes__) == 3
    with pytest.raises(pw.CircuitOpenError):
        by_name()  # type: ignore[unused-coroutine]
    with pytest.raises(pw.ConfigurationError, match="no-such-breaker"):
        by_name.options(breaker="no-such-breaker")()  # type: ignore[unused-coroutine]


def test_a_step_called_in_a_step_runs_inline_with_its_own_policy_and_key() -> None:
    seen: dict[str, list[Any]] = {"inner": [], "deep": []}
    outer_attempts: list[Any] = []

    @pw.step
    def deep() -> None:
        seen["deep"].append(pw.current_step())

    @pw.step(max_retries=1, retry_delay=0)
    def inner() -> None:
        seen["inner"].append(pw.current_step())
        deep()  # type: ignore[unused-coroutine]
        if len(seen["inner"]) % 2:
            raise ConnectionError("refused")

    @pw.step(max_retries=1, retry_delay=0)
    def outer() -> None:
        outer_attempts.append(pw.current_step())
        inner()  # type: ignore[unused-coroutine]
        inner()  # type: ignore[unused-coroutine]
        assert pw.current_step().name == outer_attempts[-1].name
        if len(outer_attempts) == 1:
            raise ConnectionError("again")

    assert execute(outer).status == "completed"
    keys = [step.idempotency_key for step in seen["inner"]]
    assert len(keys) == 8
    assert keys[0] == keys[1] != keys[2] == keys[3], "the same for the attempts of one inline call"
    assert keys[:4] == keys[4:], "and for the attempts of the step round it"
    assert len({step.idempotency_key for step in seen["deep"]}) == 2
    everything = outer_attempts + seen["inner"] + seen["deep"]
    assert len({step.fence for step in everything}) == len(everything)
    assert [step.fence for step in seen["inner"]] == sorted(step.fence for step in seen["inner"])
    assert {step.run_id for step in everything} == {"order-42"}


async def test_inline_calls_are_numbered_as_called_not_as_awaited() -> None:
    keys: list[str] = []

    @pw.step
    async def inner(name: str) -> tuple[str, str]:
        return name, pw.current_step().idempotency_key

    @pw.step(max_retries=1, retry_delay=0)
    async def outer() -> None:
        first, second = inner("a"), inner("b")
        answers = dict([await second, await first]) if not keys else dict([await first, await second])
        keys.append(answers["a"] + answers["b"])
        if len(keys) == 1:
            raise ConnectionError("again")

    await outer()
    assert keys[0] == keys[1]


def test_validated_values_reach_the_step() -> None:
    @pw.step
    def kind(n: int) -> str:
        return type(n).__name__

    assert kind("7") == "int"  # type: ignore[arg-type]


def test_the_total_timeout_stops_a_plain_call_that_still_runs() -> None:
    @pw.step(max_retries=None, retry_delay=0, total_timeout=0.5)
    async def waits() -> None:
        if pw.current_step().attempt < 3:
            raise ConnectionError("refused")
        await asyncio.sleep(60)

    with pytest.raises(
        pw.StepTimeoutError, match="attempt 3 was stopped as its total_timeout of 500ms was over"
    ) as caught:
        asyncio.run(waits())
    assert len(caught.value.__notes__) == 3


def test_the_total_timeout_stops_sync_code_too() -> None:
    @pw.step(max_retries=None, total_timeout=0.03)
    def spins() -> None:
        while True:
            try:
                time.sleep(60)
            except Exception:
                pass

    with pytest.raises(pw.StepTimeoutError, match="total_timeout of 30ms"):
        spins()


def test_the_deadline_that_a_step_sees_is_the_smallest_of_all() -> None:
    seen: list[float] = []

    @pw.step(timeout=60, total_timeout=5)
    def inner() -> None:
        deadline = pw.current_step().deadline
        assert deadline is not None
        seen.append(deadline.timestamp() - time.time())

    @pw.step(timeout=2)
    def outer() -> None:
        inner()

    inner()
    outer()
    assert 4 < seen[0] <= 5
    assert 1 < seen[1] <= 2


def test_an_inline_step_begins_no_wait_that_ends_after_its_callers_timeout() -> None:
    @pw.step(max_retries=3, retry_delay=30)
    def inner() -> None:
        raise ConnectionError("refused")

    @pw.step(timeout=10)
    def outer() -> None:
        inner()

    began = time.monotonic()
    with pytest.raises(ConnectionError):
        outer()
    assert time.monotonic() - began < 5


def test_a_sync_step_with_a_total_timeout_off_the_main_thread_says_what_to_do() -> None:
    @pw.step(total_timeout=60)
    def quick() -> None: ...

    with ThreadPoolExecutor(1) as pool, pytest.raises(pw.ConfigurationError, match=r"total_timeout=1m.*main thread"):
        pool.submit(quick).result()
