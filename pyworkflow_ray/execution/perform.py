"""Carries out the commands of the attempt loop: on a thread that may block, or on a running event loop.

Called by `worker` and `plain`; calls the user's function, `timeouts`, `worker_loop` and the step's breaker. Faults: the
user's function and the breaker may raise anything; what a breaker raises when it is told an attempt's end is logged
and dropped, for that end is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.errors import CircuitOpenError, ConfigurationError, StepTimeoutError
from pyworkflow_ray.execution.attempts import (
    Admitted,
    Answer,
    AskBreaker,
    AskBudget,
    Cancelled,
    Command,
    Ended,
    Failed,
    Granted,
    Guard,
    Refused,
    RunAttempt,
    Succeeded,
    TellBreaker,
    TellBudget,
    Wait,
)
from pyworkflow_ray.execution.budgets import Budget, LocalBudget, throttled
from pyworkflow_ray.execution.context import StepContext, entered
from pyworkflow_ray.execution.interrupt import Interrupt
from pyworkflow_ray.execution.timeouts import StopUserCode, SyncGuard, on_main_thread
from pyworkflow_ray.execution.worker_loop import WorkerLoop, run_async_attempt

log = logging.getLogger("pyworkflow_ray.step")

Loop = Generator[Command, Answer, Ended]


@dataclass(slots=True)
class Work:
    """What an attempt is made of.

    Args:
        step: Name of the step, for messages.
        function: Calls the user's function: its value, or for an async step its coroutine.
        is_async: Whether it gives a coroutine.
        context: What `current_step()` shows in this attempt.
        total_timeout_s: Limit of all attempts and waits together, in seconds; for messages.
        guard: The step's breaker.
        budget: The step's retry budget.
        interrupt: Cancels the call.
        kill_stuck: End the process where user code does not stop. Step workers only.
        owns_loop: An async step runs on a loop of ours: what it leaves running is cancelled.
        sleep: Sleeps for a wait between attempts, on a thread that may block.
        waits: False: an async call does not wait between attempts.
        settle: Awaited after an attempt of sync code on a running loop: virtual time that it has spent passes there.
        loop: Where async steps run whose caller blocks.
        passes_through: What is no Exception (cancellation, KeyboardInterrupt) is raised through the call.
    """

    step: str
    function: Callable[[], Any]
    is_async: bool
    context: Callable[[RunAttempt], StepContext]
    total_timeout_s: float | None = None
    guard: Guard | None = None
    budget: Budget | None = None
    interrupt: Interrupt | None = None
    kill_stuck: bool = False
    owns_loop: bool = False
    sleep: Callable[[float], Any] | None = None
    loop: WorkerLoop | None = None
    waits: bool = True
    settle: Callable[[], Awaitable[None]] | None = None
    passes_through: bool = False

    def timed_out(self, command: RunAttempt) -> StepTimeoutError:
        if command.last_chance:
            limit = format_duration(self.total_timeout_s or 0.0)
            return StepTimeoutError(
                f"step {self.step!r}: attempt {command.attempt} was stopped as its total_timeout of {limit} was over"
            )
        limit = format_duration(command.timeout_s or 0.0)
        return StepTimeoutError(f"step {self.step!r}: attempt {command.attempt} ran longer than its timeout of {limit}")


# On a thread that may block ---------------------------------------------------------------------------------------


def drive(loop: Loop, work: Work) -> Ended:
    """Carry the loop out to its end, blocking this thread. Async steps run on `work.loop`."""
    permits: list[Any] = []
    answer: Answer = None
    try:
        while True:
            try:
                command = loop.send(answer)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            answer = _perform(command, work, permits)
    except BaseException:
        _give_back(permits)
        raise
    finally:
        loop.close()


def _perform(command: Command, work: Work, permits: list[Any]) -> Answer:
    if isinstance(command, RunAttempt):
        if not work.is_async:
            return _run_sync(command, work)
        assert work.loop is not None
        return _passing(work.loop.run(_run_async(command, work)), work)
    if isinstance(command, AskBreaker):
        assert work.guard is not None
        try:
            # a guard that knows of no waiting needs not be told of it
            permit = work.guard.acquire() if command.waited_s is None else work.guard.acquire(command.waited_s)
        except CircuitOpenError as error:
            return Refused(error, str(work.guard.state))
        except Exception as error:
            return Failed(error)
        permits.append(permit)
        return Admitted(permit, str(work.guard.state))
    if isinstance(command, TellBreaker):
        with _told(work, permits):
            command.permit.finish(command.error)
        return None
    if isinstance(command, (AskBudget, TellBudget)):
        return _budget(command, work)
    assert isinstance(command, Wait)
    if work.interrupt is not None:
        work.interrupt.wait(command.seconds)
    elif work.sleep is not None:
        work.sleep(command.seconds)
    return None


def _run_sync(command: RunAttempt, work: Work) -> Answer:
    if command.timeout_s is not None and not on_main_thread():
        name, limit = ("total_timeout", work.total_timeout_s) if command.last_chance else ("timeout", command.timeout_s)
        raise ConfigurationError(
            f"step {work.step!r}: {name}={format_duration(limit or 0.0)} of a sync step works in the main thread "
            "only, where a signal can interrupt it. Call it there, make it async def, or run it in a workflow"
        )
    guard = SyncGuard(command.timeout_s, work.interrupt, kill_stuck=work.kill_stuck)
    with entered(work.context(command)):
        try:
            answer: Answer = Succeeded(guard.run(work.function))
        except StopUserCode as stop:
            if stop.guard is not guard:
                raise  # meant for a step further out
            answer = Failed(stop)
        except BaseException as error:
            answer = Failed(error)
    if guard.reason == "cancelled":
        return Cancelled()
    if guard.reason == "timeout":
        timeout = work.timed_out(command)
        if isinstance(answer, Failed):
            timeout.__traceback__ = answer.error.__traceback__  # where the step was when it was stopped
            if not isinstance(answer.error, StopUserCode):
                timeout.__context__ = answer.error
        return Failed(timeout, outcome_unknown=True)
    return _passing(answer, work)


# On a running event loop ------------------------------------------------------------------------------------------


async def drive_async(loop: Loop, work: Work) -> Ended:
    """Carry the loop out to its end on the running event loop, whose clock all waits and timeouts follow."""
    permits: list[Any] = []
    answer: Answer = None
    try:
        while True:
            try:
                command = loop.send(answer)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            answer = await _perform_async(command, work, permits)
    except BaseException:
        _give_back(permits)
        raise
    finally:
        loop.close()


async def _perform_async(command: Command, work: Work, permits: list[Any]) -> Answer:
    if isinstance(command, RunAttempt):
        if not work.is_async:
            answer = _run_sync(command, work)
            if work.settle is not None:
                await work.settle()
            return answer
        return _passing(await _run_async(command, work), work)
    if isinstance(command, AskBreaker):
        assert work.guard is not None
        try:
            if command.waited_s is None:
                permit = await work.guard.acquire_async()
            else:
                permit = await work.guard.acquire_async(command.waited_s)
        except CircuitOpenError as error:
            return Refused(error, str(work.guard.state))
        except Exception as error:
            return Failed(error)
        permits.append(permit)
        return Admitted(permit, str(work.guard.state))
    if isinstance(command, TellBreaker):
        with _told(work, permits):
            await command.permit.finish_async(command.error)
        return None
    if isinstance(command, (AskBudget, TellBudget)):
        if isinstance(work.budget, LocalBudget):
            return _budget(command, work)
        return await asyncio.to_thread(_budget, command, work)  # it may ask the cluster
    assert isinstance(command, Wait)
    await wait_async(command.seconds if work.waits else 0, work.interrupt)
    return None


async def _run_async(command: RunAttempt, work: Work) -> Answer:
    with entered(work.context(command)):
        return await run_async_attempt(
            work.function,
            timeout_s=command.timeout_s,
            timed_out=lambda: work.timed_out(command),
            interrupt=work.interrupt,
            kill_stuck=work.kill_stuck,
            owns_loop=work.owns_loop,
        )


async def wait_async(seconds: float, interrupt: Interrupt | None) -> None:
    """Sleep on the running loop; ends early when cancelled."""
    if interrupt is None:
        await asyncio.sleep(seconds)
        return
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[None] = loop.create_future()

    def stop() -> None:
        if not stopped.done():
            stopped.set_result(None)

    def wake() -> None:
        loop.call_soon_threadsafe(stop)

    interrupt.bind(wake)
    try:
        await asyncio.wait({stopped}, timeout=seconds)
    finally:
        interrupt.unbind(wake)


# Both -------------------------------------------------------------------------------------------------------------


def _passing(answer: Answer, work: Work) -> Answer:
    """An attempt's end; raised where the call as a whole ends with it."""
    if isinstance(answer, Failed) and work.passes_through and not isinstance(answer.error, Exception):
        raise answer.error
    return answer


def _budget(command: AskBudget | TellBudget, work: Work) -> Answer:
    assert work.budget is not None
    try:
        if isinstance(command, TellBudget):
            work.budget.success()
            return None
        return Granted(work.budget.retry(throttled(command.error)))
    except Exception as error:
        log.warning("retry budget %r could not be asked", work.budget.name, exc_info=True)
        return Failed(error)


@contextlib.contextmanager
def _told(work: Work, permits: list[Any]) -> Iterator[None]:
    try:
        yield
    except Exception:
        log.warning("the breaker of step %r could not be told how an attempt ended", work.step, exc_info=True)
    permits.clear()


def _give_back(permits: list[Any]) -> None:
    """The call ends by force: an attempt that was let through counts for nothing."""
    for permit in permits:
        try:
            permit.finish(asyncio.CancelledError())
        except Exception:
            log.warning("a breaker's permit could not be given back", exc_info=True)
