"""How a process talks to a breaker's actor: one conversation for all keys, and the thread that holds it.

Called by `breaker_link` (guarded calls) and `breaker_actor` (which hands in how to reach the actor). One daemon thread
a process, with an event loop, does all that concerns Ray for all breakers; listeners are told in another.

Faults:

* The actor dies: it restarts, or is made again, and each process shows it what it knew.
* A message or its answer is lost: it is sent again, and counts once.
* Ray is shut down, or another is initialised: the channel ends, what waits for it goes on.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray

from pyworkflow_ray.execution.permits import changed, listened, opened
from pyworkflow_ray.resilience.breaker import PERMIT_LEASE_S, Answer, BreakerState, View
from pyworkflow_ray.runtime.breaker_line import Views, follow
from pyworkflow_ray.runtime.breaker_page import Page
from pyworkflow_ray.runtime.line import Address

if TYPE_CHECKING:
    from pyworkflow_ray.runtime.breaker_link import Link

log = logging.getLogger("pyworkflow_ray.breaker")

CALL_TIMEOUT_S = 10.0
WATCH_S = 30.0
KEY_IDLE_S = 60.0  # a key's link that nobody has used for so long is dropped
MAX_HEARD = 10_000  # keys whose state is remembered for listeners
BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)


class Channel:
    """One breaker's conversation. All methods run in the breakers' thread, save where they say otherwise.

    Args:
        name: Of the breaker, without key.
        find: The breaker's actor, None where there is none.
        make: Make it, given the lineage that its state is known under ("" where none is).
        session: Identity of the Ray session that it belongs to.
    """

    def __init__(self, name: str, find: Callable[[], Any], make: Callable[[str], Any], session: str) -> None:
        self.name = name
        self.session = session
        self.closed = False
        self.warned = False  # that the actor does not answer
        self.down_since: float | None = None  # read by any thread
        self.links: set[Link] = set()
        self.page: Page | None = None
        self.loop = breaker_loop()
        self._find = find
        self._make = make
        self._actor: Any = None
        self._cursor: tuple[str, int] | None = None
        self._heard: OrderedDict[str | None, View] = OrderedDict()
        self._tasks: list[asyncio.Task[None]] = []
        self._wake: asyncio.Event
        self.loop.call_soon_threadsafe(self._start)

    def close(self) -> None:
        """The Ray session has ended: let go of all that waits. Any thread."""
        self.loop.call_soon_threadsafe(self.end)

    def session_lives(self) -> bool:
        """Whether this process still belongs to the same Ray. Any thread."""
        return session_id() == self.session

    def unreachable(self, now: float, after_s: float) -> bool:
        """Whether the actor has not answered for so long. Any thread."""
        down = self.down_since
        return down is not None and now - down >= after_s

    def wake(self, link: Link) -> None:
        """A link has something to say."""
        if link not in self.links:
            self.links.add(link)
            link.look_at(self.page)
        self._wake.set()

    def end(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._actor = None
        for link in list(self.links):
            link.let_go()
        for task in self._tasks:
            task.cancel()

    # Tasks --------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._wake = asyncio.Event()
        self._tasks = [self.loop.create_task(work()) for work in (self._serve, self._watch, self._look_after)]

    async def _serve(self) -> None:
        failed = 0
        while not self.closed:
            speaking = [(link, message) for link in self.links if (message := link.mirror.next_message()) is not None]
            if not speaking:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                replies = await self._send([(link.key, message) for link, message in speaking])
            except Exception as error:
                if not self.session_lives():
                    self.end()
                    return
                log.debug("circuit breaker %r: no answer from its actor: %r", self.name, error)
                self._actor = None
                if self.down_since is None:
                    self._is_down(time.monotonic())
                await asyncio.sleep(BACKOFF_S[min(failed, len(BACKOFF_S) - 1)])
                failed += 1
                continue
            failed = 0
            if self.down_since is not None:
                self._is_down(None)
            now = time.monotonic()
            for (link, _), reply in zip(speaking, replies, strict=True):
                if reply.opened:
                    _LISTENING.submit(opened, self.name, link.key, reply.view)
                self.hear(link.key, reply.view, now)
                link.receive(reply, now)

    def _is_down(self, since: float | None) -> None:
        self.down_since = since
        for link in self.links:
            link.publish()

    async def _send(self, messages: list[Any]) -> Any:
        if not self.session_lives():
            raise ConnectionError("Ray is not initialised any more")
        if self._actor is None:
            self._actor = self._find()
        if self._actor is None:
            for link in self.links:
                link.join_is_over()  # nobody to join: calls pass while the actor is made
            lineage = next((link.mirror.known.view.lineage for link in self.links if link.mirror.known.joined), "")
            self._actor = self._make(lineage)
        return await asyncio.wait_for(
            asyncio.wrap_future(self._actor.exchange.remote(messages).future()), CALL_TIMEOUT_S
        )

    async def _watch(self) -> None:
        """Hear of changes: by the line on the actor's node, else by a call that it answers when something changes."""
        while not self.closed:
            if self._actor is None or not any(link.mirror.known.joined for link in self.links):
                await asyncio.sleep(0.05)
                continue
            try:
                if not self.session_lives():
                    self.end()
                    return
                if await self._follow_line():
                    self._show()  # the actor is gone, or has cut us off
                    continue
                seen = self._actor.watch.remote(self._cursor, WATCH_S)
                cursor, views = await asyncio.wait_for(asyncio.wrap_future(seen.future()), WATCH_S + CALL_TIMEOUT_S)
                if self._cursor is not None and cursor[0] != self._cursor[0]:
                    self._show()
                for key, view in views:
                    self.hear(key, view, time.monotonic())
                self._cursor = cursor
            except Exception as error:
                log.debug("circuit breaker %r: watching its actor failed: %r", self.name, error)
                self._show()  # finds the actor again
                await asyncio.sleep(0.2)

    async def _follow_line(self) -> bool:
        """Hear of changes until the line ends; False: there is none to this process."""
        asked = asyncio.wrap_future(self._actor.line.remote().future())
        address: Address | None
        address, seen_at = await asyncio.wait_for(asked, CALL_TIMEOUT_S)
        if address is None or address.node != ray.get_runtime_context().get_node_id():
            return False
        self.page = Page.open(seen_at) if seen_at is not None else None
        for link in self.links:
            link.look_at(self.page)

        def hear(views: Views) -> None:
            for key, view in views:
                self.hear(key, view, time.monotonic())
            self._cursor = self._cursor or ("", 0)

        try:
            await follow(address, hear)
        except OSError as error:
            log.debug("circuit breaker %r: no line to its actor: %s", self.name, error)
            return False
        return True

    def _show(self) -> None:
        """The actor may have been restarted: show it what we know."""
        for link in self.links:
            link.mirror.look()
        self._wake.set()

    async def _look_after(self) -> None:
        """Renew the permits of calls that run; drop what nobody uses."""
        while not self.closed:
            await asyncio.sleep(PERMIT_LEASE_S / 3)
            now = time.monotonic()
            for link in list(self.links):
                for permit in link.permits:
                    link.mirror.renew(permit)
                if link.permits:
                    self._wake.set()
                elif link.key is not None and now - link.used_at > KEY_IDLE_S and not link.mirror.busy:
                    self.links.discard(link)
                    link.retire()

    def hear(self, key: str | None, view: View, now: float) -> None:
        """What the actor says of a key's state."""
        for link in self.links:
            if link.key == key:
                link.learn(view, now)
        known = self._heard.get(key)
        if known is not None and known.lineage == view.lineage and known.version > view.version:
            return
        self._heard[key] = view
        self._heard.move_to_end(key)
        if len(self._heard) > MAX_HEARD:
            self._heard.popitem(last=False)
        was = known.state if known is not None else BreakerState.CLOSED
        joining = known is None and self._cursor is None
        if view.state is not was and not joining and listened(self.name):
            _LISTENING.submit(changed, self.name, key, was, view)


