"""Functions of the user's that are told of failures: `on_retry`, `on_run_failed`, `on_breaker_open`.

Called by users to register; by the attempt loop's callers, by the owner of a run that fails, and by breakers to tell.
Rules:

* a hook is called in the process where it happens: a step's worker, the run's actor, the process of a plain call. The
  hooks registered when a run was started travel with it, by name where they can be imported, else by value;
* a process that works for a run calls the run's hooks and those that its own imports registered, each once: they are
  the same functions where workflow and hooks are in one module;
* a hook that raises is logged and harmless. It is waited for: what takes long belongs in a thread of its own;
* at least once: a process that dies between a hook and the record of what it told may make it be told again.

Faults: a hook that can't be loaded where it is needed is logged once there, and left out.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import logging
import pickle
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import cloudpickle

from pyworkflow_ray.engine.calls import Codec
from pyworkflow_ray.engine.events import CodeRef, Payload, RunCreated, RunFailed
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.definitions import attribute, is_importable
from pyworkflow_ray.execution.environment import python_version

log = logging.getLogger("pyworkflow_ray.hooks")

Event = Literal["retry", "run_failed", "breaker_open", "alert"]
F = TypeVar("F", bound=Callable[[Any], Any])


@dataclass(slots=True, frozen=True)
class RetryEvent:
    """An attempt failed and another follows.

    run_id, workflow, position: None in a plain call. attempt: number of the one that failed. kind: in the taxonomy.
    delay: seconds before the next. reason: why the delay is what it is ("backoff+jitter", "server retry_after", ...).
    """

    step: str
    attempt: int
    kind: str
    error: BaseException
    delay: float
    reason: str
    run_id: str | None = None
    workflow: str | None = None
    position: str | None = None


@dataclass(slots=True, frozen=True)
class RunFailedEvent:
    """A run has failed, durably. kind: of its error. position: of the step whose error it is, None: the body's own."""

    run_id: str
    workflow: str
    kind: str
    error: BaseException
    position: str | None = None


@dataclass(slots=True, frozen=True)
class BreakerOpenEvent:
    """A circuit breaker opened. reason: why, in words. open_for: seconds until it lets a call probe."""

    name: str
    key: str | None
    reason: str
    open_for: float


def on_retry(hook: F) -> F:
    """Call `hook(event)` whenever an attempt of a step failed and another follows. Usable as a decorator.

    It is called in the process that made the attempt, before the wait; `event` has `.run_id .workflow .step .position
    .attempt .kind .error .delay .reason`. Hooks registered before a run is started travel with it to its workers; one
    that can't be imported there goes by value, with copies of what it refers to.

    Raises:
        ConfigurationError: it is no plain function.
    """
    return _register("retry", hook)


def on_run_failed(hook: F) -> F:
    """Call `hook(event)` when a run has failed, once that is durable, in the process of the run's actor.

    `event` has `.run_id .workflow .kind .error .position`. Called at least once a failure. Otherwise as `on_retry`.

    Raises:
        ConfigurationError: it is no plain function.
    """
    return _register("run_failed", hook)


def on_breaker_open(hook: F) -> F:
    """Call `hook(event)` when a circuit breaker opens, in the process whose call opened it.

    `event` has `.name .key .reason .open_for`. Otherwise as `on_retry`.

    Raises:
        ConfigurationError: it is no plain function.
    """
    return _register("breaker_open", hook)


# For the runtime --------------------------------------------------------------------------------------------------


def hooked(event: Event) -> bool:
    """Whether anybody wants to be told."""
    return bool(_own[event] or _adopted.get(event))


def tell(event: Event, what: Any) -> None:
    """Call the hooks in force in this process, in the order in which they were registered."""
    own = list(_own[event])
    for hook in [*own, *(hook for hook in _adopted.get(event, ()) if not any(hook is known for known in own))]:
        try:
            hook(what)
        except Exception:
            log.exception("a hook raised, which changes nothing: %r at %s", hook, event)


def describe_hooks() -> dict[str, list[CodeRef]]:
    """The hooks of this process, as a run takes them along."""
    return {event: [_described(hook) for hook in hooks] for event, hooks in _own.items() if hooks}


def adopt_hooks(described: Mapping[str, list[CodeRef]], decode: Callable[[Payload], Any]) -> None:
    """Let the hooks of a run be in force in this process, in place of those of the run before.

    Args:
        decode: The codec's: gives the bytes of a hook by value, or refuses them.
    """
    global _adopted
    if described or _adopted:
        _adopted = {event: _loaded(refs, decode) for event, refs in described.items()}


