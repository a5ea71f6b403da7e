"""A breaker that lives in this process alone: where Ray is not initialised, and in the test environment.

Called by guarded calls through the protocol `permits.Circuit`; calls the state machine. Safe for threads; nothing of a
user's runs under its lock: listeners and hooks are told after it is released, in the thread that made the change.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from pyworkflow_ray.execution.permits import (
    _HELD,
    Permit,
    WatchedPermit,
    changed,
    listened,
    opened,
    plain_permit,
    refusal,
    riding,
)
from pyworkflow_ray.resilience.breaker import Answer, Breaker, BreakerEvent, BreakerSettings, BreakerState, Counts, View
from pyworkflow_ray.resilience.breaker_settings import split_name
from pyworkflow_ray.resilience.mirror import Asker
from pyworkflow_ray.resilience.waiters import Waiters

_FAILURE = BreakerEvent.FAILURE


class LocalCircuit:
    """One breaker of this process (protocol `Circuit`). One process is one node: `min_nodes` is met by any failure."""

    def __init__(
        self,
        full: str,
        settings: BreakerSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        counts: Counts | None = None,
    ) -> None:
        self.full = full
        self.name, self.key = split_name(full)
        self.counts = counts
        self.clock = clock
        self._lock = threading.Lock()
        self._breaker = Breaker(_of_one_node(settings), lease_s=None)
        self._waiters = Waiters()
        # Read without the lock:
        self.slow_s: float | None
        self.quiet: bool
        self._free: bool  # closed, without a ramp
        self._plain: bool  # and without a clock
        self._generation: int
        self._publish()

    @property
    def idle(self) -> bool:
        return self._breaker.idle and not self._waiters and self._free

    def enter(self, news: int = 0, waits: Asker | None = None) -> Permit:
        permit = riding(self)
        if permit is not None:
            return permit
        # Closed needs no lock. The generation is read first: if the state changes in between, the call is a late one.
        generation = self._generation
        if self._free and waits is None:
            return plain_permit(self, generation) if self._plain else WatchedPermit(self, generation)

        def ask(now: float) -> Answer:
            answer = self._breaker.ask(now)
            if waits is not None:
                answer = self._waiters.answered(waits, answer, self._breaker, now)
            return answer

        answer, view = self._change(ask)
        if not answer.admitted:
            rest = answer.retry_after_s if view.ramp is not None else view.open_for_s
            raise refusal(self, view, rest, None if waits is None else answer.retry_after_s)
        return WatchedPermit(self, answer.generation, answer.permit)

    def enter_frame(self) -> Permit:
        generation = self._generation
        last = _HELD.get()
        within = last is not None and not (last.ended and last.around is None)
        if self._plain and not within:
            permit = Permit()
            permit.circuit = self
            permit.generation = generation
            permit.around = None
            permit.ended = False
            return permit
        return self.enter()

    async def enter_async(self, news: int = 0, waits: Asker | None = None) -> Permit:
        return self.enter(news, waits)

    def tell(self, permit: Permit, event: BreakerEvent, error: str, slow: bool = False) -> Future[None] | None:
        probes = permit.number is not None
        if not probes and not slow and (self.quiet or event is not BreakerEvent.SUCCESS) and event is not _FAILURE:
            return None
        generation, breaker = permit.generation, self._breaker
        assert generation is not None
        self._change(
            lambda now: breaker.ended(event, now, generation=generation, permit=permit.number, error=error, slow=slow)
        )
        return None

    def wait(self, told: Future[None]) -> None:
        raise AssertionError("a breaker in process has nothing to wait for")

    async def wait_async(self, told: Future[None]) -> None:
        self.wait(told)

    def look(self) -> View:
        return self._change(lambda now: None)[1]

    def known(self) -> View:
        with self._lock:
            return self._breaker.view(self.clock())

    def force(self, event: BreakerEvent) -> None:
        self._change(lambda now: self._breaker.force(event, now))

    def configure(self, changes: dict[str, Any]) -> None:
        changes.pop("min_nodes", None)
        self._change(lambda now: self._breaker.configure(changes, now))

    def adopt(self, view: View, open_until: float | None) -> None:
        """Begin with a state that was the cluster's; permits that are out there are not out here."""
        now = self.clock()
        rest = view.open_for_s if open_until is None else max(0.0, open_until - now)
        state = BreakerState.OPEN if view.state is BreakerState.HALF_OPEN else view.state
        began = replace(view, state=state, open_for_s=rest, permits=(), nodes=(), configured=None)
        self._change(lambda now: self._breaker.adopt(began, now), quiet=True)

    def _change(self, change: Callable[[float], Any], *, quiet: bool = False) -> tuple[Any, View]:
        """Do it under the lock, then tell who listens."""
        with self._lock:
            now, was = self.clock(), self._breaker.state
            try:
                result = change(now)
            finally:
                view = self._breaker.view(now)
                self._publish()
        if view.state is not was and not quiet:
            if was is BreakerState.CLOSED and view.state is BreakerState.OPEN:
                opened(self.name, self.key, view)
            if listened(self.name):
                changed(self.name, self.key, was, view)
        return result, view

    def _publish(self) -> None:
        """What calls read without the lock; the lock is held.

        The generation last: a call that begins in a generation must have been let through in it.
        """
        breaker = self._breaker
        state, settings = breaker.state, breaker.settings
        self._free = state is BreakerState.FORCED_CLOSED or (state is BreakerState.CLOSED and breaker.ramp is None)
        self.slow_s = settings.slow_call_duration
        self._plain = self._free and self.slow_s is None
        self.quiet = state is BreakerState.FORCED_CLOSED or not (breaker.failures or settings.windowed)
        self._generation = breaker.generation


def _of_one_node(settings: BreakerSettings) -> BreakerSettings:
    return settings if settings.min_nodes == 1 else replace(settings, min_nodes=1)
