"""One `step.map` of a body: draws items, opens chunks, takes their ends in. docs/decisions/0009 tells the whole story.

Pure. Made by `loop.map_items` in the body's own task; fed by `machine`; the driver takes opened chunks from it. Rules:

* Items are drawn in the body's task and at recorded places only: `concurrency` chunks to begin with, one more chunk
  each time a whole chunk has ended. So replay draws the same items at the same places, and an endless iterable works.
* A chunk may end in parts (after a worker was lost): it has ended when all of its parts have. Items that wait for a
  far retry then are late: they keep no worker and hold no other chunk up.
* Items are kept while their chunk is open, and those of failed items for ever: they can be tried again.
* It stops early once more items have failed than `max_failures` or `max_ratio` allow: nothing more is drawn, what runs
  is cancelled, and what was done is reported.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyworkflow_ray.engine.calls import MapRequest
from pyworkflow_ray.engine.events import ChunkCompleted, CodeRef, MapScheduled, Payload, StepCancelled
from pyworkflow_ray.errors import UNREADABLE, ItemNotDoneError

if TYPE_CHECKING:
    from pyworkflow_ray.engine.loop import WorkflowLoop

RATIO_SAMPLE = 100  # of an iterable of unknown length a ratio is judged once so many items are done


@dataclass(slots=True)
class MapOutcome:
    """What a map came to. `results`: one an item that was drawn: its value, or its exception.

    failed: index and exception. not_done: indices of items that were drawn and did not end, for the map stopped early.
    position: of the map. inputs: by index, the items that failed or are not done. stopped: why it stopped early.
    retried: attempts made again, by error type.
    """

    results: list[Any] = field(default_factory=list)
    failed: list[tuple[int, Exception]] = field(default_factory=list)
    not_done: list[int] = field(default_factory=list)
    inputs: dict[int, Any] = field(default_factory=dict)
    stopped: str | None = None
    retried: dict[str, int] = field(default_factory=dict)
    position: str = ""


@dataclass(slots=True)
class _Chunk:
    first: int
    items: list[Any]
    left: int


class _Pending:
    """Stands in the results for an item that has not ended."""

    def __repr__(self) -> str:
        return "<not done>"


_PENDING = _Pending()


class MapInProgress:
    """See the module. `opened` are the chunks that nobody has taken up yet."""

    def __init__(self, loop: WorkflowLoop, request: MapRequest, items: Iterable[Any], total: int | None) -> None:
        self.opened: list[tuple[int, int]] = []
        self.total = total
        self._loop = loop
        self._request = request
        self._items: Iterator[Any] = iter(items)
        self._chunks: dict[int, _Chunk] = {}
        self._late: dict[int, Any] = {}  # items of ended chunks that are to be tried again
        self._outcome = MapOutcome()
        self._failed = 0
        self._done = 0
        self._exhausted = False
        self._ended_early = False
        self._wakes: asyncio.Future[None] | None = None
        self._peeked: list[Any] = []

    # In the body's task ------------------------------------------------------------------------------------------

    async def run(self, position: str) -> MapOutcome:
        """To the end of all items, or to an early stop. The position is that of `map_scheduled`."""
        loop = self._loop
        try:
            while True:
                self._draw()
                if not self._is_open():
                    break
                self._wakes = loop.create_future()
                await self._wakes
                self._outcome.stopped = self._too_many()
                if self._outcome.stopped is not None:
                    break
        finally:
            # also when the items' own iterator raises, or the body no longer waits: what runs is cancelled
            if loop.maps.pop(position, None) is not None and self._is_open() and not loop.evicted:
                loop.emit(StepCancelled(at=loop.now_s, position=position))
        self._close()
        self._outcome.position = position
        return self._outcome

    def _is_open(self) -> bool:
        return bool(self._chunks or self._late)

    def look_ahead(self) -> None:
        """Learn whether there is a first item at all: an empty map has a known length."""
        self._peek()
        if self._exhausted and not self._peeked:
            self.total = 0

    def _draw(self) -> None:
        while not self._exhausted and len(self._chunks) < self._request.concurrency:
            self._peek()
            items, self._peeked = self._peeked, []
            items += itertools.islice(self._items, self._request.chunk_size - len(items))
            if not items:
                self._exhausted = True
                return
            self._peek()
            first = len(self._outcome.results)
            self._outcome.results += [_PENDING] * len(items)
            self._chunks[first] = _Chunk(first, items, len(items))
            self.opened.append((first, len(items)))

    def _peek(self) -> None:
        """One item ahead, so that the last chunk is known to be the last when it is opened."""
        if not self._peeked and not self._exhausted:
            self._peeked = list(itertools.islice(self._items, 1))
            self._exhausted = not self._peeked

    def _too_many(self) -> str | None:
        most, ratio = self._request.max_failures, self._request.max_ratio
        if most is not None and self._failed > most:
            return f"{self._failed} items failed (max_failures={most})"
        if ratio is not None:
            of = self.total if self.total is not None else self._done
            if self._failed > ratio * of and (self.total is not None or self._done >= RATIO_SAMPLE):
                return f"{self._failed} of {of} items failed (max_ratio={ratio:g})"
        return f"{self._failed} items failed" if self._ended_early else None

    def _close(self) -> None:
        outcome = self._outcome
        for index, value in enumerate(outcome.results):
            if value is _PENDING:
                outcome.not_done.append(index)
                if self.holds(index, 1):
                    outcome.inputs[index] = self.items(index, 1)[0]
                outcome.results[index] = ItemNotDoneError(
                    f"item {index} was not executed to its end, for the map stopped early: {outcome.stopped}",
                    index=index,
                )
        outcome.failed.sort(key=lambda pair: pair[0])
        self._chunks.clear()
        self._late.clear()
        self._peeked.clear()

    # From the machine and the driver -------------------------------------------------------------------------------

    def take_opened(self) -> list[tuple[int, int]]:
        """(first, count) of each run of items that was opened since the last call and has not ended."""
        opened, self.opened = self.opened, []
        runs: list[tuple[int, int]] = []
        for first, count in opened:
            pending = [self._outcome.results[index] is _PENDING for index in range(first, first + count)]
            at = first
            for open_, group in itertools.groupby(pending):
                length = len(list(group))
                if open_:
                    runs.append((at, length))
                at += length
        return runs

    def holds(self, first: int, count: int) -> bool:
        """Whether these items are open."""
        late = all(index in self._late for index in range(first, first + count))
        return late or self._chunk(first, count) is not None

    def is_last(self, first: int, count: int) -> bool:
        """Whether no item follows these."""
        return self._exhausted and not self._peeked and first + count == len(self._outcome.results)

    def items(self, first: int, count: int) -> list[Any]:
        """The items of an open chunk, or of a part of one."""
        chunk = self._chunk(first, count)
        if chunk is None:
            return [self._late[index] for index in range(first, first + count)]
        return chunk.items[first - chunk.first : first - chunk.first + count]

    def failures_left(self) -> int | None:
        """How many more items may fail before the map stops; None: any."""
        request, limits = self._request, []
        if request.max_failures is not None:
            limits.append(request.max_failures)
        if request.max_ratio is not None and self.total is not None:
            limits.append(int(request.max_ratio * self.total))
        return max(0, min(limits) - self._failed) if limits else None

    def completed(self, event: ChunkCompleted) -> None:
        """A chunk, or a part of one, has ended: fill in what came of it and wake the body where the chunk is whole."""
        chunk = self._chunk(event.first, event.count)
        pending = self._fill(event, chunk.items[event.first - chunk.first :] if chunk else self._late_items(event))
        self._ended_early = self._ended_early or (event.done < event.count and not event.redo)
        if chunk is not None:
            chunk.left -= event.count
            # Items that are to be tried again do not keep the next chunk waiting. Those of a chunk that ended early
            # stay with it: the map stops.
            if event.done == event.count or event.redo:
                self._late.update(pending)
            over = chunk.left == 0
            if over and (event.done == event.count or event.redo):
                del self._chunks[chunk.first]
        else:
            for index in range(event.first, event.first + event.count):
                if index not in pending:
                    del self._late[index]
            over = not self._late
        if over or self._too_many() is not None:
            self._wake()

    def _wake(self) -> None:
        if self._wakes is not None and not self._wakes.done():
            self._wakes.set_result(None)

    def _fill(self, event: ChunkCompleted, items: list[Any]) -> dict[int, Any]:
        """Put the values in their places; gives the items that have not ended. `items` are those from `first` on."""
        outcome = self._outcome
        codec = self._loop.codec.at(self._loop.run_id, event.position)
        failed = {failure.index: failure.error for failure in event.failures}
        again = {item.index for item in event.waiting} | (failed.keys() if event.redo else set())
        values = _values(codec, event)
        pending: dict[int, Any] = {event.first + n: items[n] for n in range(event.done, event.count)}
        for offset in range(event.done):
            index = event.first + offset
            if index in again:
                pending[index] = items[offset]
                continue
            number = failed.get(index)
            value = codec.decode_error(event.errors[number]) if number is not None else values[offset]
            if number is not None or isinstance(value, _Broken):
                failure: Any = value.error if isinstance(value, _Broken) else value
                outcome.results[index] = failure
                outcome.failed.append((index, failure))
                outcome.inputs[index] = items[offset]
                self._failed += 1
            else:
                outcome.results[index] = value
        self._done += event.done - len(again)
        for name, count in event.retried.items():
            outcome.retried[name] = outcome.retried.get(name, 0) + count
        return pending

    def _late_items(self, event: ChunkCompleted) -> list[Any]:
        return [self._late[index] for index in range(event.first, event.first + event.count)]

    def _chunk(self, first: int, count: int) -> _Chunk | None:
        """The open chunk that these items are in, None where they are late ones."""
        if first in self._late:
            return None
        whole = self._chunks.get(first)
        if whole is not None and count <= len(whole.items):
            return whole
        for chunk in self._chunks.values():
            if chunk.first <= first and first + count <= chunk.first + len(chunk.items):
                return chunk
        return None


class _Broken:
    """A value that can't be restored here."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _values(codec: Any, event: ChunkCompleted) -> list[Any]:
    """The values of the chunk's items, None for a failed one."""
    if event.results is None:
        return [None] * event.done
    try:
        stored = codec.decode(event.results)
    except UNREADABLE:
        raise
    except Exception as error:
        return [_Broken(error)] * event.done
    if not event.single:
        return list(stored)
    values: list[Any] = []
    for one in stored:
        try:
            values.append(None if one is None else codec.decode(Payload.model_validate(one)))
        except UNREADABLE:
            raise
        except Exception as error:
            values.append(_Broken(error))
    return values


def map_event(
    request: MapRequest, code: CodeRef, position: str, number: int, total: int | None, at: float
) -> MapScheduled:
    """The command that records a map."""
    return MapScheduled(
        at=at,
        position=position,
        number=number,
        step=request.step,
        code=code,
        policy=request.policy,
        executor=request.executor,
        ray_options=request.ray_options,
        breaker=request.breaker,
        chunk_size=request.chunk_size,
        concurrency=request.concurrency,
        total=total,
        max_failures=request.max_failures,
        max_ratio=request.max_ratio,
    )
