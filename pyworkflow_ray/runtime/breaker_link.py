"""A cluster's circuit breaker, seen from one process: the shell of `resilience.mirror.Mirror`.

Called by `runtime.breaker_actor` (which hands in how to reach the actor), and through the `Circuit` protocol by
guarded calls. One daemon thread a process, with an event loop, does all that concerns Ray for all breakers: a user's
thread only reads the mirror, or waits for that thread.

Faults:

* The actor dies: it restarts, or is made again, and each process shows it what it knew. Until then a closed mirror
  lets calls through, an open one refuses, a counted failure and a probe wait (`WAIT_S` at most) and go on with what is
  known.
* A message or its answer is lost: it is sent again, and counts once.
* Ray is shut down, or another is initialised: the link ends, what waits for it goes on.
* This process dies: its permit's lease ends.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import ray

from pyworkflow_ray.engine.calls import StepCall
from pyworkflow_ray.execution.breakers import CircuitGuard, Permit, conflict_error, log_opened, refusal, riding
from pyworkflow_ray.resilience.breaker import PERMIT_LEASE_S, Answer, BreakerEvent, BreakerState, View
from pyworkflow_ray.resilience.mirror import Message, Mirror, Report

log = logging.getLogger("pyworkflow_ray.breaker")

WAIT_S = 15.0  # longer than an actor takes to be made or made again on a busy machine
JOIN_WAIT_S = 1.0  # for a living actor's first answer; it takes some milliseconds
CALL_TIMEOUT_S = 10.0
WATCH_S = 30.0
SESSION_CHECK_S = 0.1  # asking Ray who we are takes longer than a guarded call
BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)


class Link:
    """This process's side of one breaker of the cluster (protocol `Circuit`).

    Args:
        mirror: The pure part. Its `known` is read by any thread, all else by the loop's thread.
        find: The breaker's actor, None where there is none. Loop's thread.
        make: Make it. Loop's thread.
        session: Identity of the Ray session that the link belongs to.
    """

    def __init__(
        self, name: str, mirror: Mirror, find: Callable[[], Any], make: Callable[[Mirror], Any], session: str
    ) -> None:
        self.name = name
        self.session = session
        self._mirror = mirror
        self._find = find
        self._make = make
        self._lives_until = time.monotonic() + SESSION_CHECK_S
        self._actor: Any = None
        self._lock = threading.Lock()
        self._failures_told = 0  # told and not yet counted: meanwhile a success matters too
        self._permits: set[int] = set()
        self._joined: Future[None] = Future()  # done as well where there was nobody to join
        self._closed = False
        self._warned = False
        self._loop = _loop()
        self._tasks: list[asyncio.Task[None]] = []
        self._wake: asyncio.Event
        self._loop.call_soon_threadsafe(self._start)

    # For guarded calls: any thread ---------------------------------------------------------------------------------

    def enter(self, news: int = 0) -> Permit:
        permit = riding(self)
        if permit is not None:
            return permit
        if not self._joined.done():
            self._wait_result(self._joined, JOIN_WAIT_S)
            self._join_is_over()
        answer = self._check(news)
        if answer is None:
            asked = self._ask(news)
            try:
                answer = self._wait_result(asked, WAIT_S)
            finally:
                self._withdraw(asked, answer)
        return self._admit(answer)

    async def enter_async(self, news: int = 0) -> Permit:
        permit = riding(self)
        if permit is not None:
            return permit
        if not self._joined.done():
            await _await_result(self._joined, JOIN_WAIT_S)
            self._join_is_over()
        answer = self._check(news)
        if answer is None:
            asked = self._ask(news)
            try:
                answer = await _await_result(asked, WAIT_S)
            finally:
                self._withdraw(asked, answer)
        return self._admit(answer)

    def tell(self, permit: Permit, event: BreakerEvent, error: str) -> Future[None] | None:
        with self._lock:
            if not (
                self._mirror.matters(event, permit.number) or (self._failures_told and event is BreakerEvent.SUCCESS)
            ):
                return None
            if event is BreakerEvent.FAILURE:
                self._failures_told += 1
            report = Report(event, permit.generation, permit.number, error)
            told: Future[Any] = Future()
            # Under the lock, so that reports are queued in the order in which calls ended.
            self._loop.call_soon_threadsafe(self._queue_report, report, told)
        return None if event is BreakerEvent.RELEASE else told  # nobody waits who was cancelled

    def wait(self, told: Future[None]) -> None:
        try:
            told.result(WAIT_S)
        except FutureTimeoutError:
            self._warn_unreachable()

    async def wait_async(self, told: Future[None]) -> None:
        done, _ = await asyncio.wait([asyncio.wrap_future(told)], timeout=WAIT_S)
        if not done:
            self._warn_unreachable()

    def look(self) -> View:
        asked: Future[Any] = Future()
        self._loop.call_soon_threadsafe(self._queue_look, asked)
        try:
            asked.result(WAIT_S)
        except FutureTimeoutError:
            self._warn_unreachable()
        self._raise_conflict()
        return self._mirror.known.view

    def known(self) -> View:
        return self._mirror.known.view

    def close(self) -> None:
        """The Ray session has ended: let go of all that waits. Any thread."""
        self._loop.call_soon_threadsafe(self._close)

    def serves(self) -> bool:
        """Whether this link still belongs to the Ray that this process is connected to; looked at now and then."""
        now = time.monotonic()
        if now >= self._lives_until:
            if not self._session_lives():
                return False
            self._lives_until = now + SESSION_CHECK_S
        return not self._closed

    def _check(self, news: int) -> Answer | None:
        self._raise_conflict()
        return self._mirror.check(time.monotonic(), news)

    def _ask(self, news: int) -> Future[Answer | None]:
        asked: Future[Answer | None] = Future()
        self._loop.call_soon_threadsafe(self._queue_ask, asked, news)
        return asked

    def _withdraw(self, asked: Future[Answer | None], answer: Answer | None) -> None:
        """Whoever asked gives up without an answer: a permit that comes for it, or has just come, goes back."""
        if answer is None and not asked.cancel():
            late = asked.result()
            if late is not None and late.permit is not None:
                self._loop.call_soon_threadsafe(self._give_back, late)

    def _admit(self, answer: Answer | None) -> Permit:
        self._raise_conflict()
        known = self._mirror.known
        if answer is None:  # the actor does not answer: go on with what is known
            self._warn_unreachable()
            closed = known.view.state is BreakerState.CLOSED
            answer = Answer(closed, known.view.generation if known.joined else None)
        if not answer.admitted:
            rest = known.open_until - time.monotonic() if known.view.state is BreakerState.OPEN else 0.0
            raise refusal(self.name, known.view, rest)
        return Permit(self, answer.generation, answer.permit)

    def _raise_conflict(self) -> None:
        if self._mirror.conflict is not None:
            raise conflict_error(self.name, self._mirror.conflict, "in another process of the cluster")

    def _wait_result(self, future: Future[Any], timeout_s: float) -> Any:
        try:
            return future.result(timeout_s)
        except FutureTimeoutError:
            return None

    def _join_is_over(self) -> None:
        _resolve(self._joined, None)

    def _warn_unreachable(self) -> None:
        if not self._warned and not self._closed:
            self._warned = True
            log.warning("circuit breaker %r: its actor does not answer; its last known state is used", self.name)

    # In the loop's thread --------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._wake = asyncio.Event()
        self._tasks = [self._loop.create_task(work()) for work in (self._serve, self._watch, self._renew)]

    def _queue_report(self, report: Report, told: Future[Any]) -> None:
        if report.permit is not None:
            self._permits.discard(report.permit)
        if self._closed:
            _resolve(told, None)
            return
        self._mirror.report(report, (told, report.event))
        self._wake.set()

    def _queue_ask(self, asked: Future[Any], news: int) -> None:
        if self._closed:
            _resolve(asked, None)
            return
        self._mirror.ask((asked, BreakerEvent.ASK), news)
        self._wake.set()

    def _queue_look(self, asked: Future[Any]) -> None:
        if self._closed:
            _resolve(asked, None)
            return
        self._mirror.look((asked, BreakerEvent.ASK))
        self._wake.set()

    def _give_back(self, answer: Answer) -> None:
        if answer.permit is not None and not self._closed:
            self._permits.discard(answer.permit)
            self._mirror.report(Report(BreakerEvent.RELEASE, answer.generation, answer.permit))
            self._wake.set()

    async def _serve(self) -> None:
        failed = 0
        while not self._closed:
            message = self._mirror.next_message()
            if message is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                reply = await self._send(message)
            except Exception as error:
                if not self._session_lives():
                    self._close()
                    return
                log.debug("circuit breaker %r: no answer from its actor: %r", self.name, error)
                self._actor = None
                await asyncio.sleep(BACKOFF_S[min(failed, len(BACKOFF_S) - 1)])
                failed += 1
                continue
            failed = 0
            self._warned = False
            if reply.opened:
                log_opened(self.name, reply.view)
            for ticket, answer in self._mirror.receive(reply, time.monotonic()):
                self._answer(ticket, answer)
            _resolve(self._joined, None)

    async def _send(self, message: Message) -> Any:
        if not self._session_lives():
            raise ConnectionError("Ray is not initialised any more")
        if self._actor is None:
            self._actor = self._find()
        if self._actor is None:
            _resolve(self._joined, None)  # nobody to join: calls pass while the actor is made
            self._actor = self._make(self._mirror)
        return await asyncio.wait_for(
            asyncio.wrap_future(self._actor.exchange.remote(message).future()), CALL_TIMEOUT_S
        )

    def _answer(self, ticket: Any, answer: Answer | None) -> None:
        future, event = ticket
        if event is BreakerEvent.FAILURE:
            with self._lock:
                self._failures_told -= 1
        if answer is not None and answer.permit is not None:
            self._permits.add(answer.permit)
        if not _resolve(future, answer) and answer is not None:
            self._give_back(answer)  # whoever asked has given up

    async def _watch(self) -> None:
        """Hear of changes: a call that the actor answers when its state differs from what we know."""
        while not self._closed:
            if self._actor is None or not self._mirror.known.joined:
                await asyncio.sleep(0.05)
                continue
            try:
                if not self._session_lives():
                    self._close()
                    return
                seen = self._actor.watch.remote(self._mirror.known.view, WATCH_S)
                view = await asyncio.wait_for(asyncio.wrap_future(seen.future()), WATCH_S + CALL_TIMEOUT_S)
                self._mirror.learn(view, time.monotonic())
            except Exception as error:
                log.debug("circuit breaker %r: watching its actor failed: %r", self.name, error)
                self._mirror.look()  # finds the actor again, and shows it what we know
                self._wake.set()
                await asyncio.sleep(0.2)

    async def _renew(self) -> None:
        while not self._closed:
            await asyncio.sleep(PERMIT_LEASE_S / 3)
            for permit in self._permits:
                self._mirror.renew(permit)
            if self._permits:
                self._wake.set()

    def _session_lives(self) -> bool:
        return session_id() == self.session

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._actor = None
        for ticket in self._mirror.abandon():
            _resolve(ticket[0], None)
        _resolve(self._joined, None)
        for task in self._tasks:
            task.cancel()


def guard_of(call: StepCall) -> CircuitGuard | None:
    """`breaker_actor.guard_for`, for callers that load breakers only when a call has one."""
    from pyworkflow_ray.runtime.breaker_actor import guard_for

    return guard_for(call)


def session_id() -> str | None:
    """Identity of this process's connection to Ray; None without one. Never initialises Ray."""
    if not ray.is_initialized():
        return None
    try:
        return str(ray.get_runtime_context().get_worker_id())
    except Exception:  # it was shut down just now
        return None


