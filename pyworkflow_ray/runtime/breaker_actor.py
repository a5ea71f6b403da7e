"""The named actor that holds a circuit breaker's truth, and how the processes of the cluster come to it.

Called by the public `CircuitBreaker` (`link_for`), by the step task and the run actor (`guard_for`), and where a run
is started (`settings_of`). Calls `runtime.breaker_link` and the pure `resilience.mirror.Truth`, of which the actor is
a thin shell: it adds a clock, and waiting.

Faults: the actor may die at any time (`breaker_link` says what follows); its memory then comes back from the processes
that use it, and states from the storage of the process that made it. What neither knows begins closed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
import uuid
from collections import Counter, OrderedDict
from typing import Any

import ray

from pyworkflow_ray.engine.calls import StepCall
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.breakers import CircuitGuard, Declared, declare, declared
from pyworkflow_ray.resilience.breaker import BreakerSettings, View
from pyworkflow_ray.resilience.breaker_settings import split_name
from pyworkflow_ray.resilience.mirror import Message, Mirror, Reply
from pyworkflow_ray.resilience.truth import Truth
from pyworkflow_ray.runtime.breaker_channel import KEY_IDLE_S, Channel, session_id
from pyworkflow_ray.runtime.breaker_line import Teller, Views
from pyworkflow_ray.runtime.breaker_link import WAIT_S, Link, new_process_id
from pyworkflow_ray.runtime.breaker_page import PageAddress, PageWriter
from pyworkflow_ray.runtime.line import Address
from pyworkflow_ray.runtime.messages import controller_name
from pyworkflow_ray.storage.port import breaker_states

log = logging.getLogger("pyworkflow_ray.breaker")

NAMESPACE = "pyworkflow_ray"
GATHER_S = 0.05  # counts travel to the processes at most so often; changes of state at once
MAX_KEPT = 10_000  # keys whose state is kept
MAX_WATCHERS = 10_000  # calls that wait in the actor, one a process


class _Cell:
    """One key's truth."""

    __slots__ = ("changed_at", "truth", "used_at")

    def __init__(self, truth: Truth, now: float) -> None:
        self.truth = truth
        self.used_at = now
        self.changed_at = 0  # in the count of the actor's changes


