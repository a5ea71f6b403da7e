"""`pw.resource`: one client a worker process, made on first use and closed when the process ends.

Called by users' steps. Faults: a process forks (the child makes its own); the loop that a client was made in is closed
(plain calls under `asyncio.run`: a new client is made for the next loop); `close` raises (logged). Rules:

* the live object is never shipped: a resource is pickled by the name it has in its module, or, where it has none that
  another process can import, as factory and close with an id, so that one process makes one of it however often it
  arrives;
* the factory runs in the worker's lasting loop where an async step asks first; what it starts there outlives the step.
"""

from __future__ import annotations

import asyncio
import atexit
import importlib
import inspect
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.context import outside_step
from pyworkflow_ray.execution.worker_loop import outside_attempt, worker_loop
from pyworkflow_ray.ids import new_id

log = logging.getLogger("pyworkflow_ray.resource")

T = TypeVar("T")


def resource(factory: Callable[[], T], close: Callable[[T], Any] | None = None) -> Resource[T]:
    """A client that steps share: `http = pw.resource(httpx.AsyncClient)` at module level, `http()` in a step.

    Args:
        factory: Makes the client, without arguments; called once a process, at first use, inside the running event
            loop where there is one.
        close: Called with the client when the process ends; may be an async function. None: nothing is called.

    Raises:
        ConfigurationError: `factory` or `close` is not callable, or `factory` is async.
    """
    return Resource(factory, close, _caller_module())


class Resource(Generic[T]):
    """Call it for the client of this process."""

    def __init__(
        self, factory: Callable[[], T], close: Callable[[T], Any] | None, module: str = "", uid: str = ""
    ) -> None:
        if not callable(factory):
            raise ConfigurationError(f"pw.resource: factory={factory!r} is not callable; give a function or class")
        if inspect.iscoroutinefunction(factory) or inspect.isasyncgenfunction(factory):
            raise ConfigurationError(
                "pw.resource: factory is async; give a plain function that makes the client: it is called inside the "
                "running event loop, so connecting can wait until the first request"
            )
        if close is not None and not callable(close):
            raise ConfigurationError(f"pw.resource: close={close!r} is not callable; give a function of the client")
        self._factory = factory
        self._close = close
        self._module = module
        self._uid = uid or new_id()
        self._lock = threading.Lock()
        self._made: list[_Made] = []

    def __call__(self) -> T:
        loop = _running_loop()
        with self._lock:
            for made in list(self._made):
                if made.pid != os.getpid():
                    self._made.remove(made)  # the parent's: a fork must not use, nor close, its connections
                elif made.loop is not None and made.loop.is_closed():
                    self._made.remove(made)
                    made.close_sync(self._close, self)
                elif made.loop is None or loop is None or made.loop is loop:
                    made.loop = made.loop or loop
                    return made.value  # type: ignore[no-any-return]
            value = outside_step(lambda: outside_attempt(self._factory))
            self._made.append(_Made(value, loop))
            _open.append(self) if self not in _open else None
            return value  # type: ignore[no-any-return]

    def close(self) -> None:
        """Close what this process has made; the next call makes a new one."""
        with self._lock:
            made, self._made = self._made, []
        for item in reversed(made):
            if item.pid == os.getpid():
                item.close(self._close, self)

    async def close_here(self) -> None:
        """Close what was made in the running loop, which is about to end."""
        loop = asyncio.get_running_loop()
        with self._lock:
            made = [item for item in self._made if item.loop is loop and item.pid == os.getpid()]
            self._made = [item for item in self._made if item not in made]
        for item in reversed(made):
            try:
                result = None if self._close is None else self._close(item.value)
                if inspect.isawaitable(result):
                    await result
            except Exception:
                log.warning("%r: close raised", self, exc_info=True)

    def __repr__(self) -> str:
        return f"<resource {getattr(self._factory, '__qualname__', self._factory)!s}>"

    def __reduce__(self) -> tuple[Any, ...]:
        name = _name_in(self._module, self)
        if name is not None:
            return (_find, (self._module, name))
        return (_arrive, (self._uid, self._factory, self._close))


class _Made:
    """A live client: the loop it is bound to, None while no async code has used it, and the process that made it."""

    def __init__(self, value: Any, loop: asyncio.AbstractEventLoop | None) -> None:
        self.value = value
        self.loop = loop
        self.pid = os.getpid()

    def close(self, close: Callable[[Any], Any] | None, owner: Any) -> None:
        if close is None:
            return
        try:
            result = close(self.value)
            if inspect.isawaitable(result):
                _run_to_end(result, self.loop)
        except Exception:
            log.warning("%r: close raised", owner, exc_info=True)

    def close_sync(self, close: Callable[[Any], Any] | None, owner: Any) -> None:
        """Where its loop is closed an async close can't run any more; its connections ended with the loop."""
        if close is not None and not inspect.iscoroutinefunction(close):
            try:
                result = close(self.value)
                if inspect.iscoroutine(result):
                    result.close()
            except Exception:
                log.warning("%r: close raised", owner, exc_info=True)


def _run_to_end(awaitable: Any, loop: asyncio.AbstractEventLoop | None) -> None:
    async def finish() -> None:
        await awaitable

    if loop is None or loop.is_closed():
        loop = worker_loop().loop
    if loop.is_running():
        asyncio.run_coroutine_threadsafe(finish(), loop)  # a loop that still runs ends it by itself
    else:
        loop.run_until_complete(asyncio.wait_for(finish(), 5.0))


# In this process --------------------------------------------------------------------------------------------------

_arrived: dict[str, Resource[Any]] = {}
_arrived_lock = threading.Lock()
_open: list[Resource[Any]] = []


def close_all() -> None:
    """Close every resource's client, the youngest first. Runs when the process ends."""
    while _open:
        _open.pop().close()


atexit.register(close_all)


async def close_here() -> None:
    """Close what was made in the running loop, the youngest first: the loop is about to end, the process is not."""
    for resource in reversed(list(_open)):
        await resource.close_here()


def _find(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _arrive(uid: str, factory: Callable[[], Any], close: Callable[[Any], Any] | None) -> Resource[Any]:
    with _arrived_lock:
        found = _arrived.get(uid)
        if found is None:
            found = _arrived[uid] = Resource(factory, close, uid=uid)
        return found


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _name_in(module: str, value: Any) -> str | None:
    """The variable that holds it in a module that another process can import."""
    from pyworkflow_ray.execution.definitions import is_importable

    if not module or not is_importable(module):
        return None
    for name, held in list(vars(sys.modules[module]).items()):
        if held is value:
            return name
    return None


def _caller_module() -> str:
    name = sys._getframe(2).f_globals.get("__name__")
    return name if isinstance(name, str) else ""
