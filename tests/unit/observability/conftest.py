"""Histories built from events, second by second, for the views. No clock, no storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.resilience.policy import RetryPolicy

START = 1_800_000_000.0  # 2027-01-15 08:00:00 UTC


def payload(value: Any, **fields: Any) -> ev.Payload:
    return ev.Payload(**{"enc": "json", "data": value, "size": len(repr(value)), **fields})


def error(type_: str = "ConnectionError", message: str = "503 from payments", kind: str = "transient") -> ev.ErrorInfo:
    where = ev.Frame(file="shop/pay.py", line=31, function="charge")
    text = f"Traceback (most recent call last):\n  shop/pay.py:31\n{type_}: {message}"
    return ev.ErrorInfo.model_validate(
        {"kind": kind, "type": type_, "module": "shop", "message": message, "where": where, "traceback": text}
    )


class History:
    """Events in order; every method takes the second after the start at which its event was recorded."""

    def __init__(self, run_id: str = "order-42", **fields: Any) -> None:
        self.events: list[ev.Event] = []
        self.number = 0
        self.start = START
        defaults: dict[str, Any] = {
            "run_uid": "u" + run_id,
            "storage_id": "s1",
            "workflow": "shop.flows:checkout",
            "version": "3",
            "code": ev.CodeRef(how="import", name="checkout"),
            "environment": ev.CodeEnvironment(key="k", python="3.11"),
            "trace_id": "0" * 31 + "1",
        }
        self.add(0, ev.RunCreated(run_id=run_id, **{**defaults, **fields}))

    def add(self, second: float, event: ev.Event) -> History:
        numbered = event.model_copy(update={"seq": len(self.events), "at": START + second})
        self.events.append(numbered)
        return self

    def activated(self, second: float, epoch: int = 0, cause: Any = "start", **fields: Any) -> History:
        return self.add(second, ev.RunActivated(epoch=epoch, cause=cause, **fields))

    def scheduled(self, second: float, step: str, arg: Any = 1, breaker: str | None = None, **policy: Any) -> History:
        self.number += 1
        return self.add(
            second,
            ev.StepScheduled(
                position=str(self.number),
                number=self.number,
                step=f"shop.steps:{step}",
                code=ev.CodeRef(how="import", name=step),
                args=[payload(arg)],
                policy=RetryPolicy(**policy),
                breaker=breaker,
            ),
        )

    def started(self, second: float, position: str, attempt: int = 1, dispatch: int = 1) -> History:
        return self.add(
            second,
            ev.StepStarted(
                position=position, dispatch=dispatch, attempt=attempt, started_at=START + second, worker="w"
            ),
        )

    def failed_attempt(
        self,
        second: float,
        position: str,
        attempt: int,
        delay_s: float | None,
        took: float = 1.0,
        dispatch: int = 1,
        reason: str | None = "backoff",
        what: ev.ErrorInfo | None = None,
    ) -> History:
        return self.add(
            second,
            ev.AttemptFailed(
                position=position,
                dispatch=dispatch,
                attempt=attempt,
                started_at=START + second - took,
                ended_at=START + second,
                error=what or error(),
                delay_s=delay_s,
                delay_reason=reason if delay_s is not None else None,
                retry_at=None if delay_s is None else START + second + delay_s,
            ),
        )

    def completed_step(
        self, second: float, position: str, attempt: int = 1, took: float = 0.5, dispatch: int = 1, result: Any = "ok"
    ) -> History:
        return self.add(
            second,
            ev.StepCompleted(
                position=position,
                dispatch=dispatch,
                attempt=attempt,
                started_at=START + second - took,
                ended_at=START + second,
                result=payload(result),
            ),
        )


@pytest.fixture
def history() -> Callable[..., History]:
    return History


@pytest.fixture
def make_error() -> Callable[..., ev.ErrorInfo]:
    return error


@pytest.fixture
def retrying() -> History:
    """UX.md's order-42: validated, reserved after a lost worker, its charge failed four times with one error."""
    run = History().activated(0).scheduled(0.1, "validate").started(0.11, "1").completed_step(0.122, "1", took=0.012)
    run.scheduled(0.2, "reserve", max_retries=3, retry_delay_s=0.5).started(0.2, "2")
    run.failed_attempt(1.2, "2", 1, 0.5, what=error("TimeoutError", "reserve took 1s", "timeout"))
    run.started(1.7, "2", 2).add(2.2, ev.StepLost(position="2", dispatch=1, attempt=2, cause="worker_died"))
    run.started(3.8, "2", 2, dispatch=2).completed_step(4.3, "2", 2, dispatch=2)
    run.scheduled(4.3, "charge", max_retries=5, retry_delay_s=30, retry_backoff=2, breaker="payments-api")
    for attempt, (second, delay) in enumerate(((25, 30), (65, 60), (146, 120), (411, 206)), start=1):
        run.failed_attempt(second, "3", attempt, delay, took=1)
    return run