def run_has_failed(created: RunCreated, event: RunFailed, codec: Codec) -> None:
    """A run's failure is durable: log it where it is a cascade's, and tell the run's own hooks."""
    if event.error.kind == "cascade":
        log.critical("run %s failed of a cascade: %s: %s", created.run_id, event.error.type, event.error.message)
    for hook in _loaded(created.hooks.get("run_failed", []), codec.for_code().decode):
        try:
            error = codec.at(created.run_id).decode_error(event.error)
            hook(RunFailedEvent(created.run_id, created.workflow, event.error.kind, error, event.position))
        except Exception:
            log.exception("a hook raised, which changes nothing: %r at the failure of run %s", hook, created.run_id)


def register_hook(event: Event, hook: F) -> F:
    """For the other modules that let users register functions."""
    return _register(event, hook)


def load_hooks(refs: list[CodeRef], decode: Callable[[Payload], Any]) -> list[Callable[[Any], Any]]:
    """The functions; one that can't be loaded here is logged and left out."""
    return _loaded(refs, decode)


# Inside -----------------------------------------------------------------------------------------------------------

_own: dict[str, list[Callable[[Any], Any]]] = {"retry": [], "run_failed": [], "breaker_open": [], "alert": []}
_adopted: dict[str, list[Callable[[Any], Any]]] = {}  # of the run that this process works for
_lock = threading.Lock()
_refs: dict[int, tuple[Callable[[Any], Any], CodeRef]] = {}  # by id; holds the hook, so that the id stays its
_by_digest: dict[str, Callable[[Any], Any] | None] = {}  # None: it could not be loaded here


def _register(event: Event, hook: F) -> F:
    name = f"on_{event}"
    if not callable(hook):
        raise ConfigurationError(f"{name} takes a function of the event, not {type(hook).__name__}")
    if inspect.iscoroutinefunction(hook) or inspect.isgeneratorfunction(hook) or inspect.isasyncgenfunction(hook):
        raise ConfigurationError(f"{name}: {getattr(hook, '__qualname__', hook)} is async or a generator; give a def")
    if hasattr(hook, "definition") and hasattr(hook, "fn"):
        raise ConfigurationError(f"{name}: {hook!r} is a step or workflow; give a plain function")
    place = (getattr(hook, "__module__", None), getattr(hook, "__qualname__", None))
    with _lock:
        hooks = _own[event]
        for index, known in enumerate(hooks):
            same = known is hook or (
                "<" not in str(place[1])
                and inspect.isfunction(hook)
                and place == (getattr(known, "__module__", None), getattr(known, "__qualname__", None))
            )
            if same:  # a notebook's cell run again, or a module imported twice
                hooks[index] = hook
                return hook
        hooks.append(hook)
    return hook


def _described(hook: Callable[[Any], Any]) -> CodeRef:
    known = _refs.get(id(hook))
    if known is not None:
        return known[1]
    module, qualname = getattr(hook, "__module__", None) or "", getattr(hook, "__qualname__", "") or ""
    if attribute(module, qualname) is hook and is_importable(module):
        ref = CodeRef(how="import", name=qualname, module=module, qualname=qualname)
    else:
        try:
            data = pickle.dumps(cloudpickle.dumps(hook, protocol=5), protocol=5)
        except Exception as error:
            raise ConfigurationError(
                f"the hook {hook!r} can't travel with a run: {type(error).__name__}: {error}. Define it at the top of "
                "a module that workers can import"
            ) from error
        payload = Payload(
            enc="pickle",
            data=base64.b64encode(data).decode(),
            size=len(data),
            cls="builtins:bytes",
            py=python_version(),
            preview="code of a hook",
        )
        ref = CodeRef(how="value", name=qualname or repr(hook)[:100], payload=payload)
    _refs[id(hook)] = (hook, ref)
    _by_digest[_digest(ref)] = hook  # in this process it is the very same
    return ref


def _digest(ref: CodeRef) -> str:
    if ref.how == "import":
        return f"{ref.module}:{ref.qualname}"
    return hashlib.sha256(str(ref.payload.data if ref.payload is not None else "").encode()).hexdigest()


def _loaded(refs: list[CodeRef], decode: Callable[[Payload], Any]) -> list[Callable[[Any], Any]]:
    found = []
    for ref in refs:
        digest = _digest(ref)
        if digest not in _by_digest:
            _by_digest[digest] = _load(ref, decode)
        hook = _by_digest[digest]
        if hook is not None:
            found.append(hook)
    return found


def _load(ref: CodeRef, decode: Callable[[Payload], Any]) -> Callable[[Any], Any] | None:
    try:
        if ref.how == "import":
            __import__(ref.module or "")
            hook = attribute(ref.module or "", ref.qualname or "")
            if hook is None:
                raise AttributeError(f"module {ref.module!r} has no {ref.qualname!r}")
            return hook  # type: ignore[no-any-return]
        assert ref.payload is not None, ref
        return pickle.loads(decode(ref.payload))  # type: ignore[no-any-return]
    except Exception as error:
        log.warning("the hook %s can't be loaded here and is left out: %s: %s", ref.name, type(error).__name__, error)
        return None