class BreakerActor:
    """The one holder of a breaker's state and of its keys'. All methods run on one event loop: none needs a lock."""

    def __init__(self, name: str, options: dict[str, Any], lineage: str, root: str | None = None) -> None:
        self._name = name
        self._settings = BreakerSettings.from_options(options)
        self._lineage = lineage
        self._incarnation = uuid.uuid4().hex
        self._cells: OrderedDict[str | None, _Cell] = OrderedDict()  # the latest used last
        self._changes = 0
        self._urgent = 0  # the latest change of a state
        self._changed = asyncio.Event()
        self._kept = None if root is None else breaker_states(root, name)
        self._saving: asyncio.Task[None] | None = None
        self._saved = 0  # the latest change of a state that is kept
        self._teller = Teller(ray.get_runtime_context().get_node_id(), lambda: self._said_since(None))
        self._page = PageWriter()
        self._telling: asyncio.TimerHandle | None = None
        self._untold: dict[str | None, _Cell] = {}  # what has changed since the line told
        self._transitions: Counter[tuple[str | None, str, str]] = Counter()  # (key, from, to), since this start
        self._restore()

    def __repr__(self) -> str:
        return f"breaker({self._name})"

    async def exchange(self, messages: list[tuple[str | None, Message]]) -> list[Reply]:
        """Reports, renewals and questions of one process."""
        replies = []
        for key, message in messages:
            now = time.monotonic()
            cell = self._cell(key, now)
            before, was = cell.truth.breaker.version, self._kept_of(cell)
            stood = cell.truth.breaker.state
            replies.append(cell.truth.handle(message, now))
            if cell.truth.declared.replaces(self._settings):
                self._settings = cell.truth.declared
            for after_s, who, (storage_id, run_id) in cell.truth.recalls(now):
                asyncio.get_running_loop().call_later(after_s, self._recall, cell, who, storage_id, run_id)
            if cell.truth.breaker.state is not stood:
                self._transitions[key, str(stood), str(cell.truth.breaker.state)] += 1
            if cell.truth.breaker.version != before:
                self._announce(key, cell, urgent=self._kept_of(cell) != was)
        self._drop_idle(time.monotonic())
        return replies

    async def watch(
        self, cursor: tuple[str, int] | None, at_most_s: float
    ) -> tuple[tuple[str, int], list[tuple[str | None, View]]]:
        """What has changed since `cursor`, once something has, or after `at_most_s`; and the cursor from then on."""
        until = time.monotonic() + at_most_s
        since = cursor[1] if cursor is not None and cursor[0] == self._incarnation else None
        if since is not None:
            while self._changes == since and time.monotonic() < until:
                await self._wait_for_change(until)
            gather_until = time.monotonic() + GATHER_S
            while self._urgent <= since and time.monotonic() < gather_until:
                await self._wait_for_change(gather_until)
        return (self._incarnation, self._changes), self._said_since(since)

    async def line(self) -> tuple[Address | None, PageAddress | None]:
        """Where processes of this node hear of changes at once, and where they see changes of state even sooner."""
        return await self._teller.address(), self._page.address

    async def snapshot(self) -> list[tuple[str | None, View]]:
        """The breaker, and all keys of which there is something to say."""
        now = time.monotonic()
        return [(key, cell.truth.view(now)) for key, cell in self._cells.items() if key is None or not cell.truth.idle]

    async def transitions(self) -> tuple[str, list[tuple[str | None, str, str, int]]]:
        """How often its state, and its keys' states, have changed since this start of the actor, which is named."""
        return self._incarnation, [(*change, number) for change, number in self._transitions.items()]

    async def keys_held(self) -> int:
        return len(self._cells)

    async def settings(self) -> dict[str, Any]:
        return self._settings.as_declared()

    def _restore(self) -> None:
        """Begin with what was kept; what mirrors know better they show, and it is taken over."""
        kept = None if self._kept is None else self._kept.load()
        if kept is None:
            return
        states, saved_at = kept
        now, age_s = time.monotonic(), time.time() - saved_at
        for key, state in states:
            try:
                self._cell(key, now).truth.restore(state, age_s, now)
            except (KeyError, TypeError, ValueError) as error:
                log.error("circuit breaker %r: the kept state of key %r can't be used: %r", self._name, key, error)

    def _keep(self) -> None:
        """A state has changed: write it down, in the background; what changes meanwhile goes along or comes after."""
        if self._kept is not None and (self._saving is None or self._saving.done()):
            self._saving = asyncio.get_running_loop().create_task(self._save())

    async def _save(self) -> None:
        assert self._kept is not None
        while self._saved < self._urgent:
            now, upto = time.monotonic(), self._urgent
            states = [(key, cell.truth.save(now)) for key, cell in self._cells.items() if not cell.truth.idle]
            try:
                await asyncio.to_thread(self._kept.save, states[-MAX_KEPT:], time.time())
            except OSError as error:
                log.warning("circuit breaker %r: its state can't be kept in %s: %s", self._name, self._kept.path, error)
                return
            self._saved = upto

    def _cell(self, key: str | None, now: float) -> _Cell:
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = _Cell(Truth(self._settings, self._lineage), now)
        cell.used_at = now
        self._cells.move_to_end(key)
        return cell

    @staticmethod
    def _kept_of(cell: _Cell) -> tuple[int, BreakerSettings]:
        """What of a state is told at once, and kept; counts are not."""
        return cell.truth.breaker.generation, cell.truth.breaker.settings

    def _drop_idle(self, now: float) -> None:
        """Forget keys that say nothing and were not used for a while: a few an exchange, the longest unused first."""
        for key in list(itertools.islice(self._cells, 4)):
            cell = self._cells[key]
            if now - cell.used_at < KEY_IDLE_S:
                break
            if key is not None and cell.truth.idle:
                del self._cells[key]
            else:
                cell.used_at = now
                self._cells.move_to_end(key)

    def _recall(self, cell: _Cell, who: str, storage_id: str, run_id: str) -> None:
        """A run that waits may come now; where it can't be told, it comes when it was due."""
        if cell.truth.waiters.waits(who):
            # Looking an actor up blocks.
            asyncio.get_running_loop().run_in_executor(None, self._wake_run, storage_id, run_id)

    def _wake_run(self, storage_id: str, run_id: str) -> None:
        try:
            ray.get_actor(controller_name(storage_id), namespace=NAMESPACE).wake.remote(run_id)
        except Exception as error:
            log.debug("circuit breaker %r: run %r can't be woken: %r", self._name, run_id, error)

    def _said_since(self, since: int | None) -> Views:
        """What has changed since; None: all that there is to say."""
        now = time.monotonic()
        return [
            (key, cell.truth.view(now))
            for key, cell in self._cells.items()
            if (cell.changed_at > since if since is not None else not cell.truth.idle)
        ]

    def _tell(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        now, untold = time.monotonic(), self._untold
        self._untold = {}
        self._teller.tell([(key, cell.truth.view(now)) for key, cell in untold.items()])

    async def _wait_for_change(self, until: float) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), max(0.0, until - time.monotonic()))
        except TimeoutError:
            return

    def _announce(self, key: str | None, cell: _Cell, *, urgent: bool) -> None:
        self._changes += 1
        cell.changed_at = self._changes
        self._untold[key] = cell
        if urgent:
            self._urgent = self._changes
            self._page.write(key, cell.truth.view(time.monotonic()))
            self._tell()
            self._keep()
        elif self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(GATHER_S, self._tell)
        self._changed.set()
        self._changed = asyncio.Event()


