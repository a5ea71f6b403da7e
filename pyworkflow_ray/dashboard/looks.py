"""What the storage says, for pages: read in threads, once for all who ask at the same time.

Called by `pages` and `live`; calls `reading`, which needs no Ray. Looks at one thing are shared: whoever asks while one
is under way, or shortly after, is given its answer, so that ten open pages of a run read it once. After a deed
everything is read anew.

Faults: the storage is not there yet (no runs; it is looked for each time), a run that is damaged or gone (the error of
`reading`), a look that takes long (it is repeated the less often, see `Look.took_s`).
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from anyio import CapacityLimiter, to_thread

from pyworkflow_ray.breakers import kept_breakers
from pyworkflow_ray.observability.model import RunView
from pyworkflow_ray.reading import Filter, Listed, Reader

if TYPE_CHECKING:
    from pyworkflow_ray.breaker import BreakerSnapshot
    from pyworkflow_ray.storage.port import StoragePort

T = TypeVar("T")

FRESH_S: Final = 0.5
KEPT: Final = 64  # looks: an answer is a page of views
THREADS: Final = 4
SEARCH_S: Final = 0.2  # of looking for runs that only show by being read whether they are wanted


@dataclass(frozen=True)
class Look(Generic[T]):
    """What was seen, what it took, and when that was, by `time.monotonic`."""

    seen: T
    took_s: float
    at: float


class Looks:
    """See the module. For one event loop."""

    def __init__(self, root: Path | str, zone: dt.tzinfo) -> None:
        self.root = root
        self._zone = zone
        self._storage: StoragePort | None = None
        self._shared: dict[Hashable, tuple[asyncio.Future[Look[Any]], float]] = {}
        self._threads = CapacityLimiter(THREADS)
        self._lists = CapacityLimiter(1)  # the first list of a large storage makes the next ones quick: no two at once
        self._warming: asyncio.Future[Look[Listed]] | None = None

    async def listing(self, wanted: Filter, limit: int, before: str | None) -> Look[Listed]:
        """A page of the list; it gives up searching in time for the page to be quick."""
        key = ("list", repr(wanted), limit, before)

        def look() -> Listed:
            return self._reader().listing(wanted, limit, before, SEARCH_S)

        return await self.once(key, lambda: to_thread.run_sync(look, limiter=self._lists))

    def warm(self) -> None:
        """Have the storage looked at before anybody asks: what is first is slow."""
        self._warming = asyncio.ensure_future(self.listing(Filter(), 1, None))
        self._warming.add_done_callback(_heard)

    async def run(self, run_id: str) -> Look[RunView]:
        """One run, explained.

        Raises:
            RunNotFoundError: the storage has no such run. StorageError: it can't be read.
        """
        return await self._read(("run", run_id), lambda: self._reader().view(run_id))

    async def kept_breakers(self) -> Look[list[tuple[BreakerSnapshot, float]]]:
        """The breakers as the storage keeps them, with their ages in seconds."""

        def look() -> list[tuple[BreakerSnapshot, float]]:
            storage = self._reader().storage
            return [] if storage is None else kept_breakers(storage, time.time())

        return await self._read(("breakers",), look)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Work that would hold up the loop."""
        return await to_thread.run_sync(work, limiter=self._threads)

    def forget(self) -> None:
        """Something was done: what was seen before is old."""
        self._shared.clear()

    async def once(self, key: Hashable, look: Callable[[], Awaitable[T]]) -> Look[T]:
        """What `look` gives; whoever asks for the same meanwhile, or shortly after, is given it too."""
        now = time.monotonic()
        kept = self._shared.get(key)
        if kept is None or (kept[0].done() and now > _fresh_until(*kept)):
            for old in [one for one, (future, _) in self._shared.items() if future.done()][:-KEPT]:
                del self._shared[old]
            kept = self._shared[key] = (asyncio.ensure_future(_timed(look)), now)
            kept[0].add_done_callback(_heard)
        return await asyncio.shield(kept[0])

    async def _read(self, key: Hashable, read: Callable[[], T]) -> Look[T]:
        return await self.once(key, lambda: self.in_thread(read))

    def _reader(self) -> Reader:
        """A reader for one look: it asks but once whether an owner lives. The storage is opened once it is there."""
        from pyworkflow_ray.storage.port import open_storage

        if self._storage is None and not (isinstance(self.root, Path) and not self.root.exists()):
            self._storage = open_storage(self.root, create=False)
        return Reader(self._storage, self.root, self._zone)


async def _timed(look: Callable[[], Awaitable[T]]) -> Look[T]:
    began = time.perf_counter()
    seen = await look()
    return Look(seen, time.perf_counter() - began, time.monotonic())


def _fresh_until(future: asyncio.Future[Look[Any]], began: float) -> float:
    """What took long is kept the longer, or it would be old before anybody has come back for it."""
    if future.cancelled() or future.exception() is not None:
        return began + FRESH_S
    look = future.result()
    return look.at + max(FRESH_S, 3 * look.took_s)


def _heard(future: asyncio.Future[Look[Any]]) -> None:
    """Whoever asked may have gone: the error is theirs, and nobody else is to be told of it."""
    if not future.cancelled():
        future.exception()
