"""An asyncio loop whose clock stands still while something can be done, and jumps to what is due next when nothing can.

Made by `environment.WorkflowEnv`, one an environment: steps, timers and waits of its runs live on it. It is driven from
outside, in bursts: from within a test's own loop, which goes on meanwhile (a server there can answer), or by a plain
call. Rules:

* time jumps only when nothing is ready, no thread that the code waits for is working, and no socket has brought
  anything for `io_wait_s` of real time;
* what is due comes in order of its instant; of equal instants in the order in which it was begun.

Faults: code that really waits (a thread, a socket, a blocking call) takes real time; a loop that has nothing due and
waits for nothing real never goes on, and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import sys
import time
from collections.abc import Generator, Iterator
from typing import Any

from pyworkflow_ray.engine.loop import _enter_task, _leave_task
from pyworkflow_ray.errors import PyWorkflowError

_RESOLUTION_S = 1e-6  # timers nearer than this are due: sums of floats differ by less
_BREATH = 500  # iterations of one burst, after which the outer loop has its turn


class RealWaitError(PyWorkflowError):
    """A step really waited, for a thread or for the network, longer than the environment allows."""


class NothingDueError(Exception):
    """Nothing is due, nothing runs: internal, the environment says what was waited for."""


class _Selector(selectors.DefaultSelector):
    """Never blocks. `wait` is what the loop would have waited for: None for ever, 0 when something is ready."""

    def __init__(self) -> None:
        super().__init__()
        self.loop: VirtualLoop | None = None
        self.idle = False
        self.wait: float | None = None
        self.iterations = 0
        self.brought = False

    def select(self, timeout: float | None = None) -> Any:
        self.iterations += 1
        self.idle = timeout is None or timeout > 0
        self.wait = timeout
        if self.loop is not None and (self.idle or self.iterations > _BREATH):
            self.loop.stop()
        found = super().select(0)
        self.brought = self.brought or bool(found)
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module. `time()` begins at 0.

    Args:
        io_wait_s: With open sockets the clock jumps only after so much real quiet.
        real_wait_s: A thread or socket that brings nothing for so long is an error.
    """

    def __init__(self, *, io_wait_s: float, real_wait_s: float) -> None:
        self._now_s = 0.0
        self._polled = _Selector()
        self._threads = 0
        self._io_wait_s = io_wait_s
        self._real_wait_s = real_wait_s
        super().__init__(self._polled)
        self._polled.loop = self
        self._clock_resolution = _RESOLUTION_S
        self._own_sockets = len(self._polled.get_map())

    def time(self) -> float:
        return self._now_s

    def pass_time(self, seconds: float) -> None:
        """Code blocks the loop for `seconds`."""
        self._now_s += seconds

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        future = super().run_in_executor(executor, func, *args)
        self._threads += 1
        future.add_done_callback(self._thread_ended)
        return future

    def _thread_ended(self, _: Any) -> None:
        self._threads -= 1

    # Driving it -------------------------------------------------------------------------------------------------

    async def drive_async(self, until: asyncio.Future[Any], *, not_after: float | None = None) -> None:
        """Go on until `until` is done, or the clock has come to `not_after`.

        Raises:
            RealWaitError: something real takes too long.
            NothingDueError: `until` will never be done.
        """
        for pause_s in self._drive(until, not_after):
            await asyncio.sleep(pause_s)

    def drive(self, until: asyncio.Future[Any], *, not_after: float | None = None) -> None:
        """As `drive_async`, blocking the thread."""
        for pause_s in self._drive(until, not_after):
            if pause_s:
                time.sleep(pause_s)

    def _drive(self, until: asyncio.Future[Any], not_after: float | None) -> Iterator[float]:
        """Yields how long to pause, really, before it goes on."""
        yield 0.0  # what the test has started beside this begins before the clock moves
        while True:
            self._burst()
            if until.done():
                return
            if not self._polled.idle:
                yield 0.0
                continue
            yield from self._wait_for_real(until)
            if until.done() or not self._polled.idle:
                continue
            wait = self._polled.wait
            if not_after is not None and (wait is None or self._now_s + wait > not_after + _RESOLUTION_S):
                self._now_s = max(self._now_s, not_after)
                return
            if wait is None:
                yield from self._last_chance(until)
                if not until.done() and self._polled.idle and self._polled.wait is None:
                    raise NothingDueError
                continue
            self._now_s += wait

    def _last_chance(self, until: asyncio.Future[Any]) -> Iterator[float]:
        """Something outside may still bring what is waited for: another task of the test, say."""
        for _ in range(20):
            yield 0.001
            self._burst()
            if until.done() or not self._polled.idle or self._polled.wait is not None:
                return

    def _wait_for_real(self, until: asyncio.Future[Any]) -> Iterator[float]:
        """Threads and sockets have the time they need; the clock stands still."""
        quiet_since = time.monotonic()
        pause_s = 0.0005
        while not until.done() and self._polled.idle:
            sockets = len(self._polled.get_map()) > self._own_sockets
            quiet_s = time.monotonic() - quiet_since
            if not self._threads and (not sockets or (quiet_s >= self._io_wait_s and self._polled.wait is not None)):
                return
            if quiet_s > self._real_wait_s:
                what = "a thread" if self._threads else "the network"
                raise RealWaitError(
                    f"nothing has happened for {self._real_wait_s:g} s of real time: a step waits for {what}. Let the "
                    "test's double answer at once, or allow more: WorkflowEnv(real_wait=...)"
                )
            yield pause_s
            pause_s = min(0.005, pause_s * 2)
            self._burst()
            if self._polled.brought or not self._polled.idle:
                quiet_since, pause_s = time.monotonic(), 0.0005

    def _burst(self) -> None:
        """Run what is ready, and what becomes ready by it, until nothing is (or for long enough)."""
        polled = self._polled
        polled.iterations, polled.brought, polled.idle = 0, False, False
        with outside_loop():
            self.run_forever()
        # what was made ready in the iteration that ended the burst (a socket's data) runs in the next one
        if polled.idle and polled.brought:
            polled.idle = False

    def finish(self) -> None:
        """Cancel what is left, and close."""
        with outside_loop():
            left = asyncio.all_tasks(self)
        for task in left:
            task.cancel()
        if left:
            with contextlib.suppress(NothingDueError, RealWaitError):
                self.drive(self._all(left), not_after=self._now_s + 10.0)
        for task in left:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        with outside_loop():
            self._polled.loop = None
            self.close()

    def _all(self, tasks: set[asyncio.Task[Any]]) -> asyncio.Future[Any]:
        return self.create_task(self._wait(tasks))

    async def _wait(self, tasks: set[asyncio.Task[Any]]) -> None:
        await asyncio.wait(tasks)


@contextlib.contextmanager
def outside_loop() -> Generator[None]:
    """Within it no loop is running in this thread, as asyncio sees it: another one may be run."""
    outer = asyncio._get_running_loop()
    task = _leave_task(outer)
    hooks = sys.get_asyncgen_hooks()
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(outer)
        sys.set_asyncgen_hooks(*hooks)
        _enter_task(outer, task)
