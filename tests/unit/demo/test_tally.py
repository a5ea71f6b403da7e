from __future__ import annotations

from typing import Any

import pytest

from pyworkflow_ray.demo.tally import Kill, pid_of, tally, witnessed
from pyworkflow_ray.engine.events import (
    AttemptFailed,
    CodeEnvironment,
    CodeRef,
    ErrorInfo,
    Event,
    Payload,
    RunActivated,
    RunCompleted,
    RunCreated,
    RunFailed,
    StepCompleted,
    StepLost,
    StepStarted,
)

ERROR = ErrorInfo(kind="permanent", type="InvalidOrder")
NONE = Payload(enc="json")


def created(order_id: str = "A1", at: float = 100.0) -> RunCreated:
    row = {"order_id": order_id, "amount": "5.00"}
    return RunCreated(
        seq=0,
        at=at,
        run_id=f"run-{order_id}",
        run_uid="u",
        storage_id="s",
        workflow="checkout",
        code=CodeRef(how="import", name="checkout"),
        environment=CodeEnvironment(key="k", python="3.11"),
        kwargs={"services": Payload(enc="json", data="127.0.0.1:1"), "row": Payload(enc="json", data=row)},
    )


def failed_attempt(**changes: Any) -> AttemptFailed:
    fields = {"position": "1", "dispatch": 1, "attempt": 1, "started_at": 0.0, "ended_at": 0.0, "error": ERROR}
    return AttemptFailed(**{**fields, **changes})


def completed_step(position: str = "1") -> StepCompleted:
    return StepCompleted(position=position, dispatch=1, attempt=1, started_at=0, ended_at=0, result=NONE)


def test_orders_are_told_apart_by_how_their_runs_ended() -> None:
    result = tally(
        [
            [created("A1", 100.0), RunCompleted(at=104.0, result=NONE)],
            [created("A2", 101.0), RunFailed(at=109.0, error=ERROR)],
            [created("A3", 102.0), RunActivated(at=103.0, epoch=0)],
        ]
    )
    assert result.completed == {"A1": "5.00"}
    assert result.failed == {"A2": "InvalidOrder"}
    assert result.unfinished == ["A3"]
    assert result.orders == 3
    assert result.seconds == 9.0


def test_a_retry_is_a_failed_attempt_that_another_follows() -> None:
    assert tally([[created(), failed_attempt(delay_s=0.2), failed_attempt(delay_s=0), failed_attempt()]]).retries == 2


def test_recoveries_are_runs_taken_up_and_steps_dispatched_again() -> None:
    history: list[Event] = [
        created(),
        RunActivated(epoch=0),
        StepLost(position="1", dispatch=1),
        RunActivated(epoch=1, cause="recovery"),
        StepLost(position="2", dispatch=1, cause="run_actor_lost"),
        RunActivated(epoch=2, cause="wake"),
    ]
    assert tally([history]).recoveries == 2


def test_a_run_that_had_not_begun_was_not_lost_with_the_controller() -> None:
    assert tally([[created(), RunActivated(epoch=1, cause="recovery"), RunCompleted(result=NONE)]]).recoveries == 0


def test_a_step_that_completed_twice_is_named() -> None:
    assert tally([[created(), completed_step(), completed_step("2"), completed_step()]]).twice == ["run-A1/1"]


@pytest.mark.parametrize(("worker", "pid"), [("42@node-1", 42), ("42", 42), ("", None), ("host@42", None)])
def test_pid_of_a_worker(worker: str, pid: int | None) -> None:
    assert pid_of(worker) == pid


RUN: dict[str, list[Event]] = {
    "run-A1": [
        created(),
        RunActivated(at=101, epoch=0, worker="10@n"),
        StepStarted(at=102, position="1", dispatch=1, attempt=1, started_at=102, worker="20@n"),
        StepLost(at=103, position="1", dispatch=1),
        RunActivated(at=105, epoch=1, cause="recovery", worker="11@n"),
    ]
}


@pytest.mark.parametrize(
    ("kill", "struck"),
    [
        (Kill("run actor", 10, at=104, gone=True), True),
        (Kill("run actor", 11, at=104, gone=True), False),  # nothing was lost with it
        (Kill("run actor", 10, at=106, gone=True), False),  # the recovery came before the kill
        (Kill("run actor", 10, at=104, gone=False), False),
        (Kill("step worker", 20, at=102.5, gone=True), True),
        (Kill("step worker", 21, at=102.5, gone=True), False),
        (Kill("step worker", 20, at=104, gone=True), False),
        (Kill("controller", 30, at=104, gone=True, replaced=True), True),
        (Kill("controller", 30, at=104, gone=True), False),
    ],
)
def test_a_kill_counts_only_where_the_log_shows_the_loss(kill: Kill, struck: bool) -> None:
    assert witnessed(kill, RUN) is struck