def actor_name(name: str) -> str:
    return f"breaker:{name}"


def _find(name: str) -> Any | None:
    try:
        return ray.get_actor(actor_name(name), namespace=NAMESPACE)
    except ValueError:
        return None


def _make(name: str, settings: BreakerSettings, lineage: str) -> Any:
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
        .remote(name, settings.as_declared(), lineage or uuid.uuid4().hex, _ROOT)
    )


_ROOT: str | None = None  # the storage of this process


def keep_in(root: str) -> None:
    """Breakers that this process makes from now on keep their states in this storage."""
    global _ROOT
    _ROOT = root


_LINKS: dict[str, Link] = {}  # by full name
_CHANNELS: dict[str, Channel] = {}
_LINKS_LOCK = threading.Lock()


def link_for(declaration: Declared) -> Link:
    """This process's link to the cluster's breaker of this name, made at first use. Ray must be initialised."""
    full = declaration.name
    link = _LINKS.get(full)
    if link is not None and link.serves():
        if declaration.settings.replaces(link.mirror.settings):
            link.declare_anew(declaration.settings, declaration.counts)
        return link
    with _LINKS_LOCK:
        link = _LINKS.get(full)
        if link is not None and link.serves():
            return link
        channel = _channel(declaration)
        for other in [other for other, one in _LINKS.items() if one.retired]:
            del _LINKS[other]
        local = declaration.local.look()
        mirror = Mirror(
            new_process_id(),
            declaration.settings,
            seed=local if local.version else None,
            now=time.monotonic(),
            node=ray.get_runtime_context().get_node_id(),
        )
        link = _LINKS[full] = Link(full, mirror, channel, declaration.counts)
        return link


def _channel(declaration: Declared) -> Channel:
    name, settings = split_name(declaration.name)[0], declaration.settings
    channel = _CHANNELS.get(name)
    if channel is not None and not channel.closed and channel.session_lives():
        return channel
    if channel is not None:
        channel.close()
    channel = Channel(name, lambda: _find(name), lambda lineage: _make(name, settings, lineage), session_id() or "")
    _CHANNELS[name] = channel
    return channel


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
    here, travelled = declared(call.breaker), call.breaker_settings
    if here is None or (travelled and BreakerSettings.from_options(travelled).replaces(here.settings)):
        options = travelled or settings_of(call.breaker)
        here = declare(call.breaker, BreakerSettings.from_options(options))
    who, run = f"{call.run_uid}:{call.position}", (call.storage_id, call.run_id)
    return CircuitGuard(link_for(here), call.breaker_generation, who, run)


def settings_of(name: str) -> dict[str, Any]:
    """The settings of the breaker of this name: of this process's object, else of the living actor.

    Raises:
        ConfigurationError: neither knows it.
    """
    here = declared(name)
    if here is not None:
        return here.settings.as_declared()
    actor = _find(split_name(name)[0])
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
    _CHANNELS.clear()
    _LINKS_LOCK = threading.Lock()


os.register_at_fork(after_in_child=_forget_links)  # the links' thread does not exist in a forked child
