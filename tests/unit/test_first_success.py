"""first_success: one after another, and only as far as needed."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.engine.events import RunCompleted, RunFailed
from pyworkflow_ray.testing.simulator import Faults, Simulator

CALLS: list[str] = []


@pytest.fixture(autouse=True)
def calls() -> list[str]:
    CALLS.clear()
    return CALLS


@pw.step
async def primary(key: str) -> str:
    CALLS.append("primary")
    raise ConnectionError(key)


@pw.step
async def fallback(key: str) -> str:
    CALLS.append("fallback")
    return f"fallback {key}"


@pw.step
async def offline(key: str) -> str:
    CALLS.append("offline")
    return f"offline {key}"


async def test_the_next_is_started_only_when_one_has_failed(calls: list[str]) -> None:
    assert await pw.first_success(primary("k"), fallback("k"), offline("k")) == "fallback k"
    assert calls == ["primary", "fallback"]


@pytest.mark.filterwarnings("error")
async def test_the_unstarted_are_closed_after_a_success_and_after_a_cancellation() -> None:
    async def forever() -> str:
        await asyncio.Event().wait()
        return ""

    third = offline("k")
    await pw.first_success(fallback("k"), third)
    assert inspect.getcoroutinestate(third) == inspect.CORO_CLOSED
    last = offline("k")
    task = asyncio.create_task(pw.first_success(forever(), last))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert inspect.getcoroutinestate(last) == inspect.CORO_CLOSED
    assert CALLS == ["fallback"]


async def test_all_failures_are_raised_in_order_when_none_is_left() -> None:
    with pytest.raises(ExceptionGroup, match="none of 2 succeeded") as caught:
        await pw.first_success(primary("a"), primary("b"))
    assert [str(error) for error in caught.value.exceptions] == ["a", "b"]
    assert all(isinstance(error, ConnectionError) for error in caught.value.exceptions)


async def test_nothing_and_what_can_not_be_awaited_are_refused_and_nothing_runs() -> None:
    with pytest.raises(pw.ConfigurationError, match="nothing to await"):
        await pw.first_success()
    unstarted = fallback("k")
    with pytest.raises(pw.ConfigurationError, match="argument 2 is a str"):
        await pw.first_success(unstarted, "value")  # type: ignore[arg-type]
    assert inspect.getcoroutinestate(unstarted) == inspect.CORO_CLOSED
    assert CALLS == []


STEPS = {
    primary.definition.name: lambda key: (_ for _ in ()).throw(ConnectionError(key)),
    fallback.definition.name: lambda key: f"fallback {key}",
}


def simulated(flow: Any, seed: int, **faults: float) -> Any:
    return Simulator(flow, STEPS, seed=seed, faults=Faults(**faults)).run()  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(20))
def test_in_a_workflow_it_goes_on_after_a_crash_with_what_was_running(seed: int) -> None:
    async def flow() -> str:
        return await pw.first_success(primary("k"), fallback("k"), offline("k"))

    run = simulated(flow, seed, crash=0.2)
    assert isinstance(run.ended, RunCompleted)
    assert run.ended.result.data == "fallback k"
    scheduled = [e.step for e in run.events if e.type == "step_scheduled"]
    assert scheduled == [primary.definition.name, fallback.definition.name]


def test_a_workflow_that_has_nothing_left_fails_with_the_group() -> None:
    async def flow() -> str:
        return await pw.first_success(primary("a"), primary("b"))

    run = simulated(flow, 0)
    assert isinstance(run.ended, RunFailed)
    assert run.ended.error.type == "ExceptionGroup"
