"""Circuit breakers in this process: the names declared here, guarded calls, and a breaker that needs no cluster.

Called by the public `CircuitBreaker`, by `runtime.breaker_link` (a cluster's breaker, seen from a process) and by the
attempt loop through `CircuitGuard`. Calls `resilience.breaker`.

Faults: a call can end in any way, by a BaseException as well, and its waiting for the breaker can be interrupted by
one; the end is always told before it is waited for. A guarded call that is never ended keeps a permit for ever in
process, and for a lease in a cluster.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.errors import CircuitOpenError, ConfigurationError
from pyworkflow_ray.resilience.breaker import (
    Breaker,
    BreakerEvent,
    BreakerSettings,
    BreakerState,
    View,
    error_text,
    event_of,
)
from pyworkflow_ray.resilience.taxonomy import classify

log = logging.getLogger("pyworkflow_ray.breaker")

_HELD: ContextVar[tuple[Permit, ...]] = ContextVar("pyworkflow_ray_held_permits", default=())
_MAX_CHAIN = 100  # an exception's chain is followed so far


class Circuit(Protocol):
    """A breaker as a process sees it: in process (`LocalCircuit`) or of the cluster (`runtime.breaker_link.Link`)."""

    name: str

    def enter(self, news: int = 0) -> Permit:
        """Let a call through, or raise CircuitOpenError. May wait for the cluster, never for another call."""
        ...

    async def enter_async(self, news: int = 0) -> Permit: ...

    def tell(self, permit: Permit, event: BreakerEvent, error: str) -> Future[None] | None:
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


class Permit:
    """One guarded call, from its admission to its end. Ended once; later ends are ignored.

    Of calls of one breaker within one another, a probe's inner calls ride on its permit (or they would wait for
    themselves), and a failure that an inner call has counted is not counted again by the call around it.
    """

    __slots__ = ("_circuit", "_counted", "_ended", "_outer", "_rides", "generation", "number")

    def __init__(self, circuit: Circuit, generation: int | None, number: int | None, *, rides: bool = False) -> None:
        self.generation = generation
        self.number = number
        self._circuit = circuit
        self._rides = rides
        self._ended = False
        self._counted: BaseException | None = None
        self._outer = held(circuit.name)
        _HELD.set((*_HELD.get(), self))

    @property
    def name(self) -> str:
        return self._circuit.name

    @property
    def probes(self) -> bool:
        """Whether the call was let through to try out a service that was cut off."""
        return self.number is not None or self._rides

    @property
    def ended(self) -> bool:
        return self._ended

    def success(self) -> None:
        self._wait(self._end(BreakerEvent.SUCCESS))

    def failure(self, kind: str, error: BaseException) -> None:
        """The call ended with `error`, of `kind` in the taxonomy; returns once the breaker has counted it."""
        self._wait(self._fail(kind, error))

    def release(self) -> None:
        """The call was cancelled: it counts for nothing."""
        self._wait(self._end(BreakerEvent.RELEASE))

    def finish(self, error: BaseException | None) -> None:
        """Success where `error` is None, else failure of the kind that the taxonomy gives."""
        self._wait(self._finish(error))

    async def finish_async(self, error: BaseException | None) -> None:
        told = self._finish(error)
        if told is not None:
            await self._circuit.wait_async(told)

    def _finish(self, error: BaseException | None) -> Future[None] | None:
        if error is None:
            return self._end(BreakerEvent.SUCCESS)
        return self._fail(classify(error), error)

    def _fail(self, kind: str, error: BaseException) -> Future[None] | None:
        event = event_of(kind, error)
        if event is BreakerEvent.FAILURE and not self.probes:
            if self._counted is not None and _in_chain(self._counted, error):
                event = BreakerEvent.RELEASE
            outer = self._outer
            while outer is not None:
                outer._counted = error
                outer = outer._outer
        return self._end(event, error_text(error))

    def _end(self, event: BreakerEvent, error: str = "") -> Future[None] | None:
        if self._ended:
            return None
        self._ended = True
        _HELD.set(tuple(permit for permit in _HELD.get() if permit is not self))
        return None if self._rides else self._circuit.tell(self, event, error)

    def _wait(self, told: Future[None] | None) -> None:
        if told is not None:
            self._circuit.wait(told)


def held(name: str) -> Permit | None:
    """The innermost guarded call of breaker `name` that the running code is in."""
    for permit in reversed(_HELD.get()):
        if not permit.ended and permit.name == name:
            return permit
    return None


def riding(circuit: Circuit) -> Permit | None:
    """A permit that rides on the probe which the running code is in; None outside one."""
    outer = held(circuit.name)
    if outer is not None and outer.probes:
        return Permit(circuit, outer.generation, None, rides=True)
    return None


def _in_chain(wanted: BaseException, error: BaseException | None) -> bool:
    for _ in range(_MAX_CHAIN):
        if error is None or error is wanted:
            break
        error = error.__cause__ or error.__context__
    return error is wanted


def refusal(name: str, view: View, open_for_s: float) -> CircuitOpenError:
    """The error of a refused call, made once, at the user's border."""
    why = f": {view.reason}" if view.reason else ""
    if view.state is BreakerState.OPEN:
        then = f"; a call may try again in {format_duration(open_for_s)}" if open_for_s > 0 else ""
    else:
        then = "; another call is trying the service out"
    return CircuitOpenError(
        f"circuit breaker {name!r} is {view.state.value}{why}{then}",
        name=name,
        reason=view.reason,
        retry_after=max(0.0, open_for_s),
    )


def log_opened(name: str, view: View) -> None:
    """The one line about a breaker that opened; refusals are counted, not logged."""
    log.critical(
        "circuit breaker %r opened: %s; calls are refused for %s", name, view.reason, format_duration(view.open_for_s)
    )


