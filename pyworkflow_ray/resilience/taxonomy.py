"""Which kind of failure an exception is: decides whether it is retried, counted by a breaker, and how it is logged.

Called by the attempt loop, by breakers and by users (`pw.classify`); calls nothing. Rules:

* the table is data; a class is judged by its nearest entries: an entry for a base is shadowed by one for a subclass;
* of the entries that are left, permanent wins, then cascade, timeout, transient; no entry at all is transient;
* a type that a user registered wins over what is said of its bases, and over the HTTP status. Registrations are kept
  by the class's name, so that they hold for the same class made again (a notebook's cell, a pickle by value) and travel
  to other processes with each run and step call, which win over what the process itself has registered;
* an error of an HTTP client is judged by its response's status (read by duck typing: no client library is imported);
* an exception group is permanent if any member is; a chain of exceptions is judged by its outermost one;
* what is no `Exception` (cancellation, KeyboardInterrupt, SystemExit) is permanent here: never retried; nor counted,
  which is the breaker's own rule.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Any, Literal, get_args

from pyworkflow_ray.errors import (
    CircuitOpenError,
    ConfigurationError,
    FatalError,
    RetryableError,
    RetryBudgetExhausted,
    StepLostError,
)

Kind = Literal["transient", "permanent", "cascade", "timeout"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# API.md's table, row by row. Types that only an installed library has are given by name in FOREIGN.
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
# "module.Class" of HTTP clients whose bases say less than their names.
FOREIGN: Mapping[str, Kind] = MappingProxyType(
    {
        "httpx.TimeoutException": "timeout",
        "httpx.InvalidURL": "permanent",
        "httpx.UnsupportedProtocol": "permanent",
        "requests.exceptions.Timeout": "timeout",
    }
)
# `logging`'s numbers: INFO, ERROR, CRITICAL, WARNING. A refusal itself is counted and not logged; a breaker that opens
# and a run that fails of it are logged once, at the cascade's level.
LOG_LEVELS: Mapping[Kind, int] = MappingProxyType({"transient": 20, "permanent": 40, "cascade": 50, "timeout": 30})
RETRIED: Mapping[Kind, bool] = MappingProxyType(
    {"transient": True, "permanent": False, "cascade": False, "timeout": True}
)

_TRANSIENT_STATUS = frozenset({408, 425, 429})
_BY_CLASS: dict[type[BaseException], Kind] = {cls: kind for kind in TAXONOMY for cls in TAXONOMY[kind]}
_STRENGTH: tuple[Kind, ...] = ("permanent", "cascade", "timeout", "transient")
Registered = Mapping[type[BaseException], Kind] | Mapping[str, Kind]
_own_kinds: dict[str, Kind] = {}  # registered by code of this process
_adopted: dict[str, Kind] = {}  # of the run that this process works for
_in_force: dict[str, Kind] = {}
_DECIMAL = re.compile(r"\d{1,12}(?:\.\d{1,9})?")
_MAX_RETRY_AFTER_S = 100 * 365 * 86400.0  # beyond a century an instant no longer fits a datetime


def classify(exc: BaseException, registered: Registered | None = None) -> Kind:
    """The kind of `exc`: "transient", "permanent", "cascade" or "timeout".

    HTTP status of httpx, requests, aiohttp and urllib errors: 408, 425, 429 and 5xx are transient, other 4xx permanent.

    Args:
        exc: Any exception; only itself and, of a group, its members are looked at, not what caused it.
        registered: Kinds of a user's own types, by class or "module:qualname"; None: those in force in this process.
    """
    cls = type(exc)
    registered = _in_force if registered is None else registered
    if registered:
        own = _registered_bases(cls, registered)
        found = _nearest(cls, {**_BY_CLASS, **own}) if own else set()
        if found & own.keys():
            return _strongest({own.get(base) or _BY_CLASS[base] for base in found})
    if not isinstance(exc, Exception):
        return "permanent"
    by_class = _entries(cls)
    if isinstance(exc, BaseExceptionGroup) and not by_class:
        return _kind_of_group(exc, registered)
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


def kind_of_status(status: int | None) -> Kind | None:
    """Kind of an HTTP status; None where the status is no failure, or there is none."""
    if status is None or not 400 <= status <= 599:
        return None
    return "transient" if status >= 500 or status in _TRANSIENT_STATUS else "permanent"


def http_status(exc: BaseException) -> int | None:
    """Status of the HTTP response that `exc` is about, None where it is about none.

    Read from `exc.response.status_code` or `.status` (httpx, requests, openai), else from the exception itself where
    it has headers: `status` (aiohttp), `code` (urllib), `status_code`.
    """
    response = _read(exc, "response")
    if response is not None:
        return _status(response, ("status_code", "status"))
    if _read(exc, "headers") is not None:
        return _status(exc, ("status_code", "status", "code"))
    return _status(exc, ("status_code",))


def server_retry_after(exc: BaseException, now: float) -> float | None:
    """Seconds the server asks to wait by its Retry-After header (seconds or HTTP date), None where it asks for none.

    Args:
        now: UNIX time; a date that is over gives 0. At most a century.

    Source: RFC 9110, section 10.2.3.
    """
    for holder in (_read(exc, "response"), exc):
        text = _header(_read(holder, "headers"))
        if text is not None:
            return _parse_retry_after(text.strip(), now)
    return None


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


def _entries(cls: type[BaseException]) -> set[Kind]:
    kinds = {_BY_CLASS[base] for base in _nearest(cls, _BY_CLASS)}
    for base in cls.__mro__:
        # httpx's classes give their public module's name, or that of the file they are in
        module = base.__module__.partition("._")[0]
        foreign = FOREIGN.get(f"{module}.{base.__name__}")
        if foreign is not None:
            return {foreign} | (kinds - {"transient"})
    return kinds


def _nearest(cls: type[BaseException], table: Mapping[type[BaseException], Kind]) -> set[type[BaseException]]:
    """`cls` and its bases that are in the table, but those that a subclass of theirs in it shadows."""
    found = [base for base in cls.__mro__ if base in table]
    return {base for base in found if not any(other is not base and issubclass(other, base) for other in found)}


def _strongest(kinds: set[Kind]) -> Kind:
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


def _read(holder: Any, name: str) -> Any:
    try:
        return getattr(holder, name, None)
    except Exception:  # a property of a foreign class may raise anything (httpx: RuntimeError)
        return None


def _status(holder: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = _read(holder, name)
        if isinstance(value, int) and not isinstance(value, bool) and 100 <= value <= 599:
            return int(value)
    return None


def _header(headers: Any) -> str | None:
    get = _read(headers, "get")
    if not callable(get):
        return None
    for name in ("Retry-After", "retry-after"):
        try:
            value = get(name)
        except Exception:
            return None
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return str(value)
    return None


def _parse_retry_after(text: str, now: float) -> float | None:
    if _DECIMAL.fullmatch(text):
        return min(float(text), _MAX_RETRY_AFTER_S)
    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:  # "-0000": UTC, of an unknown local zone
            date = date.replace(tzinfo=dt.UTC)
        return min(max(0.0, date.timestamp() - now), _MAX_RETRY_AFTER_S)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
