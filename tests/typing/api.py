"""The public types, as users' checkers see them: checked by mypy --strict, never run.

A step's call has one type: a coroutine of the function's return type, for `def` and `async def` alike, for steps are
written to be called in workflows. A plain call of a `def` step gives the value itself; `.fn` says so to a checker.
"""

from __future__ import annotations

from collections.abc import Coroutine
from datetime import timedelta
from typing import Any, assert_type

import pyworkflow_ray as pw


@pw.step
def bare_sync(order: int, note: str = "") -> float:
    return 1.0


@pw.step
async def bare_async(order: int) -> str:
    return ""


@pw.step(max_retries=3, retry_delay="1s", retry_backoff=2, timeout=timedelta(seconds=5), retry_on=(OSError, KeyError))
def called_sync(order: int) -> float:
    return 1.0


@pw.step(retry_delay=[1, "2s", timedelta(minutes=1)], total_timeout="10m")
def listed_delays(order: int) -> None: ...


@pw.step(retry_delay=lambda attempt, error: "5s" if isinstance(error, OSError) else attempt * 2.0)
def chosen_delays(order: int) -> None: ...


@pw.step(max_retries=None, retry_on=lambda error: True, jitter="full", executor="local")
async def called_async(order: int, *rest: str, deep: bool = False) -> list[str]:
    return []


sync_call = bare_sync(1, note="x")
async_call = bare_async(1)
called_sync_call = called_sync(order=1)
called_async_call = called_async(1, "a", deep=True)
changed_call = bare_async.options(max_retries=2)(1)
steps_checked: list[object] = [
    assert_type(sync_call, Coroutine[Any, Any, float]),
    assert_type(async_call, Coroutine[Any, Any, str]),
    assert_type(called_sync_call, Coroutine[Any, Any, float]),
    assert_type(called_async_call, Coroutine[Any, Any, list[str]]),
    assert_type(changed_call, Coroutine[Any, Any, str]),
]

wrong = [
    bare_sync("x"),  # type: ignore[arg-type]
    bare_async(),  # type: ignore[call-arg]
    called_async(1, deep="yes"),  # type: ignore[arg-type]
    bare_sync.nonsense,  # type: ignore[attr-defined]
    pw.step(max_retrys=1),  # type: ignore[call-overload]
    pw.step(jitter="ful"),  # type: ignore[call-overload]
    pw.step(executor="thread"),  # type: ignore[call-overload]
    pw.step(total_timeout=[5]),  # type: ignore[call-overload]
]


@pw.workflow
async def bare_flow(order: int) -> str:
    price: float = await bare_sync(order)
    assert_type(await bare_async(order), str)
    return f"{price}"


@pw.workflow
async def pattern_flow(orders: list[int]) -> list[float]:
    pw.current_run().on_failure(bare_async, 1)
    first = await pw.first_success(bare_async(1), bare_async(2))
    batch = await bare_sync.map(orders, concurrency=2, chunk_size=10, max_failures=1, max_ratio=0.5)
    again = await batch.rerun_failed()
    batch.raise_if_failed(max_failures=1, max_ratio=0.1)
    patterns_checked: list[object] = [
        assert_type(first, str),
        assert_type(batch, pw.BatchResult[float]),
        assert_type(again.succeeded, list[float]),
        assert_type(batch.failed, list[tuple[int, Exception]]),
        assert_type(pw.rerun("order-42"), pw.RunHandle[Any]),
    ]
    return batch.succeeded if patterns_checked else []


@pw.workflow(name="x", version=2, max_duration="1h", max_recoveries=3)
async def called_flow(order: int = 1) -> None: ...


body = bare_flow.fn(1)
changed_body = bare_flow.options(run_id="x").fn(1)
empty_body = called_flow.fn()
flows_checked: list[object] = [
    assert_type(body, Coroutine[Any, Any, str]),
    assert_type(changed_body, Coroutine[Any, Any, str]),
    assert_type(empty_body, Coroutine[Any, Any, None]),
]


@pw.workflow  # type: ignore[arg-type]
def no_flow() -> int:
    return 1