class LocalCircuit:
    """A breaker that lives in this process alone. Safe for threads; nothing of a user's runs under its lock."""

    def __init__(self, name: str, settings: BreakerSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._breaker = Breaker(settings, lease_s=None)

    def enter(self, news: int = 0) -> Permit:
        permit = riding(self)
        if permit is not None:
            return permit
        # Closed needs no lock. The generation is read first: if the state changes in between, the call is a late one.
        generation = self._breaker.generation
        if self._breaker.state is BreakerState.CLOSED:
            return Permit(self, generation, None)
        with self._lock:
            now = self._clock()
            answer = self._breaker.ask(now)
            view = None if answer.admitted else self._breaker.view(now)
        if view is not None:
            raise refusal(self.name, view, view.open_for_s)
        return Permit(self, answer.generation, answer.permit)

    async def enter_async(self, news: int = 0) -> Permit:
        return self.enter(news)

    def tell(self, permit: Permit, event: BreakerEvent, error: str) -> Future[None] | None:
        assert permit.generation is not None
        changes = event is BreakerEvent.FAILURE or (event is BreakerEvent.SUCCESS and self._breaker.failures > 0)
        if permit.number is None and not changes:
            return None
        with self._lock:
            was, now = self._breaker.state, self._clock()
            self._breaker.ended(event, now, generation=permit.generation, permit=permit.number, error=error)
            opened = was is BreakerState.CLOSED and self._breaker.state is BreakerState.OPEN
            view = self._breaker.view(now) if opened else None
        if view is not None:
            log_opened(self.name, view)
        return None

    def wait(self, told: Future[None]) -> None:
        raise AssertionError("a breaker in process has nothing to wait for")

    async def wait_async(self, told: Future[None]) -> None:
        self.wait(told)

    def look(self) -> View:
        with self._lock:
            return self._breaker.view(self._clock())

    known = look


class CircuitGuard:
    """The breaker of a step's attempts: what the attempt loop knows of breakers (protocol `Guard`).

    news: the newest version of the breaker that the step's run has heard of.
    """

    def __init__(self, circuit: Circuit, news: int = 0) -> None:
        self._circuit = circuit
        self._news = news

    @property
    def name(self) -> str:
        return self._circuit.name

    @property
    def state(self) -> BreakerState:
        """As far as this process knows; after `acquire()` never older than what the run had heard."""
        return self._circuit.known().state

    @property
    def generation(self) -> int:
        """What the run has heard of the breaker by now: returned with the outcome, and carried by its next dispatch."""
        return max(self._news, self._circuit.known().heard)

    def acquire(self) -> Permit:
        """Let an attempt through.

        Raises:
            CircuitOpenError: the breaker refused it.
        """
        return self._circuit.enter(self._news)

    async def acquire_async(self) -> Permit:
        return await self._circuit.enter_async(self._news)


# The names declared in this process -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Declared:
    name: str
    settings: BreakerSettings
    local: LocalCircuit


class Named(Protocol):
    """A public breaker object; asking for its name declares it."""

    @property
    def name(self) -> str: ...


_DECLARED: dict[str, Declared] = {}
_DECLARED_LOCK = threading.Lock()
_UNNAMED: weakref.WeakSet[Any] = weakref.WeakSet()  # objects whose name is not yet looked up


def declare(name: str, settings: BreakerSettings) -> Declared:
    """The breaker of this name in this process, made at its first declaration.

    Raises:
        ConfigurationError: it is declared here with other settings.
    """
    with _DECLARED_LOCK:
        found = _DECLARED.get(name)
        if found is None:
            found = _DECLARED[name] = Declared(name, settings, LocalCircuit(name, settings))
    conflict = found.settings.conflict(settings)
    if conflict is not None:
        raise conflict_error(name, conflict, "in this process")
    return found


def declare_later(breaker: Named) -> None:
    """A breaker was made without a name; it is looked for once somebody asks for one that nobody knows."""
    _UNNAMED.add(breaker)


def declared(name: str) -> Declared | None:
    """The breaker of this name, where this process has declared one."""
    if name not in _DECLARED:
        _name_the_unnamed()
    return _DECLARED.get(name)


def declared_settings() -> dict[str, dict[str, Any]]:
    """Name and settings of every breaker of this process: what a run takes along, to be known where it goes."""
    _name_the_unnamed()
    return {name: found.settings.as_options() for name, found in list(_DECLARED.items())}


def _name_the_unnamed() -> None:
    for breaker in list(_UNNAMED):
        try:
            _ = breaker.name
        except ConfigurationError:
            continue  # it is in no variable (yet), or in conflict: its own first use says so
        _UNNAMED.discard(breaker)


# A test environment's breakers: open ones keep the process's own, and the cluster's, out of its runs. Innermost last.
_APART: list[Callable[[Declared], Circuit]] = []


def keep_apart(circuits: Callable[[Declared], Circuit]) -> None:
    """From now on a breaker of this process is what `circuits` makes of it."""
    _APART.append(circuits)


def end_apart(circuits: Callable[[Declared], Circuit]) -> None:
    _APART.remove(circuits)


def kept_apart(found: Declared) -> Circuit | None:
    """The breaker as the innermost open test environment has it; None outside one."""
    return _APART[-1](found) if _APART else None


def conflict_error(name: str, conflict: tuple[str, Any, Any], where: str) -> ConfigurationError:
    option, there, here = conflict
    return ConfigurationError(
        f"circuit breaker {name!r} is declared with {option}={_number(here)}, but {where} it has "
        f"{option}={_number(there)}: give both the same value, or one of them another name"
    )


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)
