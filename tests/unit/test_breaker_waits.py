"""`on_open="wait"`: a step waits for its breaker, durably and without an attempt. In virtual time, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.errors import CircuitOpenError
from pyworkflow_ray.testing import WorkflowEnv, no_waits

host = pw.CircuitBreaker("waits-host", failure_threshold=1, recovery_timeout=60)
quick = pw.CircuitBreaker("waits-quick", failure_threshold=1, recovery_timeout=0.05)
shut = pw.CircuitBreaker("waits-shut", failure_threshold=1, recovery_timeout=60)


@pw.step(breaker=host)
async def breaks_it() -> None:
    raise ConnectionError("503")


@pw.step(breaker=host, on_open="wait", max_retries=2, retry_delay=1)
async def charge(n: int) -> int:
    return n * 10 + pw.current_step().attempt


@pw.step(breaker=host, on_open="wait", total_timeout=30)
async def impatient() -> None:
    raise AssertionError("it is never let through")


@pw.workflow
async def after_an_outage(n: int) -> tuple[int, float]:
    try:
        await breaks_it()
    except ConnectionError:
        began = pw.now()
    return await charge(n), (pw.now() - began).total_seconds()


@pw.workflow
async def survives(n: int) -> int:
    with contextlib.suppress(ConnectionError, CircuitOpenError):  # a crash makes it ask once more
        await breaks_it()
    return await charge(n) // 10


@pw.workflow
async def with_a_limit() -> None:
    try:
        await breaks_it()
    except ConnectionError:
        await impatient()


@pw.workflow
async def many(n: int) -> list[int]:
    try:
        await breaks_it()
    except ConnectionError:
        return await asyncio.gather(*(charge(i) for i in range(n)))


async def test_case_8_a_step_waits_for_its_breaker_and_spends_no_attempt(workflow_env: WorkflowEnv) -> None:
    result, waited = await workflow_env.run(after_an_outage, 7)
    assert result == 71  # the first attempt
    assert waited == pytest.approx(60, abs=0.1)
    kinds = [event.type for event in workflow_env.events()]
    assert kinds.count("step_handed_back") == 1
    assert kinds.count("run_parked") == 1  # no worker and no actor meanwhile
    assert kinds.count("attempt_failed") <= 1  # of the step that broke it


async def test_case_8_the_wait_is_durable(workflow_env: WorkflowEnv) -> None:
    assert await workflow_env.crash_everywhere(survives, 7) == 7


async def test_case_8_total_timeout_holds_and_the_refusal_says_so(workflow_env: WorkflowEnv) -> None:
    with pytest.raises(CircuitOpenError) as refused:
        await workflow_env.run(with_a_limit)
    assert refused.value.name == "waits-host"
    assert any("total_timeout of 30s" in note for note in refused.value.__notes__)


async def test_case_8_all_that_wait_get_through_once_it_closes(workflow_env: WorkflowEnv) -> None:
    assert await workflow_env.run(many, 20) == [n * 10 + 1 for n in range(20)]


async def test_a_plain_call_waits_where_it_is() -> None:
    with pytest.raises(ConnectionError), quick:
        raise ConnectionError

    @pw.step(breaker=quick, on_open="wait")
    def guarded() -> Any:
        return pw.current_step().attempt

    assert guarded() == 1


def test_without_waits_a_plain_call_is_refused() -> None:
    with pytest.raises(ConnectionError), shut:
        raise ConnectionError

    @pw.step(breaker=shut, on_open="wait")
    def guarded() -> None: ...

    with no_waits(), pytest.raises(CircuitOpenError):
        guarded()
