"""A cluster's circuit breaker, or a key of it, seen from one process: the shell of `resilience.mirror.Mirror`.

Called by guarded calls through the protocol `permits.Circuit`; made by `breaker_actor`; calls `breaker_channel`, whose
thread does all that concerns Ray: a user's thread only reads the mirror, or waits for that thread.

Faults:

* The actor dies: until it is back a closed mirror lets calls through, an open one refuses, a counted failure and a
  probe wait (`WAIT_S` at most) and go on with what is known.
* It stays away: from then on this process decides by its own evidence, from the state that it knew; said once.
* Ray is shut down, or another is initialised: the link ends, what waits for it goes on.
* This process dies: its permits' leases end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from pyworkflow_ray.engine.calls import StepCall
from pyworkflow_ray.execution.breakers import CircuitGuard, LocalCircuit, conflict_error
from pyworkflow_ray.execution.permits import _HELD, Permit, WatchedPermit, plain_permit, refusal, riding
from pyworkflow_ray.resilience.breaker import Answer, BreakerEvent, BreakerSettings, BreakerState, Counts, View
from pyworkflow_ray.resilience.breaker_settings import split_name
from pyworkflow_ray.resilience.mirror import Asker, Mirror, Reply, Report
from pyworkflow_ray.runtime.breaker_channel import Channel, given, resolve, session_id
from pyworkflow_ray.runtime.breaker_page import Page

__all__ = ["WAIT_S", "Link", "guard_of", "new_process_id", "session_id"]

log = logging.getLogger("pyworkflow_ray.breaker")

WAIT_S = 15.0  # longer than an actor takes to be made or made again on a busy machine
JOIN_WAIT_S = 1.0  # for a living actor's first answer; it takes some milliseconds
SESSION_CHECK_S = 0.1  # asking Ray who we are takes longer than a guarded call
FLUSH_S = 0.05  # successes that only rates are made of travel so often
_NEVER = memoryview(bytes(8)).cast("Q")  # a counter that stays 0


class Link:
    """This process's side of one breaker of the cluster (protocol `Circuit`).

    Args:
        full: Name, with the key where it is one.
        mirror: The pure part. Its `known` is read by any thread, all else by the channel's.
        counts: What counts in place of the taxonomy.
    """

    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, full: str, mirror: Mirror, channel: Channel, counts: Counts | None = None) -> None:
        self.full = full
        self.name, self.key = split_name(full)
        self.counts = counts
        self.mirror = mirror
        self.channel = channel
        self.permits: set[int] = set()
        self.used_at = time.monotonic()
        self.retired = False
        self.slow_s: float | None = None
        self.quiet = False
        self._plain: View | None = None
        self._page: Page | None = None
        self._counter: memoryview = _NEVER  # of changes that the page tells
        self._heeded = 0  # those of them that the mirror knows
        self.lives_until = self.used_at + SESSION_CHECK_S
        self._lock = threading.Lock()
        self._learning = threading.Lock()
        self._failures_told = 0  # told and not yet counted: meanwhile a success matters too
        self._passed: list[Permit] = []  # successes that nobody waits for
        self._joined: Future[None] = Future()  # done as well where there was nobody to join
        self._alone: LocalCircuit | None = None
        self.publish()
        channel.loop.call_soon_threadsafe(self._wake)

    # For guarded calls: any thread ---------------------------------------------------------------------------------

    def enter(self, news: int = 0, waits: Asker | None = None) -> Permit:
        permit = self._enter_freely(news, waits)
        if permit is not None:
            return permit
        if not self._joined.done():
            _wait_result(self._joined, JOIN_WAIT_S)
            self.join_is_over()
        if self.channel.down_since is not None:
            alone = self._on_its_own()
            if alone is not None:
                return alone.enter(news, waits)
        answer = self._check(news, waits)
        if answer is None:
            told, asked = self._counter[0], self._ask(news, waits)
            try:
                answer = _wait_result(asked, WAIT_S)
            finally:
                self._withdraw(asked, answer)
            self._heeded = self._heeded if answer is None else told
        return self._admit(answer, waits)

    async def enter_async(self, news: int = 0, waits: Asker | None = None) -> Permit:
        permit = self._enter_freely(news, waits)
        if permit is not None:
            return permit
        if not self._joined.done():
            await _await_result(self._joined, JOIN_WAIT_S)
            self.join_is_over()
        if self.channel.down_since is not None:
            alone = self._on_its_own()
            if alone is not None:
                return alone.enter(news, waits)
        answer = self._check(news, waits)
        if answer is None:
            told, asked = self._counter[0], self._ask(news, waits)
            try:
                answer = await _await_result(asked, WAIT_S)
            finally:
                self._withdraw(asked, answer)
            self._heeded = self._heeded if answer is None else told
        return self._admit(answer, waits)

    def enter_frame(self) -> Permit:
        view = self._plain
        last = _HELD.get()
        if (
            view is not None
            and self._counter[0] == self._heeded
            and (last is None or (last.ended and last.around is None))
        ):
            permit = Permit()
            permit.circuit = self
            permit.generation = view.generation
            permit.around = None
            permit.ended = False
            return permit
        return self.enter()

    def _enter_freely(self, news: int, waits: Asker | None) -> Permit | None:
        """Riding on a probe, or through a closed breaker: without a lock, a wait or a question. None: not so."""
        permit = riding(self)
        if permit is not None:
            return permit
        view = self._plain
        if view is None or self._counter[0] != self._heeded or news > view.heard or waits is not None:
            return None
        return plain_permit(self, view.generation)

    def tell(self, permit: Permit, event: BreakerEvent, error: str, slow: bool = False) -> Future[None] | None:
        probing = permit.number is not None or (permit.aside is not None and permit.aside[1] is not None)
        if not probing and not slow and event is not BreakerEvent.FAILURE:
            # Read without the lock: a failure of another call that is being told at this moment has not ended before.
            if event is not BreakerEvent.SUCCESS or self.quiet:
                return None
            if not self.mirror.known.view.failures and not self._failures_told:
                self._pass(permit)
                return None
        with self._lock:
            if event is BreakerEvent.FAILURE:
                self._failures_told += 1
                self.quiet = False
            report = Report(event, permit.generation, permit.number, error, slow, 1, permit.aside)
            told: Future[Any] = Future()
            # Under the lock, so that reports are queued in the order in which calls ended.
            self.channel.loop.call_soon_threadsafe(self._queue_report, report, told)
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
        self._do(self.mirror.look)
        return self.mirror.known.view

    def known(self) -> View:
        return self.mirror.known.view

    def force(self, event: BreakerEvent) -> None:
        self._do(lambda ticket: self.mirror.force(event, ticket))

    def configure(self, changes: dict[str, Any]) -> None:
        self._do(lambda ticket: self.mirror.configure(changes, ticket))

    def declare_anew(self, settings: BreakerSettings, counts: Counts | None) -> None:
        """A newer version of this process's code declares the breaker otherwise; returns once the actor knows."""
        self.mirror.settings, self.counts = settings, counts
        self.look()

    def close(self) -> None:
        """The Ray session has ended: let go of all that waits. Any thread."""
        self.channel.close()

    def serves(self) -> bool:
        """Whether this link still belongs to the Ray that this process is connected to; looked at now and then."""
        now = time.monotonic()
        if now < self.lives_until:
            return True
        if self.channel.closed or self.retired or not self.channel.session_lives():
            return False
        self.used_at, self.lives_until = now, now + SESSION_CHECK_S
        return True

    def retire(self) -> None:
        """Nobody has used this key for a while; whoever comes makes a new link."""
        self.retired, self.lives_until = True, 0.0

    def _check(self, news: int, waits: Asker | None) -> Answer | None:
        if self.mirror.conflict is not None:
            self._raise_conflict()
        if self._counter[0] != self._heeded and not self._heed():
            return None
        return self.mirror.check(time.monotonic(), news, waits=waits is not None)

    def _heed(self) -> bool:
        """Learn what the page tells. False: it can't be told from there, and the actor is to be asked."""
        with self._learning:
            page, told, mine = self._page, self._counter[0], self.mirror.known
            view = page.read(self.key) if page is not None and mine.joined else None
            if view is None or view.lineage != mine.view.lineage:
                return not mine.joined  # one that has not joined goes by what it counted itself
            self.mirror.learn(view, time.monotonic())
            self._heeded = told
        self.publish()
        return True

    def _ask(self, news: int, waits: Asker | None) -> Future[Answer | None]:
        asked: Future[Answer | None] = Future()
        self.channel.loop.call_soon_threadsafe(self._queue_ask, asked, news, waits or Asker())
        return asked

    def _withdraw(self, asked: Future[Answer | None], answer: Answer | None) -> None:
        """Whoever asked gives up without an answer: a permit that comes for it, or has just come, goes back."""
        if answer is None and not asked.cancel():
            late = asked.result()
            if late is not None and given(late) is not None:
                self.channel.loop.call_soon_threadsafe(self._give_back, late)

    def _admit(self, answer: Answer | None, waits: Asker | None) -> Permit:
        self._raise_conflict()
        known = self.mirror.known
        if answer is None:  # the actor does not answer: go on with what is known
            self._warn_unreachable()
            closed = known.view.state in (BreakerState.CLOSED, BreakerState.FORCED_CLOSED)
            answer = Answer(closed, known.view.generation if known.joined else None)
        if not answer.admitted:
            rest = answer.retry_after_s
            if known.view.state is BreakerState.OPEN and known.open_until is not None:
                rest = max(0.0, known.open_until - time.monotonic())
            elif known.view.state is BreakerState.HALF_OPEN:
                rest = 0.0
            elif known.view.state is BreakerState.FORCED_OPEN:
                rest = None
            raise refusal(self, known.view, rest, None if waits is None else answer.retry_after_s)
        return WatchedPermit(self, answer.generation, answer.permit, aside=answer.aside)

    def _on_its_own(self) -> LocalCircuit | None:
        """A breaker of this process, where the cluster's has been unreachable long; it begins with what is known."""
        if not self.channel.unreachable(time.monotonic(), WAIT_S):
            return None
        with self._lock:
            if self._alone is None:
                known = self.mirror.known
                self._alone = LocalCircuit(self.full, self.mirror.effective, counts=self.counts)
                self._alone.adopt(known.view, known.open_until)
        self._warn_unreachable()
        return self._alone

    def _pass(self, permit: Permit) -> None:
        self._passed.append(permit)
        if len(self._passed) == 1:
            self.channel.loop.call_soon_threadsafe(self.channel.loop.call_later, FLUSH_S, self._flush)

    def _do(self, queue: Callable[[Any], None]) -> None:
        """Have the actor do something, and wait until it has."""
        done: Future[Any] = Future()

        def begin() -> None:
            if self.channel.closed:
                resolve(done, None)
                return
            queue((done, BreakerEvent.ASK))
            self._wake()

        self.channel.loop.call_soon_threadsafe(begin)
        try:
            done.result(WAIT_S)
        except FutureTimeoutError:
            self._warn_unreachable()
        self._raise_conflict()

    def _raise_conflict(self) -> None:
        if self.mirror.conflict is not None:
            raise conflict_error(self.full, self.mirror.conflict, "in another process of the cluster")

    def join_is_over(self) -> None:
        resolve(self._joined, None)

    def _warn_unreachable(self) -> None:
        if not self.channel.warned and not self.channel.closed:
            self.channel.warned = True
            log.warning("circuit breaker %r: its actor does not answer; its last known state is used", self.name)

    # In the channel's thread -----------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self.channel.wake(self)

    def _queue_report(self, report: Report, told: Future[Any]) -> None:
        self.permits.discard(report.permit or 0)
        if report.aside is not None:
            self.permits.discard(report.aside[1] or 0)
        if self.channel.closed:
            resolve(told, None)
            return
        self._flush()
        self.mirror.report(report, (told, report.event))
        self._wake()

    def _flush(self) -> None:
        """Successes that have gathered travel as one, those of one generation together."""
        passed, self._passed = self._passed, []
        counts: dict[tuple[int | None, Any], int] = {}
        for permit in passed:
            which = (permit.generation, permit.aside)
            counts[which] = counts.get(which, 0) + 1
        for (generation, aside), count in counts.items():
            self.mirror.report(Report(BreakerEvent.SUCCESS, generation, count=count, aside=aside))
        if counts and not self.channel.closed:
            self._wake()

    def _queue_ask(self, asked: Future[Any], news: int, asker: Asker) -> None:
        if self.channel.closed:
            resolve(asked, None)
            return
        self.mirror.ask((asked, BreakerEvent.ASK), news, asker)
        self._wake()

    def _give_back(self, answer: Answer) -> None:
        permit = given(answer)
        if permit is not None and not self.channel.closed:
            self.permits.discard(permit)
            self.mirror.report(Report(BreakerEvent.RELEASE, answer.generation, answer.permit, aside=answer.aside))
            self._wake()

    def look_at(self, page: Page | None) -> None:
        """From now on calls look at this page of the actor's."""
        with self._learning:
            self._page = page
            self._heeded, self._counter = 0, _NEVER if page is None else page.counter(self.key)

    def learn(self, view: View, now: float) -> None:
        with self._learning:
            self.mirror.learn(view, now)
        self.publish()

    def receive(self, reply: Reply, now: float) -> None:
        self._alone = None
        self.channel.warned = False
        with self._learning:
            received = self.mirror.receive(reply, now)
        for (future, event), answer in received:
            if event is BreakerEvent.FAILURE:
                with self._lock:
                    self._failures_told -= 1
            permit = given(answer)
            if permit is not None:
                self.permits.add(permit)
            if not resolve(future, answer) and answer is not None:
                self._give_back(answer)  # whoever asked has given up
        self.publish()
        self.join_is_over()

    def publish(self) -> None:
        """What calls read without a lock and without asking the mirror. Plain: closed, for all, and without a clock."""
        mirror = self.mirror
        known = mirror.known
        self.slow_s = mirror.effective.slow_call_duration
        plain = known.joined and known.free and self.slow_s is None and mirror.conflict is None
        plain = plain and self.channel.down_since is None
        with self._lock:
            self.quiet = not self._failures_told and not mirror.matters(BreakerEvent.SUCCESS, None)
        self._plain = known.view if plain else None

    def let_go(self) -> None:
        """The channel has ended."""
        self.lives_until, self._plain = 0.0, None
        for ticket in self.mirror.abandon():
            resolve(ticket[0], None)
        self.join_is_over()


def guard_of(call: StepCall) -> CircuitGuard | None:
    """`breaker_actor.guard_for`, for callers that load breakers only when a call has one."""
    from pyworkflow_ray.runtime.breaker_actor import guard_for

    return guard_for(call)


def new_process_id() -> str:
    return f"{os.getpid()}-{uuid.uuid4().hex[:12]}"


def _wait_result(future: Future[Any], timeout_s: float) -> Any:
    try:
        return future.result(timeout_s)
    except FutureTimeoutError:
        return None


async def _await_result(future: Future[Any], timeout_s: float) -> Any:
    waiter = asyncio.wrap_future(_follow(future))
    done, _ = await asyncio.wait([waiter], timeout=timeout_s)
    return waiter.result() if done else None


def _follow(future: Future[Any]) -> Future[Any]:
    """A future that follows `future`, and whose cancelling does not cancel it."""
    follower: Future[Any] = Future()
    future.add_done_callback(lambda done: resolve(follower, None if done.cancelled() else done.result()))
    return follower