def new_process_id() -> str:
    return f"{os.getpid()}-{uuid.uuid4().hex[:12]}"


def _resolve(future: Future[Any], value: Any) -> bool:
    """Set the result; False where its waiter had given up."""
    with _RESOLVE_LOCK:
        if future.cancelled():
            return False
        if not future.done():
            future.set_result(value)
        return True


async def _await_result(future: Future[Any], timeout_s: float) -> Any:
    waiter = asyncio.wrap_future(_follow(future))
    done, _ = await asyncio.wait([waiter], timeout=timeout_s)
    return waiter.result() if done else None


def _follow(future: Future[Any]) -> Future[Any]:
    """A future that follows `future`, and whose cancelling does not cancel it."""
    follower: Future[Any] = Future()
    future.add_done_callback(lambda done: _resolve(follower, None if done.cancelled() else done.result()))
    return follower


# The thread -------------------------------------------------------------------------------------------------------

_RESOLVE_LOCK = threading.RLock()
_THREAD_LOCK = threading.Lock()
_THREAD: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None


def _loop() -> asyncio.AbstractEventLoop:
    """The loop of this process's breaker thread; a forked child gets its own."""
    global _THREAD
    with _THREAD_LOCK:
        if _THREAD is None:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="pyworkflow-ray breakers", daemon=True)
            thread.start()
            _THREAD = (loop, thread)
            atexit.register(_stop, *_THREAD)  # runs before Ray's own, which was registered earlier
        return _THREAD[0]


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if thread.is_alive():
        loop.call_soon_threadsafe(loop.stop)
        thread.join(1.0)


def _forget_thread() -> None:
    global _THREAD, _THREAD_LOCK
    _THREAD, _THREAD_LOCK = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_thread)
