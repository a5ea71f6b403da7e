"""The named actor that holds a circuit breaker's truth, and how the processes of the cluster come to it.

Called by the public `CircuitBreaker` (`link_for`), by the step task and the run actor (`guard_for`), and where a run
is started (`settings_of`). Calls `runtime.breaker_link` and the pure `resilience.mirror.Truth`, of which the actor is
a thin shell: it adds a clock, and waiting.

Faults: the actor may die at any time (`breaker_link` says what follows); its memory then comes back from the processes
that use it. A breaker that no living process knows begins closed.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid
from typing import Any

import ray

from pyworkflow_ray.engine.calls import StepCall
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.breakers import CircuitGuard, Declared, declare, declared
from pyworkflow_ray.resilience.breaker import BreakerSettings, View
from pyworkflow_ray.resilience.mirror import Message, Mirror, Reply, Truth
from pyworkflow_ray.runtime.breaker_link import WAIT_S, Link, new_process_id, session_id

NAMESPACE = "pyworkflow_ray"
GATHER_S = 0.05  # counts travel to the processes at most so often; changes of state at once
MAX_WATCHERS = 10_000  # calls that wait in the actor, one a process


class BreakerActor:
    """The one holder of a breaker's state. All methods run on one event loop, so none needs a lock."""

    def __init__(self, name: str, options: dict[str, Any], lineage: str) -> None:
        self._name = name
        self._truth = Truth(BreakerSettings.from_options(options), lineage)
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"breaker({self._name})"

    async def exchange(self, message: Message) -> Reply:
        """Reports, renewals and questions of one process."""
        before = self._truth.breaker.version
        reply = self._truth.handle(message, time.monotonic())
        if self._truth.breaker.version != before:
            self._announce()
        return reply

    async def watch(self, known: View, at_most_s: float) -> View:
        """The state once it differs from what the caller knows, or after `at_most_s`."""
        before = self._truth.breaker.version
        self._truth.meet(known, time.monotonic())
        if self._truth.breaker.version != before:
            self._announce()
        until = time.monotonic() + at_most_s
        while self._same(known) and time.monotonic() < until:
            await self._wait_for_change(until)
        gather_until = time.monotonic() + GATHER_S
        while self._truth.breaker.generation == known.generation and time.monotonic() < gather_until:
            await self._wait_for_change(gather_until)
        return self._truth.view(time.monotonic())

    async def settings(self) -> dict[str, Any]:
        return self._truth.breaker.settings.as_options()

    def _same(self, known: View) -> bool:
        return self._truth.lineage == known.lineage and self._truth.breaker.version == known.version

    async def _wait_for_change(self, until: float) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), max(0.0, until - time.monotonic()))
        except TimeoutError:
            return

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def actor_name(name: str) -> str:
    return f"breaker:{name}"


def _find(name: str) -> Any | None:
    try:
        return ray.get_actor(actor_name(name), namespace=NAMESPACE)
    except ValueError:
        return None


def _make(name: str, mirror: Mirror) -> Any:
    return (
        ray.remote(BreakerActor)
        .options(
            name=actor_name(name),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=MAX_WATCHERS,
            enable_task_events=False,
        )
        .remote(name, mirror.settings.as_options(), mirror.known.view.lineage or uuid.uuid4().hex)
    )


_LINKS: dict[str, Link] = {}
_LINKS_LOCK = threading.Lock()


def link_for(declaration: Declared) -> Link:
    """This process's link to the cluster's breaker of this name, made at first use. Ray must be initialised."""
    name = declaration.name
    link = _LINKS.get(name)
    if link is not None and link.serves():
        return link
    with _LINKS_LOCK:
        link = _LINKS.get(name)
        if link is not None:
            if link.serves():
                return link
            link.close()
        local = declaration.local.look()
        seed = local if local.version else None
        mirror = Mirror(new_process_id(), declaration.settings, seed=seed, now=time.monotonic())
        link = Link(name, mirror, lambda: _find(name), lambda mirror: _make(name, mirror), session_id() or "")
        _LINKS[name] = link
        return link


def guard_for(call: StepCall) -> CircuitGuard | None:
    """The breaker of a dispatched step; None where it has none. Call it once the step's code is loaded.

    The settings are those of this process's own object, which the step's module made; where it has none, those that
    travel with the call; else the living actor's. Before the guard lets an attempt through it knows at least what the
    run knew (`call.breaker_generation`), so a run never passes a breaker that its own earlier step has opened; what it
    has heard by the end is `guard.generation`, for `Outcome.breaker_generation`.

    Raises:
        ConfigurationError: nobody knows the breaker's name.
    """
    if call.breaker is None:
        return None
    here = declared(call.breaker)
    if here is None:
        options = call.breaker_settings or settings_of(call.breaker)
        here = declare(call.breaker, BreakerSettings.from_options(options))
    return CircuitGuard(link_for(here), call.breaker_generation)


def settings_of(name: str) -> dict[str, Any]:
    """The settings of the breaker of this name: of this process's object, else of the living actor.

    Raises:
        ConfigurationError: neither knows it.
    """
    here = declared(name)
    if here is not None:
        return here.settings.as_options()
    actor = _find(name)
    if actor is not None:
        options: dict[str, Any] = ray.get(actor.settings.remote(), timeout=WAIT_S)
        return options
    raise ConfigurationError(
        f"breaker={name!r}: no circuit breaker of this name is declared in this process or alive in the cluster: "
        f"declare it, CircuitBreaker(name={name!r}), or give the step the object itself"
    )


def _forget_links() -> None:
    global _LINKS_LOCK
    _LINKS.clear()
    _LINKS_LOCK = threading.Lock()


os.register_at_fork(after_in_child=_forget_links)  # the links' thread does not exist in a forked child
