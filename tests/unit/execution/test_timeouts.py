"""Real timeouts of sync and async code, and the end of a worker whose code does not stop. Small real times."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.execution import timeouts
from pyworkflow_ray.execution.timeouts import SyncGuard
from tests.unit.execution.calls import error_of, execute

FOREVER = 3_600


def test_sync_code_is_stopped_in_its_sleep() -> None:
    @pw.step(timeout=0.02)
    def sleeps() -> None:
        time.sleep(FOREVER)

    outcome = execute(sleeps)
    assert outcome.error is not None
    assert isinstance(error_of(outcome), pw.StepTimeoutError)
    assert (outcome.error.kind, outcome.why) == ("timeout", "exhausted")
    assert outcome.error.where is not None
    assert outcome.error.where.function.endswith("sleeps"), "where the step was when it was stopped"


def test_case_6_except_exception_swallows_no_timeout() -> None:
    calls = []

    @pw.step(timeout=0.02)
    def own_retry_loop() -> None:
        while True:
            calls.append(1)
            try:
                time.sleep(FOREVER)
            except Exception:
                pass

    assert isinstance(error_of(execute(own_retry_loop)), pw.StepTimeoutError)
    assert len(calls) == 1


def test_a_swallowed_base_exception_is_raised_again_and_the_attempt_is_timed_out_whatever_it_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timeouts, "REPEAT_S", 0.02)
    swallowed = []

    @pw.step(timeout=0.02)
    def stubborn() -> str:
        for _ in range(3):
            try:
                time.sleep(FOREVER)
            except BaseException:
                swallowed.append(1)
        return "done after all"

    assert isinstance(error_of(execute(stubborn)), pw.StepTimeoutError)
    assert len(swallowed) == 3


def test_what_clean_up_raises_does_not_hide_the_timeout() -> None:
    @pw.step(timeout=0.02)
    def cleans_up() -> None:
        try:
            time.sleep(FOREVER)
        finally:
            raise ValueError("clean-up failed")

    error = error_of(execute(cleans_up))
    assert isinstance(error, pw.StepTimeoutError)
    assert isinstance(error.__context__, ValueError)


def test_an_async_step_is_cancelled_and_its_timeout_cannot_be_returned_away() -> None:
    @pw.step(timeout=0.02)
    async def swallows() -> str:
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError:
            pass
        return "done after all"

    assert isinstance(error_of(execute(swallows)), pw.StepTimeoutError)


def test_a_timeout_is_retried_and_one_of_a_step_that_is_not_idempotent_never() -> None:
    calls = []

    @pw.step(timeout=0.02, max_retries=2, retry_delay=0)
    def hangs() -> None:
        calls.append(1)
        time.sleep(FOREVER)

    assert execute(hangs).attempt == 3
    calls.clear()
    outcome = execute(hangs.options(idempotent=False))
    assert (outcome.why, len(calls)) == ("lost", 1)
    error = error_of(outcome)
    assert isinstance(error, pw.StepLostError)
    assert isinstance(error.__cause__, pw.StepTimeoutError)


def test_a_step_called_in_a_step_has_its_own_timeout_and_its_callers() -> None:
    @pw.step(timeout=0.02)
    def inner() -> None:
        time.sleep(FOREVER)

    @pw.step(timeout=30)
    def patient() -> str:
        try:
            inner()  # type: ignore[unused-coroutine]
        except pw.StepTimeoutError:
            return "inner stopped"
        return "?"

    assert execute(patient).status == "completed"

    @pw.step(timeout=30)
    def long_inner() -> None:
        time.sleep(FOREVER)

    @pw.step(timeout=0.02, max_retries=0)
    def hasty() -> None:
        long_inner()  # type: ignore[unused-coroutine]

    error = error_of(execute(hasty))
    assert isinstance(error, pw.StepTimeoutError)
    assert "hasty" in str(error)


def test_a_plain_call_puts_the_users_handler_and_timer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "_keep_handler", False)
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, FOREVER)
        guard = SyncGuard(30.0)
        assert guard.run(lambda: "value") == "value"
        rest, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        assert FOREVER - 60 < rest <= FOREVER
        signal.raise_signal(signal.SIGALRM)
        assert seen == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_sync_timeout_off_the_main_thread_is_refused_with_the_remedy() -> None:
    @pw.step(timeout=5, max_retries=3)
    def sleeps() -> None:
        raise AssertionError("executed")

    caught: list[BaseException] = []

    def call() -> None:
        try:
            sleeps()  # type: ignore[unused-coroutine]
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    (error,) = caught
    assert isinstance(error, pw.ConfigurationError)
    assert "main thread" in str(error)
    assert "async def" in str(error)


def test_a_sync_local_step_with_a_timeout_is_refused_by_the_decorator() -> None:
    with pytest.raises(pw.ConfigurationError, match="can't be interrupted"):
        pw.step(timeout=5, executor="local")(lambda: None)


# The end by force -------------------------------------------------------------------------------------------------

WORKER = """
import asyncio, itertools, sys, threading, time
import pyworkflow_ray as pw
from pyworkflow_ray.execution import timeouts, worker_loop
timeouts.GRACE_S = worker_loop.GRACE_S = 0.2
from tests.unit.execution.calls import Execution

@pw.step(timeout=0.1, max_retries=5, retry_delay=0, executor={executor!r})
{step}

def main():
    print("begun", flush=True)
    execution = Execution()
    outcome = execution.run(stuck, kill_stuck=True)
    print("outcome", outcome.status, outcome.error and outcome.error.type, flush=True)

main()
"""
STUCK = {
    "in C": "def stuck(): sum(itertools.repeat(0))",
    "swallowing": ("def stuck():\n    while True:\n        try: time.sleep(60)\n        except BaseException: pass"),
    "blocking the loop": "async def stuck(): time.sleep(60)",
    "swallowing its cancellation": (
        "async def stuck():\n    while True:\n        try: await asyncio.sleep(60)\n"
        "        except asyncio.CancelledError: pass"
    ),
}


def _worker(step: str, executor: str = "task") -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(WORKER).format(step=step, executor=executor)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("how", STUCK)
def test_a_worker_whose_step_does_not_stop_ends_with_its_stack_shown(how: str) -> None:
    done = _worker(STUCK[how])
    assert done.stdout == "begun\n"
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "stuck" in done.stderr or how == "swallowing its cancellation"  # its thread stands in the loop


def test_a_local_step_that_does_not_stop_is_abandoned_and_its_process_lives() -> None:
    done = _worker(STUCK["swallowing its cancellation"].replace("while True", "for _ in range(2)"), executor="local")
    assert done.returncode == 0, done.stderr
    assert "outcome failed StepTimeoutError" in done.stdout


def test_the_kill_switch_is_off_once_the_attempt_is_over() -> None:
    done: list[Any] = []

    @pw.step(timeout=60)
    def quick() -> None:
        done.append(len(timeouts.kill_switch._owners))

    assert execute(quick, kill_stuck=True).status == "completed"
    assert done == [1]
    assert timeouts.kill_switch._owners == {}
    owner = object()
    timeouts.kill_switch.arm(owner, 0.01)  # comes late: its owner has disarmed
    assert timeouts.kill_switch._owners == {}
