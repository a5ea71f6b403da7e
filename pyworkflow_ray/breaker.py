"""`CircuitBreaker`: cut a failing service off, wherever in the cluster it is called from.

Called by users and by `step` (its `breaker=`). Calls `execution.breakers`, and `runtime.breaker_actor` where Ray is
initialised.
"""

from __future__ import annotations

import datetime as dt
import functools
import inspect
import os
import re
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from types import CoroutineType, FrameType, TracebackType
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from pyworkflow_ray.durations import Duration
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.breaker_code import declared_by
from pyworkflow_ray.execution.breaker_options import check_together, checked_options, checked_settings
from pyworkflow_ray.execution.breakers import (
    _APART,
    Circuit,
    CircuitGuard,
    Declared,
    StateChange,
    counting,
    declare,
    declare_later,
    found_by_its_frame,
    held,
    kept_apart,
    listen,
)
from pyworkflow_ray.resilience.breaker import BreakerEvent, BreakerSettings, BreakerState, View
from pyworkflow_ray.resilience.breaker_settings import CODE, full_name, split_name

__all__ = ["BreakerSnapshot", "BreakerState", "CircuitBreaker", "StateChange"]

P = ParamSpec("P")
R = TypeVar("R")

_NO_VARIABLE = re.compile(r"_+[0-9]*|_i+[0-9]*|_oh|_ih")  # what IPython keeps of a cell's results
_MAX_FRAMES = 30
_modules = sys.modules


