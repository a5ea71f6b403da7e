"""Faults seen in another durable-workflow engine, each a case that must come out right here, by its number there."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from typing import Any

import pytest

import pyworkflow_ray as pw
from tests.unit.execution.calls import CODEC, error_of, execute


def test_fault_02_a_timeout_is_enforced_for_async_and_sync_steps() -> None:
    @pw.step(timeout=0.02)
    async def hangs() -> None:
        await asyncio.sleep(3_600)

    @pw.step(timeout=0.02)
    def blocks() -> None:
        time.sleep(3_600)

    for step in (hangs, blocks):
        outcome = execute(step)
        assert outcome.error is not None
        assert outcome.error.kind == "timeout"
        assert isinstance(error_of(outcome), pw.StepTimeoutError)
        assert isinstance(error_of(outcome), TimeoutError)


def test_fault_03_a_permanent_error_is_not_retried() -> None:
    calls = []

    @pw.step(max_retries=5, retry_delay=0)
    async def rejects() -> None:
        calls.append(1)
        raise ValueError("malformed order")

    outcome = execute(rejects)
    assert (outcome.why, len(calls)) == ("permanent", 1)


def test_fault_03_except_exception_in_a_step_swallows_no_signal_of_ours() -> None:
    started = []

    @pw.step(timeout=0.02)
    def fallback_chain() -> str:
        for source in ("primary", "fallback", "offline"):
            try:
                started.append(source)
                time.sleep(3_600)
            except Exception:
                continue
        return "default"

    assert isinstance(error_of(execute(fallback_chain)), pw.StepTimeoutError)
    assert started == ["primary"]


@pytest.mark.parametrize(
    "retry_after",
    [30, 30.0, "30s", dt.timedelta(seconds=30), dt.datetime(2027, 1, 15, 8, 0, 30, tzinfo=dt.UTC)],
    ids=lambda value: type(value).__name__,
)
def test_fault_05_retry_after_takes_every_form(retry_after: Any) -> None:
    @pw.step(max_retries=1, retry_delay=1)
    def busy() -> None:
        raise pw.RetryableError("busy", retry_after=retry_after)

    now = dt.datetime(2027, 1, 15, 8, 0, 0, tzinfo=dt.UTC).timestamp()
    outcome = execute(busy, clock=lambda: now)
    assert (outcome.status, outcome.retry_at) == ("handed_back", now + 30)
    assert outcome.attempts[0].delay_reason == "retry_after"


def test_fault_10_a_cancellation_inside_a_step_is_not_retried() -> None:
    calls = []

    @pw.step(max_retries=5, retry_delay=0, retry_on=BaseException)
    async def cancels() -> None:
        calls.append(1)
        raise asyncio.CancelledError("by the step itself")

    assert execute(cancels).status == "failed"
    assert len(calls) == 1


def test_fault_13_the_step_gets_what_was_validated() -> None:
    @pw.step
    def kind(n: int) -> str:
        return type(n).__name__

    assert kind("7") == "int"  # type: ignore[arg-type, comparison-overlap]
    args, kwargs = kind.definition.validate(("7",), {})
    outcome = execute(kind, *args, **kwargs)
    assert outcome.result is not None
    assert CODEC.decode(outcome.result) == "int"
