"""The lasting event loop of a step worker, and one attempt of an async step on whatever loop is running.

Called by `perform`, `worker` and `resource`; calls `timeouts` for the end by force. Rules:

* one loop a process, for all async steps one after another: clients that keep connections (httpx, aiohttp) are bound
  to the loop that first used them, and fail on a second one;
* it runs on the thread that executes the step, and only while one runs; no signal of ours ever interrupts it;
* what a step leaves running is cancelled at its end; tasks made inside a resource's factory belong to the resource.

Faults: an async step may block its thread, or swallow its cancellation; in a step worker that is its process's end
(`timeouts.kill_switch`), elsewhere the task is abandoned. It may raise SystemExit in a task of its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pyworkflow_ray.errors import StepTimeoutError
from pyworkflow_ray.execution.attempts import Answer, Cancelled, Failed, Succeeded
from pyworkflow_ray.execution.interrupt import Interrupt
from pyworkflow_ray.execution.timeouts import GRACE_S, kill_switch

log = logging.getLogger("pyworkflow_ray.step")

T = TypeVar("T")

_KILL_MARGIN_S = 5.0  # the kill switch strikes long before we would stop waiting for it

# The tasks of the attempt that runs in this context; None for a resource's, and outside any attempt.
_tasks_of_attempt: contextvars.ContextVar[weakref.WeakSet[asyncio.Task[Any]] | None] = contextvars.ContextVar(
    "pyworkflow_ray_tasks_of_attempt", default=None
)


class WorkerLoop:
    """An event loop that lasts as long as its process.

    Threads that run something on it at the same time share it: one of them runs the loop, and when it is done another
    that still waits takes over. So nothing is handed from thread to thread while there is only one.
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_task_factory(new_step_task)
        self.pid = os.getpid()
        self._changed = threading.Condition()
        self._runs = False

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it to its end, blocking this thread."""
        with self._changed:
            first, self._runs = not self._runs, True
        if first:
            return self._run_here(self.loop.create_task(coroutine))
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        future.add_done_callback(self._tell)
        with self._changed:
            while self._runs and not future.done():
                self._changed.wait()
            if future.done():
                return future.result()
            self._runs = True
        return self._run_here(asyncio.wrap_future(future, loop=self.loop))

    def _tell(self, _: Any) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run_here(self, main: asyncio.Future[T]) -> T:
        """Run the loop until `main` is done.

        A SystemExit of a task that a step started by itself does not end the loop: whoever awaits the task gets it.
        """
        stop: KeyboardInterrupt | None = None
        try:
            while True:
                try:
                    return self.loop.run_until_complete(main)
                except KeyboardInterrupt as error:
                    if main.done():
                        raise
                    stop = error
                    main.cancel()
                except SystemExit:
                    if main.done():
                        raise
                except asyncio.CancelledError:
                    if stop is not None:
                        raise stop from None
                    raise
        finally:
            with self._changed:
                self._runs = False
                self._changed.notify_all()


_loop: WorkerLoop | None = None


def worker_loop() -> WorkerLoop:
    """This process's lasting loop, made on first use (and anew in a forked child)."""
    global _loop
    if _loop is None or _loop.pid != os.getpid() or _loop.loop.is_closed():
        _loop = WorkerLoop()
    return _loop


def new_step_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **kwargs: Any) -> asyncio.Task[Any]:
    """Task factory of a loop that runs steps: what an attempt starts is known as its own."""
    context = kwargs.get("context")
    owner = _tasks_of_attempt.get() if context is None else context.get(_tasks_of_attempt)
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **kwargs)
    if owner is not None:
        owner.add(task)
    return task


def outside_attempt(function: Callable[[], Any]) -> Any:
    """Call it so that the tasks it makes outlive the running attempt."""

    def apart() -> Any:
        _tasks_of_attempt.set(None)
        return function()

    return contextvars.copy_context().run(apart)


async def run_async_attempt(
    start: Callable[[], Coroutine[Any, Any, Any]],
    *,
    timeout_s: float | None,
    timed_out: Callable[[], StepTimeoutError],
    interrupt: Interrupt | None = None,
    kill_stuck: bool = False,
    owns_loop: bool = False,
) -> Answer:
    """One attempt of an async step.

    Args:
        start: Makes the user's coroutine.
        timed_out: Makes the error of an attempt that ran over `timeout_s`.
        kill_stuck: End the process where the attempt does not end within the grace. Step workers only.
        owns_loop: The loop is ours: cancel what the step leaves running.
    """
    if timeout_s is None and interrupt is None and not owns_loop:
        return await _call(start)  # in the caller's own task: its cancellation scopes and contexts hold
    tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
    token = _tasks_of_attempt.set(tasks)
    switch = object()
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[None] = loop.create_future()

    def stop() -> None:
        if not stopped.done():
            stopped.set_result(None)

    def wake() -> None:  # from any thread
        kill_switch.arm(switch, GRACE_S)  # nothing unless registered
        try:
            loop.call_soon_threadsafe(stop)
        except RuntimeError:  # the loop was closed: nothing runs there
            pass

    try:
        task = loop.create_task(_call(start))
        tasks.discard(task)  # the attempt itself, not what it left
        if kill_stuck:
            kill_switch.register(switch)
            if timeout_s is not None:
                kill_switch.arm(switch, timeout_s + GRACE_S)
        if interrupt is not None:
            interrupt.bind(wake)
        return await _supervise(task, stopped, timeout_s, timed_out, GRACE_S + (_KILL_MARGIN_S if kill_stuck else 0))
    finally:
        _tasks_of_attempt.reset(token)
        if owns_loop:
            await _cancel_leftovers(tasks)
        if interrupt is not None:
            interrupt.unbind(wake)
        kill_switch.disarm(switch)


async def _call(start: Callable[[], Coroutine[Any, Any, Any]]) -> Answer:
    """The user's coroutine, its end as a value: a SystemExit in a task would otherwise end the loop."""
    try:
        return Succeeded(await start())
    except BaseException as error:
        return Failed(error)


async def _supervise(
    task: asyncio.Task[Answer],
    stopped: asyncio.Future[None],
    timeout_s: float | None,
    timed_out: Callable[[], StepTimeoutError],
    grace_s: float,
) -> Answer:
    try:
        either: set[asyncio.Future[Any]] = {task, stopped}
        await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:  # of whoever awaits the attempt
        task.cancel()
        await asyncio.wait({task}, timeout=grace_s)
        raise
    if task.done():
        return _end_of(task)
    cancelled = stopped.done()
    task.cancel()
    try:
        await asyncio.wait({task}, timeout=grace_s)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not task.done():
        log.warning("an async step goes on %g s after it was stopped: it is abandoned", grace_s)
    if cancelled:
        return Cancelled()
    error = timed_out()
    last = _end_of(task) if task.done() else None
    if isinstance(last, Failed):
        error.__traceback__ = last.error.__traceback__  # where the step was when it was stopped
        if not isinstance(last.error, asyncio.CancelledError):
            error.__context__ = last.error
    return Failed(error, outcome_unknown=True)


def _end_of(task: asyncio.Task[Answer]) -> Answer:
    if task.cancelled():  # before it had begun
        return Failed(asyncio.CancelledError())
    return task.result()


async def _cancel_leftovers(tasks: weakref.WeakSet[asyncio.Task[Any]]) -> None:
    for _ in range(3):  # a task that is cancelled may start another
        left = {task for task in tasks if not task.done()}
        if not left:
            return
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=GRACE_S)
    left = {task for task in tasks if not task.done()}
    if left:
        log.warning("%d tasks that a step left running do not end; they go on in this worker", len(left))
