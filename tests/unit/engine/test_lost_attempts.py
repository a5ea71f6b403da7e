"""Retries and recoveries, told apart by the driver: what a lost worker costs a step, and what it does not."""

from __future__ import annotations

import random
from typing import Any

import pytest
from ray import exceptions as rx

from pyworkflow_ray.engine.commands import Dispatch
from pyworkflow_ray.engine.events import StepLost
from pyworkflow_ray.resilience.policy import RetryPolicy
from pyworkflow_ray.runtime.faults import lost_step
from pyworkflow_ray.step import step
from tests.unit.engine.test_driver import Run


@step(max_retries=1, retry_delay=0, max_recoveries=2)
async def work() -> str:
    return "done"


async def flow() -> str:
    return await work()


def calls(run: Any) -> list[Any]:
    return [effect.call for effect in run.of(Dispatch)]


def lost(run: Any, dispatch: int, *, charged: bool = True) -> StepLost:
    run.do("lost", "1", dispatch, cause="worker_died", charged=charged)
    noted = [*run.events, *run.driver._lazy]  # where it waits for its recovery the note rides with the next append
    return next(event for event in reversed(noted) if isinstance(event, StepLost))


def after_the_wait(run: Any, event: StepLost) -> None:
    run.now = event.retry_at
    run.do("tick")


def test_case_10_an_attempt_lost_with_its_worker_uses_a_recovery_and_no_retry_and_the_next_has_the_next_number() -> (
    None
):
    run = Run(flow)
    run.do("record", run.failure("1", attempt=1, retry_at=run.now))
    run.start("1", attempt=2)
    event = lost(run, 1)
    assert (event.attempt, event.charged) == (2, True), "attempt 2 had begun: what it did is unknown"
    after_the_wait(run, event)
    again = calls(run)[-1]
    assert (again.first_attempt, again.retries_used) == (3, 1), (
        "the last recorded number plus one; one retry, attempt 1's"
    )
    step = run.driver.history.steps["1"]
    assert (step.recoveries, step.retries_used) == (1, 1)


def test_case_10_recoveries_back_off_with_jitter() -> None:
    waits = []
    for seed in range(200):
        run = Run(flow)
        run.driver._rng = random.Random(seed)
        first = lost(run, 1)
        assert first.retry_at is not None
        waits.append([first.retry_at - run.now])
        after_the_wait(run, first)
        second = lost(run, 2)
        assert second.retry_at is not None
        waits[-1].append(second.retry_at - run.now)
    firsts, seconds = zip(*waits, strict=True)
    assert 0 < min(firsts) < 0.6 * max(firsts), "spread over half of the wait"
    assert len({round(wait, 6) for wait in firsts}) > 190, "no two at the same moment"
    assert 1.9 < max(seconds) / max(firsts) < 2.1, "doubled"


def test_case_10_recoveries_that_are_used_up_fail_the_step_and_name_them() -> None:
    run = Run(flow)
    for dispatch in (1, 2, 3):
        event = lost(run, dispatch)
        if event.retry_at is not None:
            after_the_wait(run, event)
    assert run.events[-1].error.type == "StepLostError"
    assert "lost 3 times (max_recoveries=2)" in run.events[-1].error.message


def test_case_10_a_drained_or_preempted_node_consumes_neither() -> None:
    run = Run(flow)
    for dispatch in range(1, 12):
        event = lost(run, dispatch, charged=False)
        assert event.retry_at == run.now, "it goes on at once"
    step = run.driver.history.steps["1"]
    assert (step.recoveries, step.retries_used, calls(run)[-1].retries_used) == (0, 0, 0)
    run.complete("1", "done", dispatch=12)
    assert run.types()[-1] == "run_completed"


@pytest.mark.parametrize(
    ("error", "cause", "charged"),
    [
        (rx.WorkerCrashedError(), "worker_died", True),
        (rx.OutOfMemoryError("killed by the memory monitor"), "out_of_memory", True),
        (rx.NodeDiedError("the node has died"), "node_lost", True),
        (rx.NodeDiedError("the node was preempted"), "node_lost", False),
        (rx.NodeDiedError("the node was drained"), "node_lost", False),
    ],
)
def test_case_10_rays_own_words_tell_who_is_charged(error: Exception, cause: str, charged: bool) -> None:
    assert lost_step(error) == (cause, charged)


def test_case_10_a_recovery_does_not_take_the_retry_that_is_left() -> None:
    run = Run(flow)
    after_the_wait(run, lost(run, 1))
    assert calls(run)[-1].policy == RetryPolicy(max_retries=1, retry_delay_s=0, max_recoveries=2)
    run.do("record", run.failure("1", dispatch=2, attempt=1, retry_at=run.now))
    run.complete("1", "done", dispatch=2, attempt=2)
    assert run.types()[-1] == "run_completed"
