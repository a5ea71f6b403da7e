"""Circuit breakers in this process: the names declared here, their keys, and a step's way to its breaker.

Called by the public `CircuitBreaker`, by `runtime.breaker_actor` and by the attempt loop through `CircuitGuard`. Calls
`local_breaker` and `permits`.

Faults: code declares one name with two settings, which is an error; it makes ever new keys, of which only those that
say something are kept.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pyworkflow_ray.errors import CircuitOpenError, ConfigurationError, RetryBudgetExhausted
from pyworkflow_ray.execution.local_breaker import LocalCircuit
from pyworkflow_ray.execution.permits import (
    _HELD,
    Circuit,
    Permit,
    StateChange,
    found_by_its_frame,
    held,
    listen,
    refusal,
    riding,
)
from pyworkflow_ray.resilience.breaker import BreakerSettings, BreakerState, Counts, View
from pyworkflow_ray.resilience.breaker_settings import full_name, split_name
from pyworkflow_ray.resilience.mirror import Asker

__all__ = [
    "_HELD",
    "Circuit",
    "CircuitGuard",
    "Declared",
    "LocalCircuit",
    "Named",
    "Permit",
    "StateChange",
    "View",
    "conflict_error",
    "counting",
    "declare",
    "declare_later",
    "declared",
    "declared_settings",
    "end_apart",
    "found_by_its_frame",
    "held",
    "keep_apart",
    "kept_apart",
    "listen",
    "refusal",
    "riding",
]

log = logging.getLogger("pyworkflow_ray.breaker")

MAX_KEYS = 10_000  # of idle ones no more are kept


class CircuitGuard:
    """The breaker of a step's attempts: what the attempt loop knows of breakers (protocol `Guard`).

    news: the newest version of the breaker that the step's run has heard of. who: the step call, among those who wait;
    run: the storage and run that it is called by.
    """

    def __init__(self, circuit: Circuit, news: int = 0, who: str = "", run: tuple[str, str] | None = None) -> None:
        self._circuit = circuit
        self._news = news
        self._who = who
        self._run = run

    @property
    def name(self) -> str:
        return self._circuit.full

    @property
    def state(self) -> BreakerState:
        """As far as this process knows; after `acquire()` never older than what the run had heard."""
        return self._circuit.known().state

    @property
    def generation(self) -> int:
        """What the run has heard of the breaker by now: returned with the outcome, and carried by its next dispatch."""
        return max(self._news, self._circuit.known().heard)

    def acquire(self, waited_s: float | None = None) -> Permit:
        """Let an attempt through. waited_s: for how long a step that waits has waited; None: it does not.

        Raises:
            CircuitOpenError: the breaker refused it.
        """
        return self._circuit.enter(self._news, self._asker(waited_s))

    async def acquire_async(self, waited_s: float | None = None) -> Permit:
        return await self._circuit.enter_async(self._news, self._asker(waited_s))

    def _asker(self, waited_s: float | None) -> Asker | None:
        return None if waited_s is None else Asker(self._who or f"{id(self)}", waited_s, self._run)


# The names declared in this process -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Declared:
    """name: with its key, where it is a key of a breaker."""

    name: str
    settings: BreakerSettings
    local: LocalCircuit
    counts: Counts | None = None


class Named(Protocol):
    """A public breaker object; asking for its name declares it."""

    @property
    def name(self) -> str: ...


_DECLARED: dict[str, Declared] = {}
_KEYS: OrderedDict[str, Declared] = OrderedDict()  # the latest used last
_DECLARED_LOCK = threading.Lock()
_UNNAMED: weakref.WeakSet[Any] = weakref.WeakSet()  # objects whose name is not yet looked up


def declare(name: str, settings: BreakerSettings, counts: Counts | None = None) -> Declared:
    """The breaker of this name in this process, made at its first declaration.

    Args:
        counts: What `settings.counts` names; None: it is looked for under its names.

    Raises:
        ConfigurationError: it is declared here with other settings, or what counts for it can't be found here.
    """
    base, key = split_name(name)
    with _DECLARED_LOCK:
        found = _DECLARED.get(base)
        if found is None:
            counts = _counts_named(base, settings.counts) if counts is None else counts
            found = _DECLARED[base] = Declared(base, settings, LocalCircuit(base, settings, counts=counts), counts)
    conflict = found.settings.conflict(settings)
    if conflict is not None and settings.replaces(found.settings):
        found = _declare_anew(found, settings, counts, conflict)
    elif conflict is not None and not found.settings.replaces(settings):
        raise conflict_error(base, conflict, "in this process")
    return found if key is None else _keyed(found, name)


def _declare_anew(
    found: Declared, settings: BreakerSettings, counts: Counts | None, conflict: tuple[str, Any, Any]
) -> Declared:
    """A newer version of the code, or a cell that was run again, declares it otherwise: from now on that holds."""
    option, was, now = conflict
    log.warning(
        "circuit breaker %r is declared anew, with %s=%s where it had %s: the newer code holds",
        found.name,
        option,
        _number(now),
        _number(was),
    )
    counts = _counts_named(found.name, settings.counts) if counts is None else counts
    with _DECLARED_LOCK:
        local = LocalCircuit(found.name, settings, counts=counts)
        view = found.local.look()
        if view.version:
            local.adopt(replace(view, configured=None), None)
        anew = _DECLARED[found.name] = Declared(found.name, settings, local, counts)
        for full in [full for full in _KEYS if split_name(full)[0] == found.name]:
            del _KEYS[full]
        return anew


def _keyed(base: Declared, full: str) -> Declared:
    with _DECLARED_LOCK:
        found = _KEYS.get(full)
        if found is None:
            local = LocalCircuit(full, base.settings, counts=base.counts)
            found = _KEYS[full] = Declared(full, base.settings, local, base.counts)
            if len(_KEYS) > MAX_KEYS:
                _drop_idle_keys()
        _KEYS.move_to_end(full)
        return found


def _drop_idle_keys() -> None:
    """Half of the idle keys, longest unused first; with the lock held."""
    for full in [full for full, one in list(_KEYS.items())[: MAX_KEYS // 2] if one.local.idle]:
        del _KEYS[full]


def counting(value: object) -> tuple[Counts, str]:
    """What `counts=` says, exception types or a predicate, as a function and as its name.

    Of our own refusals only those count that a type names, or for which the predicate is true.

    Raises:
        TypeError: it is neither.
    """
    types = value if isinstance(value, (tuple, list)) else (value,)
    if types and all(isinstance(one, type) and issubclass(one, BaseException) for one in types):
        wanted = tuple(types)
        ours = tuple(t for t in wanted if issubclass(t, (CircuitOpenError, RetryBudgetExhausted)))

        def counts(error: BaseException) -> bool:
            refused = isinstance(error, (CircuitOpenError, RetryBudgetExhausted))
            return isinstance(error, ours if refused else wanted)

        return counts, ",".join(sorted(f"{one.__module__}:{one.__qualname__}" for one in wanted))
    if callable(value) and not isinstance(value, type) and not inspect.iscoroutinefunction(value):
        module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", type(value).__qualname__)
        return value, f"{module}:{name}"
    raise TypeError("allowed are exception types, or a function of the exception that says whether it counts")


def _counts_named(name: str, text: str | None) -> Counts | None:
    """What counts for a breaker of which this process only has the settings."""
    if text is None:
        return None
    found = []
    for one in text.split(","):
        module, _, qualname = one.partition(":")
        try:
            value: Any = importlib.import_module(module)
            for part in qualname.split("."):
                value = getattr(value, part)
            found.append(value)
        except Exception as error:
            raise ConfigurationError(
                f"circuit breaker {name!r} has counts={text}, which can't be found in this process: give the step the "
                "breaker object itself, or define what counts at the top of a module"
            ) from error
    return counting(tuple(found) if len(found) > 1 else found[0])[0]


def declare_later(breaker: Named) -> None:
    """A breaker was made without a name; it is looked for once somebody asks for one that nobody knows."""
    _UNNAMED.add(breaker)


def declared(name: str) -> Declared | None:
    """The breaker of this name, where this process has declared one."""
    base, key = split_name(name)
    if base not in _DECLARED:
        _name_the_unnamed()
    found = _DECLARED.get(base)
    return found if found is None or key is None else _keyed(found, full_name(base, key))


def declared_settings() -> dict[str, dict[str, Any]]:
    """Name and settings of every breaker of this process: what a run takes along, to be known where it goes."""
    _name_the_unnamed()
    return {name: found.settings.as_declared() for name, found in list(_DECLARED.items())}


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
