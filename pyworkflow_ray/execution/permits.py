"""Guarded calls: what a breaker is to the code that calls through it, and one call from its admission to its end.

Used by `local_breaker` and `runtime.breaker_link`, which implement `Circuit`, and by whoever makes a guarded call;
calls `resilience.breaker` and the hooks.

Faults: a call can end in any way, by a BaseException as well, and its waiting for the breaker can be interrupted by
one; the end is always told before it is waited for. A guarded call that is never ended keeps a permit for ever in
process, and for a lease in a cluster. A predicate of the user's that raises is logged, and the taxonomy decides.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, Protocol

from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.errors import CircuitOpenError
from pyworkflow_ray.execution.hooks import BreakerOpenEvent, hooked, tell
from pyworkflow_ray.resilience.breaker import BreakerEvent, BreakerState, Counts, View, error_text, event_of
from pyworkflow_ray.resilience.breaker_settings import full_name
from pyworkflow_ray.resilience.mirror import Asker
from pyworkflow_ray.resilience.taxonomy import classify

log = logging.getLogger("pyworkflow_ray.breaker")

# The guarded call that began last in this context; it knows the one around it.
_HELD: ContextVar[Permit | None] = ContextVar("pyworkflow_ray_held_permits", default=None)
_GUARDS: set[CodeType] = set()
_SUCCESS = BreakerEvent.SUCCESS  # looked up once: an enum's member costs as much as a dictionary's item twice over
_MAX_CHAIN = 100  # an exception's chain is followed so far


class Circuit(Protocol):
    """A breaker as a process sees it: in process (`LocalCircuit`) or of the cluster (`runtime.breaker_link.Link`).

    full: name and key in one. slow_s: how long a slow call takes, None where nobody asks. quiet: a success of a call
    that was no probe changes nothing now. counts: what counts in place of the taxonomy.
    """

    name: str
    key: str | None
    full: str
    counts: Counts | None
    clock: Callable[[], float]
    slow_s: float | None
    quiet: bool

    def enter(self, news: int = 0, waits: Asker | None = None) -> Permit:
        """Let a call through, or raise CircuitOpenError. May wait for the cluster, never for another call."""
        ...

    async def enter_async(self, news: int = 0, waits: Asker | None = None) -> Permit: ...

    def enter_frame(self) -> Permit:
        """`enter` for a call that is one frame of its thread's stack, whose code is `found_by_its_frame`: putting a
        permit into the context costs more than all the rest of a closed call."""
        ...

    def tell(self, permit: Permit, event: BreakerEvent, error: str, slow: bool = False) -> Future[None] | None:
        """A call ended. None: that is all; else a future that is done once the breaker has counted it."""
        ...

    def wait(self, told: Future[None]) -> None: ...

    async def wait_async(self, told: Future[None]) -> None: ...

    def look(self) -> View:
        """The state now, asked of whoever holds it."""
        ...

    def known(self) -> View:
        """The state as far as this process knows, without asking."""
        ...

    def force(self, event: BreakerEvent) -> None:
        """Force it open or closed, or reset it; returns once that holds."""
        ...

    def configure(self, changes: dict[str, Any]) -> None: ...


class Permit:
    """One guarded call through a closed breaker, from its admission to its end. Ended once; later ends are ignored.

    Of calls of one breaker within one another, a probe's inner calls ride on its permit (or they would wait for
    themselves), and a failure that an inner call has counted is not counted again by the call around it.

    It has no constructor: whoever makes one sets its fields, or a closed call would cost half as much again.

    around: the next call of its context that it is within. A context keeps its last call until the next one.
    """

    __slots__ = ("_counted", "around", "circuit", "ended", "generation")

    circuit: Circuit
    generation: int | None
    around: Permit | None
    ended: bool
    number: int | None = None
    aside: tuple[int, int | None] | None = None
    rides = False
    _began: float | None = None
    _counted: BaseException | None

    @property
    def name(self) -> str:
        return self.circuit.full

    @property
    def probes(self) -> bool:
        """Whether the call was let through to try out a service that was cut off."""
        return self.number is not None or self.rides

    def success(self) -> None:
        circuit = self.circuit
        if circuit.quiet and self.around is None:
            self.ended = True
        else:
            self.finish(None)

    def failure(self, kind: str, error: BaseException) -> None:
        """The call ended with `error`, of `kind` in the taxonomy; returns once the breaker has counted it."""
        told = self._fail(kind, error)
        if told is not None:
            self.circuit.wait(told)

    def release(self) -> None:
        """The call was cancelled: it counts for nothing."""
        told = self._end(BreakerEvent.RELEASE)
        if told is not None:
            self.circuit.wait(told)

    def finish(self, error: BaseException | None) -> None:
        """Success where `error` is None, else failure of the kind that the taxonomy gives."""
        told = self._end(_SUCCESS) if error is None else self._fail(classify(error), error)
        if told is not None:
            self.circuit.wait(told)

    async def finish_async(self, error: BaseException | None) -> None:
        told = self._end(_SUCCESS) if error is None else self._fail(classify(error), error)
        if told is not None:
            await self.circuit.wait_async(told)

    def _fail(self, kind: str, error: BaseException) -> Future[None] | None:
        event = self._event(kind, error)
        if event is BreakerEvent.FAILURE and not self.probes:
            counted = getattr(self, "_counted", None)
            if counted is not None and _in_chain(counted, error):
                event = BreakerEvent.RELEASE
            for outer in _enclosing(self):
                outer._counted = error
        return self._end(event, error_text(error))

    def _event(self, kind: str, error: BaseException) -> BreakerEvent:
        circuit = self.circuit
        try:
            return event_of(kind, error, counts=circuit.counts, name=circuit.name, key=circuit.key)
        except Exception:
            log.exception("circuit breaker %r: its counts= raised; the taxonomy decides", circuit.full)
            return event_of(kind, error, name=circuit.name, key=circuit.key)

    def _end(self, event: BreakerEvent, error: str = "") -> Future[None] | None:
        if self.ended:
            return None
        self.ended, self._counted = True, None
        if self.around is not None and _HELD.get() is self:
            _HELD.set(self.around)
        if self.rides:
            return None
        circuit = self.circuit
        if self._began is None or circuit.slow_s is None or event is BreakerEvent.RELEASE:
            return circuit.tell(self, event, error)
        took_s = circuit.clock() - self._began
        slow = took_s >= circuit.slow_s
        if slow and not error:
            error = f"a slow call ({format_duration(took_s)})"
        return circuit.tell(self, event, error, slow)


def plain_permit(circuit: Circuit, generation: int) -> Permit:
    """Of a call through a closed breaker that nobody times; kept in the context."""
    permit = Permit()
    permit.circuit = circuit
    permit.generation = generation
    permit.around = surrounding()
    permit.ended = False
    _HELD.set(permit)
    return permit


class WatchedPermit(Permit):
    """A guarded call that is timed, or that probes.

    number: of a probe's permit. aside: of a node's own breaker. rides: on the permit of the call around it.
    """

    __slots__ = ("_began", "aside", "number", "rides")

    def __init__(
        self,
        circuit: Circuit,
        generation: int | None,
        number: int | None = None,
        *,
        rides: bool = False,
        aside: tuple[int, int | None] | None = None,
    ) -> None:
        self.circuit = circuit
        self.generation = generation
        self.around = surrounding()
        self.ended = False
        self.number = number
        self.aside = aside
        self.rides = rides
        self._began = None if circuit.slow_s is None else circuit.clock()
        _HELD.set(self)

    def success(self) -> None:
        self.finish(None)


def surrounding() -> Permit | None:
    """The guarded call that the running code is in, of any breaker, None outside one.

    Those that have ended are taken out of the chain, so that it never grows with calls that overlap.
    """
    permit = _HELD.get()
    while permit is not None and permit.ended:
        permit = permit.around
    if permit is not None:
        while permit.around is not None and permit.around.ended:
            permit.around = permit.around.around
    return permit


def _within(permit: Permit | None, full: str) -> Iterator[Permit]:
    """The guarded calls of the breaker from `permit` outwards."""
    while permit is not None:
        if not permit.ended and permit.name == full:
            yield permit
        permit = permit.around


def held(full: str) -> Permit | None:
    """The innermost guarded call of the breaker that the running code is in."""
    return next(_within(_HELD.get(), full), None)


def found_by_its_frame(guard: CodeType) -> None:
    """Calls of this code are guarded and keep their permit in the variable `permit`, not in the context."""
    _GUARDS.add(guard)


def _enclosing(permit: Permit) -> Iterator[Permit]:
    """The guarded calls of its breaker that the end of a call is within."""
    for outer in _within(_HELD.get(), permit.name):
        if outer is not permit:
            yield outer
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _GUARDS:
            outer = frame.f_locals["permit"]
            if outer is not permit and not outer.ended and outer.name == permit.name:
                yield outer
        frame = frame.f_back


def riding(circuit: Circuit) -> Permit | None:
    """A permit that rides on the probe which the running code is in; None outside one."""
    if _HELD.get() is None:
        return None
    outer = held(circuit.full)
    if outer is not None and outer.probes:
        return WatchedPermit(circuit, outer.generation, None, rides=True)
    return None


def _in_chain(wanted: BaseException, error: BaseException | None) -> bool:
    for _ in range(_MAX_CHAIN):
        if error is None or error is wanted:
            break
        error = error.__cause__ or error.__context__
    return error is wanted


def refusal(
    circuit: Circuit, view: View, open_for_s: float | None, ask_again_s: float | None = None
) -> CircuitOpenError:
    """The error of a refused call, made once, at the user's border.

    ask_again_s: of a caller that waits: when it is to ask again.
    """
    why = f": {view.reason}" if view.reason else ""
    sick = view.state is BreakerState.CLOSED and view.ramp is None
    state = view.state.value
    if view.state is BreakerState.FORCED_OPEN:
        then = "; it stays so until somebody resets it"
    elif view.state is BreakerState.CLOSED and view.ramp is not None:
        state, then = "closing", f"; it lets {view.ramp:.0%} of the calls through for now"
    elif open_for_s is not None and open_for_s > 0:
        then = f"; a call may try again in {format_duration(open_for_s)}"
    else:
        then = "; another call is trying the service out"
    if sick and view.nodes:
        state, why = "open on this node", f": {view.nodes[0][1].reason}"
    error = CircuitOpenError(
        f"circuit breaker {circuit.full!r} is {state}{why}{then}",
        name=circuit.name,
        key=circuit.key,
        reason=view.reason,
        retry_after=None if open_for_s is None else max(0.0, open_for_s),
    )
    error.ask_again_s = ask_again_s
    return error


# Who is told --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StateChange:
    """A breaker's change of state, as a listener gets it. reason: why it is not closed; "" where it is."""

    name: str
    key: str | None
    old: BreakerState
    new: BreakerState
    reason: str