class _Link(Circuit, Protocol):
    """The cluster's breaker; until `lives_until` it need not be asked whether it serves."""

    lives_until: float

    def serves(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class BreakerSnapshot:
    """A breaker at one instant.

    failures: in a row; of a breaker that judges rates: in its window, of `calls`. retry_after: seconds of open time
    that are left, None when forced open. probing: calls that try the service out now. successes: of those that it takes
    to close. ramp: share of the calls that is let through after closing, None: every one. nodes: those for which it
    is open alone, each with the reason. settings: in force, `configure()` included.
    """

    name: str
    key: str | None
    state: BreakerState
    reason: str
    generation: int
    failures: int
    calls: int
    failure_rate: float | None
    slow_call_rate: float | None
    retry_after: float | None
    probing: int
    successes: int
    ramp: float | None
    nodes: dict[str, str]
    settings: dict[str, Any]

    def _repr_html_(self) -> str:
        from pyworkflow_ray.observability.lists import breaker_html

        return breaker_html(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        from pyworkflow_ray.observability.lists import breaker_text

        printer.text(breaker_text(self))


class CircuitBreaker:
    """Refuses calls to a service that keeps failing, until it has had time to recover.

    It opens after `failure_threshold` consecutive failures, or where a rate is given, once that share of the window's
    calls has failed or was slow; then it refuses every call with `CircuitOpenError`. After `recovery_timeout` it is
    half-open: `half_open_max_calls` calls at a time are let through to probe. `success_threshold` successes close it, a
    failure opens it again. Transient errors and timeouts count as failures (`pyworkflow_ray.classify`); permanent
    errors, cancelled calls and refusals do not.

    Used in any process of a Ray cluster it is one breaker, known by its name; it travels into tasks and steps and is
    the same breaker there. Where Ray is not initialised it works in this process. With many processes prefer
    `failure_rate`: at a steady 30 % of errors five in a row come every few seconds at a cluster's volume.

    Args:
        name: 1 to 128 printable characters, no bracket. None: module and variable, "shop.pay:breaker", where the
            breaker is a module-level variable (of a script or notebook: its file's name); elsewhere its first use asks
            for a name.
        failure_threshold: Consecutive failures that open it, ≥ 1, default 5. They are counted in the order in which
            calls end; a success sets the count to zero. Unused where `failure_rate` is given.
        recovery_timeout: How long it stays open, ≥ 0, default 60 s: seconds, a timedelta, or text such as "30s".
        failure_rate: Share of failed calls in the window, above 0 and at most 1, that opens it.
        slow_call_duration: A call that takes so long or longer is slow, whether it succeeds or fails. Without
            `slow_call_rate` a slow call is a failure; in half-open it always is.
        slow_call_rate: Share of slow calls in the window that opens it.
        minimum_calls: Rates are judged from so many calls in the window on, default 10.
        window: What rates are shares of: a duration as text or timedelta (default "60s"), or an int, the last n calls.
        min_nodes: From how many nodes failures must come before it opens for all, default 1. Before that it opens on
            the failing node alone.
        half_open_max_calls: Calls that may probe at the same time, in the whole cluster, default 1.
        success_threshold: Probes that must succeed before it closes, default 1.
        max_recovery_timeout: Longest open time; None: an hour where `recovery_backoff` is above 1.
        recovery_backoff: Factor of the open time for each failed probe in a row, ≥ 1, default 1.
        ramp: After closing the admitted share grows from 5 % to all over this duration; each failure halves it. None:
            every call at once.
        counts: What counts as a failure in place of the taxonomy: exception types, or a function of the exception.

    Raises:
        ConfigurationError: An option is wrong, or the name is declared in this process with other settings. Between
            processes that is raised at first use.
    """

    _declared_in: tuple[str, float] | None = None  # of one that came from another process

    def __init__(
        self,
        name: str | None = None,
        *,
        failure_threshold: int = 5,
        recovery_timeout: Duration = 60,
        failure_rate: float | None = None,
        slow_call_duration: Duration | None = None,
        slow_call_rate: float | None = None,
        minimum_calls: int = 10,
        window: int | str | dt.timedelta = "60s",
        min_nodes: int = 1,
        half_open_max_calls: int = 1,
        success_threshold: int = 1,
        max_recovery_timeout: Duration | None = None,
        recovery_backoff: float = 1,
        ramp: Duration | None = None,
        counts: Any = None,
        **options: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "name", "options")}
        code, since = self._declared_in or declared_by(sys._getframe(1))
        self._settings = replace(checked_settings({**given, **options}), code=code, since=since)
        self._counts = None if counts is None or isinstance(counts, str) else counting(counts)[0]
        self._counts_given = counts
        self._key: str | None = None
        self._base = self
        self._name = None if name is None else _checked_name(name)
        self._declared: Declared | None = None
        self._link: _Link | None = None
        self._namespaces: list[dict[str, Any]] = []
        if self._name is not None:
            self._declared = declare(self._name, self._settings, self._counts)
        else:
            self._namespaces = _namespaces(sys._getframe(1))
            declare_later(self)

    @property
    def name(self) -> str:
        """The breaker's name; of a key of it "payments[host-7]".

        Raises:
            ConfigurationError: none was given and none can be found.
        """
        return self._declaration().name

    @property
    def settings(self) -> dict[str, Any]:
        """The declared settings, as the constructor's options in JSON types."""
        return self._settings.as_options()

    @property
    def state(self) -> BreakerState:
        """`closed`, `open` or `half_open`, a str enum, asked of the breaker itself.

        Reading it is not asking for a call: an open breaker whose recovery timeout is over stays open until one comes.
        """
        return self._circuit().look().state

    def guard(self, news: int = 0) -> CircuitGuard:
        """This breaker for the attempts of a step that is called plainly."""
        return CircuitGuard(self._circuit(), news)

    def call(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorator: every call of `function`, `async def` or `def`, is a call through this breaker.

        Raises:
            TypeError: `function` is a generator function, a step, or not callable.
        """
        shown = getattr(function, "__qualname__", repr(function))
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{shown} is a generator function: its body runs while it is iterated, not while it is called. "
                "Guard the function that iterates, or what it calls"
            )
        if not callable(function):
            raise TypeError(f"breaker.call decorates a function, not {type(function).__name__}")
        if hasattr(function, "definition") and hasattr(function, "fn"):
            raise TypeError(f"{shown} is a step: give the breaker to its decorator, @step(breaker=...)")
        if inspect.iscoroutinefunction(function):
            return cast(Callable[P, R], self._guard_async(function))
        return self._guard_sync(function, shown)

    def __enter__(self) -> CircuitBreaker:
        self._circuit().enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        permit = held(self.name)
        if permit is not None:
            permit.finish(error)

    async def __aenter__(self) -> CircuitBreaker:
        await self._circuit().enter_async()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        permit = held(self.name)
        if permit is not None:
            await permit.finish_async(error)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, (split_name(self.name)[0], self._settings.as_declared(), self._counts_given, self._key))

    def __repr__(self) -> str:
        name = repr(self._base._name) if self._base._name is not None else "name=None"
        settings = ", ".join(f"{option}={_shown(value)}" for option, value in self.settings.items())
        return f"CircuitBreaker({name}, {settings})" + ("" if self._key is None else f".key({self._key!r})")

    def _repr_html_(self) -> str | None:
        snapshot = self._snapshot_or_none()
        return None if snapshot is None else snapshot._repr_html_()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        snapshot = self._snapshot_or_none()
        if snapshot is None:
            printer.text(repr(self))
        else:
            snapshot._repr_pretty_(printer, cycle)

    def _snapshot_or_none(self) -> BreakerSnapshot | None:
        """None where it has no name yet, or its actor does not answer: showing it must not fail."""
        try:
            return self.snapshot()
        except Exception:
            return None

    def key(self, key: str) -> CircuitBreaker:
        """The breaker of one key, such as a host: a state of its own, with this breaker's settings, in the same actor.

        Keys cost nothing in advance, and idle ones are dropped. Listeners of this breaker hear of all its keys.

        Raises:
            ConfigurationError: `key` is no text of 1 to 256 printable characters, or this is a key already.
        """
        if not isinstance(key, str) or not 1 <= len(key) <= 256 or not key.isprintable():
            raise ConfigurationError(f"CircuitBreaker.key({key!r}): a key is 1 to 256 printable characters")
        if self._key is not None:
            raise ConfigurationError(f"{self!r} is a key already, and has no keys of its own")
        one: CircuitBreaker = CircuitBreaker.__new__(CircuitBreaker)
        one.__dict__.update(self.__dict__)
        one._key, one._base, one._declared, one._link = key, self, None, None
        return one

    def snapshot(self) -> BreakerSnapshot:
        """State, counts, rates and settings now, asked of the breaker itself. Asks for no call."""
        circuit = self._circuit()
        return snapshot_of(circuit.name, circuit.key, circuit.look(), self._settings)

    def force_open(self) -> None:
        """Refuse every call until `reset()` or `force_closed()`, in all processes; returns once it holds."""
        self._circuit().force(BreakerEvent.FORCE_OPEN)

    def force_closed(self) -> None:
        """Let every call through, whatever fails, until `reset()` or `force_open()`; returns once it holds."""
        self._circuit().force(BreakerEvent.FORCE_CLOSED)

    def reset(self) -> None:
        """Close it and forget what it has counted; calls under way do not count any more."""
        self._circuit().force(BreakerEvent.RESET)

    def configure(self, **options: Any) -> None:
        """Change settings of the living breaker, in all processes; `counts` and names stay. Declarations stay as well:
        what processes declare is compared with each other, never with what is configured.

        Raises:
            ConfigurationError: an option is unknown, its value not allowed, or two don't go together.
        """
        if "counts" in options:
            raise ConfigurationError("CircuitBreaker.configure(counts=...): what counts is declared, not configured")
        changes = checked_options(options)
        circuit = self._circuit()
        check_together((circuit.look().configured or self._settings).with_options(changes))
        circuit.configure(changes)

    def on_state_change(self, callback: Callable[[StateChange], Any]) -> Callable[[StateChange], Any]:
        """Call `callback(change)` in this process whenever the state changes, wherever in the cluster that was caused.

        `change` has `.name .key .old .new .reason`. Changes that follow one another at once may be told as one. A
        callback runs outside of locks; one that raises is logged and harmless. Usable as a decorator.
        """
        if not callable(callback) or inspect.iscoroutinefunction(callback):
            raise ConfigurationError(f"on_state_change takes a function of the change, not {callback!r}")
        listen(split_name(self.name)[0], self._key, callback)
        self._circuit()  # a process hears of changes from its first use on
        return callback

    # Inside -------------------------------------------------------------------------------------------------------

    def _declaration(self) -> Declared:
        if self._key is not None:
            return self._keyed()
        if self._declared is None:
            name = _find_name(self, self._namespaces)
            if name is None:
                raise ConfigurationError(
                    "this CircuitBreaker has no name, and it is no module-level variable that it could be named after: "
                    "give it one, CircuitBreaker(name='payments-api')"
                )
            self._declared = declare(name, self._settings, self._counts)
            self._name = name
        return self._declared

    def _keyed(self) -> Declared:
        """The declaration of the key; held only while it is used, so that idle keys can be dropped."""
        return declare(full_name(self._base._declaration().name, self._key), self._settings, self._counts)

    def _circuit(self) -> Circuit:
        """The breaker behind this object, now: every guarded call asks, so what was found before is looked at first."""
        declaration = self._declared or self._declaration()
        if _APART:
            return kept_apart(declaration) or declaration.local
        link = self._link
        if link is not None and (monotonic() < link.lives_until or link.serves()):
            return link
        ray = _modules.get("ray")  # never imported here: a plain script needs no Ray
        if ray is not None and getattr(ray, "is_initialized", bool)():
            from pyworkflow_ray.runtime.breaker_actor import link_for

            link = self._link = link_for(declaration)
            return link
        return declaration.local

    def _guard_sync(self, function: Callable[P, R], shown: str) -> Callable[P, R]:
        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            permit = self._circuit().enter_frame()
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                permit.finish(error)
                raise
            if type(result) is CoroutineType:
                permit.release()
                cast(Any, result).close()
                raise TypeError(
                    f"{shown} returned a coroutine, whose work the breaker would not have seen: "
                    "put @breaker.call directly on the async def"
                )
            permit.success()
            return result

        found_by_its_frame(cast(Any, guarded).__code__)
        return guarded

    def _guard_async(self, function: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
        @functools.wraps(function)
        async def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            permit = await self._circuit().enter_async()
            try:
                result = await function(*args, **kwargs)
            except BaseException as error:
                await permit.finish_async(error)
                raise
            await permit.finish_async(None)
            return result

        return guarded


def _restore(name: str, settings: dict[str, Any], counts: Any = None, key: str | None = None) -> CircuitBreaker:
    options = {option: value for option, value in settings.items() if option not in CODE}
    breaker = CircuitBreaker.__new__(CircuitBreaker)
    breaker._declared_in = (settings.get("code", ""), settings.get("since", 0.0))
    breaker.__init__(name, **(options if counts is None else {**options, "counts": counts}))  # type: ignore[misc]
    return breaker if key is None else breaker.key(key)


def snapshot_of(name: str, key: str | None, view: View, declared: BreakerSettings) -> BreakerSnapshot:
    """name: the whole one, of a key "payments[host-7]"."""
    settings = view.configured or declared
    judged = settings.windowed and view.calls > 0
    return BreakerSnapshot(
        name=name,
        key=key,
        state=view.state,
        reason=view.reason,
        generation=view.generation,
        failures=view.failures,
        calls=view.calls,
        failure_rate=view.failures / view.calls if judged and settings.failure_rate is not None else None,
        slow_call_rate=view.slow / view.calls if judged and settings.slow_call_rate is not None else None,
        retry_after=view.open_for_s,
        probing=len(view.permits),
        successes=view.successes,
        ramp=view.ramp,
        nodes={node: own.reason for node, own in view.nodes},
        settings=settings.as_options(),
    )


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _checked_name(name: object) -> str:
    if isinstance(name, str) and 1 <= len(name) <= 128 and name.isprintable() and not set("[]") & set(name):
        return name
    raise ConfigurationError(f"CircuitBreaker(name={name!r}): a name is 1 to 128 printable characters, no bracket")


# The name of a breaker without one ----------------------------------------------------------------------------------


def _namespaces(frame: FrameType | None) -> list[dict[str, Any]]:
    """The modules whose code is making the breaker, innermost first: one of them may come to hold it in a variable."""
    found: list[dict[str, Any]] = []
    for _ in range(_MAX_FRAMES):
        if frame is None:
            break
        if "__name__" in frame.f_globals and not any(frame.f_globals is known for known in found):
            found.append(frame.f_globals)
        frame = frame.f_back
    return found


def _find_name(breaker: CircuitBreaker, namespaces: list[dict[str, Any]]) -> str | None:
    for namespace in namespaces:
        for variable, value in list(namespace.items()):
            if value is breaker and not _NO_VARIABLE.fullmatch(variable):
                return f"{_module_name(namespace)}:{variable}"
    return None


def _module_name(namespace: dict[str, Any]) -> str:
    """The module's name; for `__main__` the module run by -m, the script's or the notebook's file name."""
    module = str(namespace["__name__"])
    if module != "__main__":
        return module
    spec = namespace.get("__spec__")
    if spec is not None and spec.name:
        return str(spec.name).removesuffix(".__main__")
    file = namespace.get("__file__") or namespace.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME")
    return Path(str(file)).stem if file else "notebook"
