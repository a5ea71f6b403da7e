"""`CircuitBreaker`: cut a failing service off, wherever in the cluster it is called from.

Called by users and by `step` (its `breaker=`). Calls `execution.breakers`, and `runtime.breaker_actor` where Ray is
initialised.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from pyworkflow_ray.durations import Duration, parse_duration
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.breakers import Circuit, CircuitGuard, Declared, declare, declare_later, held, kept_apart
from pyworkflow_ray.resilience.breaker import BreakerSettings, BreakerState

__all__ = ["BreakerState", "CircuitBreaker"]

P = ParamSpec("P")
R = TypeVar("R")

_ANY = object()  # no value of this option says what this version does
# Options of later versions, with the one value that says what this version does anyway.
_NOT_YET: dict[str, object] = {
    "failure_rate": None,
    "slow_call_duration": None,
    "slow_call_rate": None,
    "minimum_calls": _ANY,
    "window": _ANY,
    "min_nodes": 1,
    "half_open_max_calls": 1,
    "success_threshold": 1,
    "max_recovery_timeout": None,
    "recovery_backoff": 1,
    "ramp": None,
    "counts": None,
}
_OPTIONS = ("name", "failure_threshold", "recovery_timeout", *_NOT_YET)
_NO_VARIABLE = re.compile(r"_+[0-9]*|_i+[0-9]*|_oh|_ih")  # what IPython keeps of a cell's results
_MAX_FRAMES = 30


class CircuitBreaker:
    """Refuses calls to a service that keeps failing, until it has had time to recover.

    It opens after `failure_threshold` consecutive failures and refuses every call with `CircuitOpenError`. After
    `recovery_timeout` the next call is let through to probe: its success closes the breaker, its failure opens it
    again. Transient errors and timeouts count as failures (`pyworkflow_ray.classify`); permanent errors, cancelled
    calls and refusals do not.

    Used in any process of a Ray cluster it is one breaker, known by its name; it travels into tasks and steps and is
    the same breaker there. Where Ray is not initialised it works in this process.

    Args:
        name: 1 to 128 printable characters. None: module and variable, "shop.pay:breaker", where the breaker is a
            module-level variable (of a script or notebook: its file's name); elsewhere its first use asks for a name.
        failure_threshold: Consecutive failures that open it, ≥ 1, default 5. They are counted in the order in which
            calls end; a success sets the count to zero.
        recovery_timeout: How long it stays open, ≥ 0, default 60 s: seconds, a timedelta, or text such as "30s".

    Raises:
        ConfigurationError: An option is wrong or not available in this version, or the name is declared in this
            process with other settings. Between processes that is raised at first use.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        failure_threshold: int = 5,
        recovery_timeout: Duration = 60,
        **options: Any,
    ) -> None:
        _refuse(options)
        self._settings = BreakerSettings(_threshold(failure_threshold), _timeout(recovery_timeout))
        self._name = None if name is None else _checked_name(name)
        self._declared: Declared | None = None
        self._namespaces: list[dict[str, Any]] = []
        if self._name is not None:
            self._declared = declare(self._name, self._settings)
        else:
            self._namespaces = _namespaces(sys._getframe(1))
            declare_later(self)

    @property
    def name(self) -> str:
        """The breaker's name.

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
        return (_restore, (self.name, self.settings))

    def __repr__(self) -> str:
        name = repr(self._name) if self._name is not None else "name=None"
        settings = ", ".join(f"{option}={value:g}" for option, value in self.settings.items())
        return f"CircuitBreaker({name}, {settings})"

    # Of later versions --------------------------------------------------------------------------------------------

    def key(self, key: str) -> CircuitBreaker:
        raise _not_available("key()")

    def snapshot(self) -> Any:
        raise _not_available("snapshot()")

    def force_open(self) -> None:
        raise _not_available("force_open()")

    def force_closed(self) -> None:
        raise _not_available("force_closed()")

    def reset(self) -> None:
        raise _not_available("reset()")

    def configure(self, **options: Any) -> None:
        raise _not_available("configure()")

    def on_state_change(self, callback: Callable[[Any], None]) -> None:
        raise _not_available("on_state_change()")

    # Inside -------------------------------------------------------------------------------------------------------

    def _declaration(self) -> Declared:
        if self._declared is None:
            name = _find_name(self, self._namespaces)
            if name is None:
                raise ConfigurationError(
                    "this CircuitBreaker has no name, and it is no module-level variable that it could be named after: "
                    "give it one, CircuitBreaker(name='payments-api')"
                )
            self._declared = declare(name, self._settings)
            self._name = name
        return self._declared

    def _circuit(self) -> Circuit:
        declaration = self._declaration()
        apart = kept_apart(declaration)
        if apart is not None:
            return apart
        ray = sys.modules.get("ray")  # never imported here: a plain script needs no Ray
        if ray is not None and getattr(ray, "is_initialized", bool)():
            from pyworkflow_ray.runtime.breaker_actor import link_for

            return link_for(declaration)
        return declaration.local

    def _guard_sync(self, function: Callable[P, R], shown: str) -> Callable[P, R]:
        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            permit = self._circuit().enter()
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                permit.finish(error)
                raise
            if inspect.iscoroutine(result):
                permit.release()
                result.close()
                raise TypeError(
                    f"{shown} returned a coroutine, whose work the breaker would not have seen: "
                    "put @breaker.call directly on the async def"
                )
            permit.finish(None)
            return result

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


def _restore(name: str, settings: dict[str, Any]) -> CircuitBreaker:
    return CircuitBreaker(name, **settings)


# The constructor's checks -----------------------------------------------------------------------------------------


def _refuse(options: dict[str, Any]) -> None:
    for option, value in options.items():
        if option not in _NOT_YET:
            near = difflib.get_close_matches(option, _OPTIONS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"its options are {', '.join(_OPTIONS[:3])}"
            raise ConfigurationError(f"CircuitBreaker has no option {option!r} (value {value!r}): {hint}")
        holds = _NOT_YET[option]
        if holds is _ANY or isinstance(value, bool) or value != holds:
            raise ConfigurationError(
                f"CircuitBreaker({option}={value!r}): {option} is not available in this version; "
                "a breaker counts consecutive failures, with failure_threshold and recovery_timeout"
            )


def _threshold(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"CircuitBreaker(failure_threshold={value!r}): allowed is a whole number ≥ 1")
    return value


def _timeout(value: Duration) -> float:
    try:
        return parse_duration(value)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"CircuitBreaker(recovery_timeout={value!r}): {error}") from None


def _checked_name(name: object) -> str:
    if isinstance(name, str) and 1 <= len(name) <= 128 and name.isprintable():
        return name
    raise ConfigurationError(f"CircuitBreaker(name={name!r}): a name is 1 to 128 printable characters")


def _not_available(what: str) -> ConfigurationError:
    return ConfigurationError(f"CircuitBreaker.{what} is not available in this version")


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