def session_id() -> str | None:
    """Identity of this process's connection to Ray; None without one. Never initialises Ray."""
    if not ray.is_initialized():
        return None
    try:
        return str(ray.get_runtime_context().get_worker_id())
    except Exception:  # it was shut down just now
        return None


def resolve(future: Future[Any], value: Any) -> bool:
    """Set the result; False where its waiter had given up, or has a result already."""
    with _RESOLVE_LOCK:
        if future.cancelled() or future.done():
            return False
        future.set_result(value)
        return True


def given(answer: Answer | None) -> int | None:
    """The permit that an answer brings, of the breaker or of the node's own."""
    if answer is None:
        return None
    return answer.permit if answer.permit is not None or answer.aside is None else answer.aside[1]


# The threads ------------------------------------------------------------------------------------------------------

_RESOLVE_LOCK = threading.RLock()
_THREAD_LOCK = threading.Lock()
_THREAD: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None
_LISTENING = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pyworkflow-ray listeners")


def breaker_loop() -> asyncio.AbstractEventLoop:
    """The loop of this process's breaker thread; a forked child gets its own."""
    global _THREAD
    with _THREAD_LOCK:
        if _THREAD is None:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="pyworkflow-ray breakers", daemon=True)
            thread.start()
            _THREAD = (loop, thread)
            atexit.register(_stop, *_THREAD)  # runs before Ray's own, which was registered earlier
        return _THREAD[0]


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if thread.is_alive():
        loop.call_soon_threadsafe(loop.stop)
        thread.join(1.0)


def _forget_threads() -> None:
    global _THREAD, _THREAD_LOCK, _LISTENING
    _THREAD, _THREAD_LOCK = None, threading.Lock()
    _LISTENING = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pyworkflow-ray listeners")


os.register_at_fork(after_in_child=_forget_threads)