Listener = Callable[[StateChange], Any]

_LISTENERS: list[tuple[str, str | None, Listener]] = []
_LISTENERS_LOCK = threading.Lock()


def listen(name: str, key: str | None, listener: Listener) -> None:
    """From now on `listener` is told of changes of this breaker and, where `key` is None, of all its keys."""
    with _LISTENERS_LOCK:
        if (name, key, listener) not in _LISTENERS:
            _LISTENERS.append((name, key, listener))


def listened(name: str) -> bool:
    return any(who == name for who, _, _ in _LISTENERS)


def changed(name: str, key: str | None, old: BreakerState, view: View) -> None:
    """Tell the listeners in this process; one that raises is logged and harmless. Call it outside of locks."""
    change = StateChange(name, key, old, view.state, view.reason)
    for who, which, listener in list(_LISTENERS):
        if who == name and which in (None, key):
            try:
                listener(change)
            except Exception:
                log.exception("a listener of circuit breaker %r raised, which changes nothing", full_name(name, key))


def opened(name: str, key: str | None, view: View) -> None:
    """This process's call opened the breaker: one line about it, and the hooks. Refusals are counted, not logged."""
    rest = view.open_for_s or 0.0
    log.critical(
        "circuit breaker %r opened: %s; calls are refused for %s",
        full_name(name, key),
        view.reason,
        format_duration(rest),
    )
    if hooked("breaker_open"):
        tell("breaker_open", BreakerOpenEvent(name=name, key=key, reason=view.reason, open_for=rest))
