"""Which kind of failure an exception is: decides whether it is retried, counted by a breaker, and how it is logged.

Called by the attempt loop, by breakers and by users (`pw.classify`); calls `adapters`. Rules:

* the table is data; a class is judged by its nearest entries: an entry for a base is shadowed by one for a subclass;
* of the entries that are left, permanent wins, then cascade, timeout, transient; no entry at all is transient;
* a type that a user registered wins over what is said of its bases, and over the HTTP status. Registrations are kept
  by the class's name, so that they hold for the same class made again (a notebook's cell, a pickle by value) and travel
  to other processes with each run and step call, which win over what the process itself has registered;
* an error of a client library is judged by what the service answered (`adapters`: no library is imported);
* an exception group is permanent if any member is; a chain of exceptions is judged by its outermost one;
* what is no `Exception` (cancellation, KeyboardInterrupt, SystemExit) is permanent here: never retried; nor counted,
  which is the breaker's own rule.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, get_args

from pyworkflow_ray.errors import (
    CircuitOpenError,
    ConfigurationError,
    FatalError,
    RetryableError,
    RetryBudgetExhausted,
    StepLostError,
)
from pyworkflow_ray.resilience import adapters
from pyworkflow_ray.resilience.adapters import Kind, http_status, is_throttled, kind_of_status, server_retry_after

__all__ = [
    "KINDS",
    "LOG_LEVELS",
    "RETRIED",
    "TAXONOMY",
    "Kind",
    "Registered",
    "adopt_kinds",
    "classify",
    "http_status",
    "is_throttled",
    "kind_of_status",
    "log_level",
    "members",
    "register_kind",
    "registered_kinds",
    "server_retry_after",
    "with_kind",
]

KINDS: tuple[Kind, ...] = get_args(Kind)

# API.md's table, row by row. Types that only an installed library has are given by name in `adapters`.
TAXONOMY: Mapping[Kind, tuple[type[BaseException], ...]] = MappingProxyType(
    {
        "permanent": (
            ValueError,  # pydantic's ValidationError is one
            TypeError,
            LookupError,
            AttributeError,
            AssertionError,
            NotImplementedError,
            PermissionError,
            FileNotFoundError,
            ImportError,
            FatalError,
            StepLostError,  # of a step called inside a step: its outcome is unknown, and trying again would repeat it
        ),
        "cascade": (CircuitOpenError, RetryBudgetExhausted),
        "timeout": (TimeoutError,),
        "transient": (ConnectionError, OSError, RetryableError),
    }
)
# `logging`'s numbers: INFO, ERROR, CRITICAL, WARNING. A refusal itself is counted and not logged; a breaker that opens
# and a run that fails of it are logged once, at the cascade's level.
LOG_LEVELS: Mapping[Kind, int] = MappingProxyType({"transient": 20, "permanent": 40, "cascade": 50, "timeout": 30})
RETRIED: Mapping[Kind, bool] = MappingProxyType(
    {"transient": True, "permanent": False, "cascade": False, "timeout": True}
)

_BY_CLASS: dict[type[BaseException], Kind] = {cls: kind for kind in TAXONOMY for cls in TAXONOMY[kind]}
_STRENGTH: tuple[Kind, ...] = ("permanent", "cascade", "timeout", "transient")
Registered = Mapping[type[BaseException], Kind] | Mapping[str, Kind]
_own_kinds: dict[str, Kind] = {}  # registered by code of this process
_adopted: dict[str, Kind] = {}  # of the run that this process works for
_in_force: dict[str, Kind] = {}


def classify(exc: BaseException, registered: Registered | None = None) -> Kind:
    """The kind of `exc`: "transient", "permanent", "cascade" or "timeout".

    HTTP status of httpx, requests, aiohttp and urllib errors: 408, 425, 429 and 5xx are transient, other 4xx permanent.

    Args:
        exc: Any exception; only itself and, of a group, its members are looked at, not what caused it.
        registered: Kinds of a user's own types, by class or "module:qualname"; None: those in force in this process.
    """
    cls: Any = type(exc)  # mypy takes no class for hashable
    registered = _in_force if registered is None else registered
    if registered:
        own = _registered_bases(cls, registered)
        found = _nearest(cls, {**_BY_CLASS, **own}) if own else set()
        if found & own.keys():
            return _strongest(frozenset(own.get(base) or _BY_CLASS[base] for base in found))
    if not isinstance(exc, Exception):
        return "permanent"
    by_class = _entries(cls)
    if isinstance(exc, BaseExceptionGroup) and not by_class:
        return _kind_of_group(exc, registered)
    answered = adapters.kind_of_answer(exc)
    if answered is not None:
        return answered
    # an entry that every I/O error has (OSError) says less than the answer of the server
    if not by_class or by_class == {"transient"}:
        by_status = kind_of_status(http_status(exc))
        if by_status is not None:
            return by_status
    return _strongest(by_class)


def register_kind(exc_type: type[BaseException], kind: Kind) -> None:
    """Decide the kind of an exception type and of its subclasses, here and in every run started from this process.

    It holds for retries, breakers and log levels alike. A registered type wins over what is said of its bases and over
    an HTTP status; the same type registered again takes the new kind. A "cascade" type of yours is not retried, and
    counts for a breaker. Call it where the workflow is defined, before the run is started.

    Args:
        exc_type: The class itself.
        kind: "transient", "permanent", "cascade" or "timeout".

    Raises:
        ConfigurationError: `exc_type` is no exception type, or `kind` none of the four.
    """
    with_kind({}, exc_type, kind)
    _own_kinds[_name_of(exc_type)] = kind
    _adopted.pop(_name_of(exc_type), None)
    _refresh()


def registered_kinds() -> dict[str, Kind]:
    """What this process has registered, by "module:qualname": what a run takes along."""
    return dict(_own_kinds)


def adopt_kinds(kinds: Mapping[str, Kind]) -> None:
    """Let the registrations of a run hold in this process, in place of those of the run before."""
    if kinds != _adopted:
        _adopted.clear()
        _adopted.update(kinds)
        _refresh()


def with_kind(
    registered: Mapping[type[BaseException], Kind], exc_type: type[BaseException], kind: str
) -> dict[type[BaseException], Kind]:
    """`registered` with one more type. The argument stays as it is.

    Raises:
        ConfigurationError: `exc_type` is no exception type, or `kind` none of the four.
    """
    if not (isinstance(exc_type, type) and issubclass(exc_type, BaseException)):
        raise ConfigurationError(f"{exc_type!r} is no exception type: give the class itself")
    for known in KINDS:
        if kind == known:
            return {**registered, exc_type: known}
    raise ConfigurationError(f"kind={kind!r} is not allowed: it is one of {', '.join(map(repr, KINDS))}")


def log_level(kind: Kind) -> int:
    """The level, as `logging` numbers it, at which a failure of this kind is logged."""
    return LOG_LEVELS[kind]


# Inside -----------------------------------------------------------------------------------------------------------


def _refresh() -> None:
    global _in_force
    _in_force = {**_own_kinds, **_adopted}


def _name_of(cls: type[BaseException]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _registered_bases(cls: type[BaseException], registered: Registered) -> dict[type[BaseException], Kind]:
    """The registered ones among `cls` and its bases."""
    table: Mapping[Any, Kind] = registered
    found: dict[type[BaseException], Kind] = {}
    for base in cls.__mro__:
        kind = table.get(base) or table.get(_name_of(base))
        if kind is not None:
            found[base] = kind
    return found


@functools.lru_cache(512)
def _entries(cls: Any) -> frozenset[Kind]:
    kinds = {_BY_CLASS[base] for base in _nearest(cls, _BY_CLASS)}
    foreign = adapters.kind_of_class(cls)
    if foreign is not None:
        return frozenset({foreign} | (kinds - {"transient"}))
    return frozenset(kinds)


def _nearest(cls: type[BaseException], table: Mapping[type[BaseException], Kind]) -> set[type[BaseException]]:
    """`cls` and its bases that are in the table, but those that a subclass of theirs in it shadows."""
    found = [base for base in cls.__mro__ if base in table]
    return {base for base in found if not any(other is not base and issubclass(other, base) for other in found)}


@functools.lru_cache(64)
def _strongest(kinds: frozenset[Kind]) -> Kind:
    return next((kind for kind in _STRENGTH if kind in kinds), "transient")


def _kind_of_group(group: BaseException, registered: Registered) -> Kind:
    kinds = {classify(member, registered) for member in members(group)}
    if "permanent" in kinds:
        return "permanent"
    return kinds.pop() if len(kinds) == 1 else "transient"


def members(exc: BaseException) -> Iterator[BaseException]:
    """The exceptions in a group, those of groups within it included; `exc` itself where it is no group."""
    waiting = [exc]
    while waiting:
        item = waiting.pop()
        if isinstance(item, BaseExceptionGroup):
            waiting.extend(reversed(item.exceptions))
        else:
            yield item
