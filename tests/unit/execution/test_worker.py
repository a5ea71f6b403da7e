"""A step call executed in a worker: outcomes, records, the breaker, interrupts, the lasting loop."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.engine.calls import PreviousFailure
from pyworkflow_ray.engine.events import AttemptFailed, StepStarted
from pyworkflow_ray.execution.breakers import CircuitGuard, LocalCircuit
from pyworkflow_ray.execution.interrupt import Interrupt
from pyworkflow_ray.execution.worker import execute_call, execute_call_async
from pyworkflow_ray.execution.worker_loop import worker_loop
from pyworkflow_ray.ids import idempotency_key
from pyworkflow_ray.resilience.breaker import BreakerSettings
from tests.unit.execution.calls import CODEC, Execution, call_of, each, error_of, execute


def test_a_value_comes_back() -> None:
    @pw.step
    def add(a: int, b: int) -> tuple[int, str]:
        return a + b, "x"

    outcome = execute(add, 1, 2)
    assert (outcome.status, outcome.attempt, outcome.attempts) == ("completed", 1, [])
    assert outcome.result is not None
    assert CODEC.decode(outcome.result) == (3, "x")
    assert (outcome.position, outcome.dispatch, outcome.worker, outcome.node) == ("3", 7, "worker-1", "node-1")


def test_case_9_attempts_are_reported_and_carried_by_the_outcome() -> None:
    @pw.step(max_retries=2, retry_delay=0)
    async def fails() -> None:
        raise ConnectionError("refused")

    execution = Execution()
    outcome = execution.run(fails)
    assert [type(event) for event in execution.reported] == [StepStarted, AttemptFailed] * 3
    assert [record.attempt for record in each(outcome.attempts)] == [1, 2, 3]
    first = each(outcome.attempts)[0]
    assert (first.delay_s, first.delay_reason, first.worker, first.node) == (0.0, "fixed", "worker-1", "node-1")
    assert (first.error.kind, first.error.type, first.error.message) == ("transient", "ConnectionError", "refused")
    assert first.error.where is not None
    assert first.error.where.function.endswith("fails")
    assert (outcome.why, outcome.attempt) == ("exhausted", 3)
    error = error_of(outcome)
    assert type(error) is ConnectionError
    assert len(error.__notes__) == 3


def test_starts_that_nobody_keeps_are_not_reported() -> None:
    @pw.step(max_retries=2, retry_delay=0)
    def fails() -> None:
        raise ConnectionError("refused")

    execution = Execution()
    outcome = execution.run(fails, starts=False)
    assert [type(event) for event in execution.reported] == [AttemptFailed] * 3
    assert [record.attempt for record in each(outcome.attempts)] == [1, 2, 3]


def test_records_that_the_owner_has_are_left_out() -> None:
    @pw.step(max_retries=2, retry_delay=0)
    def fails() -> None:
        raise ConnectionError("refused")

    assert [record.attempt for record in execute(fails, confirmed=lambda: 2).attempts] == [3]


def test_a_long_wait_hands_the_call_back() -> None:
    @pw.step(max_retries=2, retry_delay=30)
    def fails() -> None:
        raise ConnectionError("refused")

    outcome = execute(fails, clock=lambda: 1_000.0)
    assert (outcome.status, outcome.attempt, outcome.retry_at) == ("handed_back", 1, 1_030.0)
    assert len(outcome.attempts) == 1


def test_a_call_goes_on_with_number_failures_and_retries_of_the_dispatch_before() -> None:
    seen: list[Any] = []

    @pw.step(max_retries=2, retry_delay=0)
    def fails() -> None:
        seen.append(pw.current_step())
        raise ConnectionError("refused")

    earlier = [PreviousFailure(1, "timeout", "StepTimeoutError", "too long", 30.0)]
    outcome = execute(fails, first_attempt=4, retries_used=1, previous=earlier)
    assert [step.attempt for step in seen] == [4, 5]
    assert seen[0].previous[0].type == "StepTimeoutError"
    assert outcome.why == "exhausted"


def test_the_context_of_an_attempt() -> None:
    @pw.step(timeout=30)
    async def look() -> None:
        step, run = pw.current_step(), pw.current_run()
        assert step.idempotency_key == idempotency_key("storage", "uid", 0, "3")
        assert step.fence == (2, 7, 1)
        assert (step.run_id, run.run_id, run.workflow) == ("order-42", "order-42", "checkout")
        assert step.deadline is not None
        assert step.deadline.timestamp() == 1_030.0
        assert pw.now().timestamp() == 1_000.0

    assert execute(look, clock=lambda: 1_000.0).status == "completed"
    with pytest.raises(pw.ConfigurationError, match="no step is running"):
        pw.current_step()


def test_a_result_that_cannot_be_stored_fails_the_step_for_good() -> None:
    calls = []

    @pw.step(max_retries=5, retry_delay=0)
    def lock() -> Any:
        calls.append(1)
        return threading.Lock()

    outcome = execute(lock)
    assert (outcome.why, len(calls)) == ("permanent", 1)
    assert outcome.error is not None
    assert outcome.error.type == "PayloadError"


def test_arguments_that_cannot_be_decoded_fail_the_step_as_code() -> None:
    @pw.step(max_retries=5)
    def never(x: Any) -> None:
        raise AssertionError("executed")

    broken = CODEC.encode(1).model_copy(update={"enc": "of a later version"})
    outcome = execute(never, args=[broken])
    assert (outcome.status, outcome.why) == ("failed", "code")


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()], ids=repr)
def test_what_is_no_exception_fails_the_step_at_once_and_harmlessly(error: BaseException) -> None:
    calls = []

    @pw.step(max_retries=5, retry_delay=0)
    def sync() -> None:
        calls.append(1)
        raise error

    @pw.step(max_retries=5, retry_delay=0)
    async def in_loop() -> None:
        sync.fn()

    for step in (sync, in_loop):
        calls.clear()
        outcome = execute(step)
        assert outcome.why == "no retry"
        failure = error_of(outcome)
        assert isinstance(failure, pw.StepFailedError), "a SystemExit would end the run's process, not only the step"
        assert failure.type.endswith(type(error).__name__)
        assert len(calls) == 1


# The breaker ------------------------------------------------------------------------------------------------------


def test_the_breaker_sees_every_attempt_and_its_refusal_ends_the_step() -> None:
    calls = []

    @pw.step(max_retries=9, retry_delay=0)
    def fails() -> None:
        calls.append(1)
        raise ConnectionError("refused")

    guard = CircuitGuard(LocalCircuit("payments", BreakerSettings(failure_threshold=3, recovery_timeout=60)))
    outcome = execute(fails, breaker=guard)
    assert len(calls) == 3
    assert (outcome.why, outcome.breaker) == ("refused", "open")
    assert isinstance(error_of(outcome), pw.CircuitOpenError)
    assert [record.breaker for record in each(outcome.attempts)] == ["closed", "closed", "closed", "open"]
    assert outcome.breaker_generation == guard.generation > 0


def test_an_attempt_that_times_out_counts_once() -> None:
    @pw.step(max_retries=1, retry_delay=0, timeout=0.02)
    async def hangs() -> None:
        await asyncio.sleep(60)

    circuit = LocalCircuit("slow", BreakerSettings(failure_threshold=5))
    execute(hangs, breaker=CircuitGuard(circuit))
    assert circuit.look().failures == 2


def test_a_cancelled_attempt_counts_for_nothing() -> None:
    execution = Execution()

    @pw.step
    def fails() -> None:
        execution.interrupt.cancel()
        raise ConnectionError("refused")

    circuit = LocalCircuit("cancelled", BreakerSettings(failure_threshold=1))
    assert execution.run(fails, breaker=CircuitGuard(circuit)).status == "cancelled"
    assert circuit.look().failures == 0


# Interrupts -------------------------------------------------------------------------------------------------------


def _cancel_when(event: threading.Event, interrupt: Interrupt) -> threading.Thread:
    def cancel() -> None:
        event.wait()
        interrupt.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    return thread


def test_an_interrupt_stops_an_async_step() -> None:
    begun, cleaned = threading.Event(), []
    execution = Execution()

    @pw.step(max_retries=5, retry_delay=0)
    async def hangs() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append(1)

    thread = _cancel_when(begun, execution.interrupt)
    outcome = execution.run(hangs)
    thread.join()
    assert (outcome.status, outcome.attempts, cleaned) == ("cancelled", [], [1])


def test_an_interrupt_stops_sync_code_through_except_exception() -> None:
    begun = threading.Event()
    execution = Execution()

    @pw.step(max_retries=5, retry_delay=0)
    def hangs() -> None:
        while True:
            try:
                begun.set()
                threading.Event().wait(60)
            except Exception:
                pass

    thread = _cancel_when(begun, execution.interrupt)
    outcome = execution.run(hangs)
    thread.join()
    assert outcome.status == "cancelled"


def test_case_6_an_interrupt_ends_a_wait_between_attempts() -> None:
    failed = threading.Event()
    execution = Execution()

    @pw.step(max_retries=5, retry_delay=60)
    def fails() -> None:
        failed.set()
        raise ConnectionError("refused")

    thread = _cancel_when(failed, execution.interrupt)
    outcome = execution.run(fails, wait_max_s=100.0)
    thread.join()
    assert outcome.status == "cancelled"


def test_an_interrupt_that_comes_first_or_last_changes_nothing_else() -> None:
    @pw.step
    def add() -> int:
        return 1

    execution = Execution()
    execution.interrupt.cancel()
    assert execution.run(add).status == "cancelled"
    assert execution.reported == []
    execution = Execution()
    assert execution.run(add).status == "completed"
    execution.interrupt.cancel()


# The lasting loop -------------------------------------------------------------------------------------------------


def test_async_steps_share_one_loop_and_what_they_leave_running_is_cancelled() -> None:
    loops: list[Any] = []
    left: list[asyncio.Task[None]] = []

    @pw.step
    async def leaves() -> None:
        loops.append(asyncio.get_running_loop())
        left.append(asyncio.create_task(asyncio.sleep(60)))

    execute(leaves)
    execute(leaves)
    assert loops[0] is loops[1] is worker_loop().loop
    assert all(task.cancelled() for task in left)


def test_what_a_resource_started_outlives_the_step() -> None:
    def start() -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(asyncio.sleep(60))

    client = pw.resource(start, close=lambda task: task.cancel())

    @pw.step
    async def use() -> None:
        client()

    execute(use)
    execute(use)
    assert not client().done()
    client.close()


def test_system_exit_in_a_task_of_the_steps_own_does_not_end_the_worker() -> None:
    @pw.step
    async def spawns() -> str:
        task = asyncio.create_task(_exit())
        try:
            await task
        except SystemExit:
            return "survived"
        return "?"

    async def _exit() -> None:
        sys.exit(3)

    outcome = execute(spawns)
    assert outcome.result is not None
    assert CODEC.decode(outcome.result) == "survived"


def test_local_async_steps_of_several_threads_run_on_the_one_loop_at_the_same_time() -> None:
    together = asyncio.Barrier(3)

    @pw.step(executor="local")
    async def meet() -> None:
        await together.wait()

    outcomes: list[Any] = []

    def run() -> None:
        outcomes.append(
            execute_call(
                call_of(meet), meet.definition, CODEC, report=lambda event: None, interrupt=Interrupt(), kill_stuck=True
            )
        )

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [outcome.status for outcome in outcomes] == ["completed"] * 3


async def test_a_call_on_a_running_loop() -> None:
    calls: list[int] = []

    @pw.step(max_retries=1, retry_delay=0)
    async def twice() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError("refused")
        return len(calls)

    report: Callable[[Any], None] = lambda event: None  # noqa: E731
    outcome = await execute_call_async(call_of(twice), twice.definition, CODEC, report=report)
    assert outcome.result is not None
    assert (outcome.attempt, CODEC.decode(outcome.result)) == (2, 2)


def test_a_callable_of_the_steps_definition_decides_its_delays_in_the_worker() -> None:
    asked: list[tuple[int, str]] = []

    def choose(attempt: int, error: BaseException) -> float:
        asked.append((attempt, type(error).__name__))
        return 0.0 if attempt == 1 else 600.0

    @pw.step(max_retries=5, retry_delay=choose)
    def always() -> None:
        raise ConnectionError("refused")

    outcome = execute(always)
    assert asked == [(1, "ConnectionError"), (2, "ConnectionError")]
    assert (outcome.status, outcome.attempt) == ("handed_back", 2)
    assert [(a.delay_s, a.delay_reason) for a in outcome.attempts] == [(0.0, "chosen"), (600.0, "chosen")]


def test_a_list_of_delays_goes_on_where_an_earlier_dispatch_left_it() -> None:
    @pw.step(max_retries=5, retry_delay=[0, 0, "10m", "20m"])
    def always() -> None:
        raise ConnectionError("refused")

    outcome = execute(always, first_attempt=4, retries_used=3)
    assert [(a.attempt, a.delay_s, a.delay_reason) for a in outcome.attempts] == [(4, 1200.0, "listed")]
