"""What is kept of a step's attempts: the first and the last whole, those between as counts by error type.

Called by `worker`, and by the shell that streams them to the run's owner (`take`, from a thread of its own). Rules:

* attempts that follow each other at once or after less than `FAST_S` are recorded together (`AttemptsFailed`), and told
  together where the shell gathers them: a record and a message each would cost more than the attempts;
* of `LIMIT` (1,000) attempts the first half is recorded whole as it happens, the last half with the outcome;
* attempts beyond the first half are counted, and the count is told as soon as it has grown by a twentieth: a step that
  is retried for ever writes ever more seldom (a million attempts: 160 counts), and a worker that dies takes no more
  than the last twentieth of the numbers with it;
* the last attempt, which none follows, is neither counted nor recorded with others.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pyworkflow_ray.engine.events import (
    AttemptFailed,
    AttemptNote,
    AttemptRecord,
    AttemptsCounted,
    AttemptsFailed,
    ErrorInfo,
    StepStarted,
)

LIMIT = 1_000
FIRST = LIMIT // 2
FAST_S = 0.05  # an attempt that waits less for its next one needs no word of its own
_GROWTH = 20  # a count is told when it has grown by 1/20 of the attempts so far


class Failure(NamedTuple):
    """A failed attempt; the fields are those of `AttemptFailed`."""

    attempt: int
    started_at: float
    ended_at: float
    error: ErrorInfo
    delay_s: float | None = None
    delay_reason: str | None = None
    retry_at: float | None = None
    breaker: str | None = None
    why: str = ""

    @property
    def fast(self) -> bool:
        """Whether the next attempt follows nearly at once."""
        return self.delay_s is not None and self.delay_s < FAST_S


class Records:
    """The attempt records of one dispatch, in order.

    Args:
        report: Gets what is to be told to the run's owner.
        gather_s: Fast attempts are told when so many seconds have gone by since the last word, or by `take`; 0: each as
            it happens.
    """

    def __init__(
        self,
        position: str,
        dispatch: int,
        *,
        worker: str = "",
        node: str = "",
        report: Callable[[AttemptNote], None],
        gather_s: float = 0.0,
    ) -> None:
        self._which: dict[str, Any] = {"position": position, "dispatch": dispatch, "worker": worker, "node": node}
        self._report = report
        self._gather_s = gather_s
        self._told_at = time.monotonic() if gather_s else 0.0
        self._lock = threading.Lock()  # between the attempts and `take`
        self._running: tuple[int, float] | None = None  # the attempt that runs, until its start is told
        self._untold: list[Failure | AttemptsCounted] = []
        self._first: list[Failure] = []
        self._counted: list[AttemptsCounted] = []
        self._uncounted: Counter[str] = Counter()
        self._uncounted_from: Failure | None = None
        self._last: deque[Failure] = deque(maxlen=LIMIT - FIRST)

    def started(self, attempt: int, at: float) -> None:
        """An attempt began; of many each of the first is told, then one after each count."""
        if attempt > FIRST and self._uncounted_from is not None:
            return
        with self._lock:
            self._running = (attempt, at)
        if not self._gather_s:
            self._tell()

    def failed(self, failure: Failure) -> None:
        """An attempt failed."""
        with self._lock:
            self._running = None
            if failure.attempt <= FIRST:
                self._first.append(failure)
                self._untold.append(failure)
            else:
                self._count(failure)
        gathers = self._gather_s and failure.fast
        if not gathers or time.monotonic() - self._told_at >= self._gather_s:
            self._tell()

    def take(self) -> list[AttemptNote]:
        """What has not been told yet, which the caller will tell. Any thread."""
        with self._lock:
            untold, self._untold = self._untold, []
            running, self._running = self._running, None
        notes: list[AttemptNote] = [*self._together(untold)]
        if running is not None:
            attempt, at = running
            notes.append(StepStarted(at=at, attempt=attempt, started_at=at, **self._which))
        return notes

    def all(self, after: int = 0) -> list[AttemptRecord]:
        """Every record for the outcome, but for attempts up to number `after`, which the owner has confirmed."""
        kept: list[Failure | AttemptsCounted] = [failure for failure in self._first if failure.attempt > after]
        kept += [count for count in self._counted if count.last > after]
        begin = self._uncounted_from
        if begin is not None and begin.attempt < self._last[0].attempt:  # the rest has left the last ones
            whole = Counter(failure.error.type for failure in self._last)
            end = self._last[0]._replace(attempt=self._last[0].attempt - 1)
            kept.append(self._count_of(begin, end, self._uncounted - whole))
        return self._together([*kept, *self._last])

    def _tell(self) -> None:
        for note in self.take():
            self._report(note)
        if self._gather_s:
            self._told_at = time.monotonic()

    def _count(self, failure: Failure) -> None:
        self._last.append(failure)
        self._uncounted[failure.error.type] += 1
        self._uncounted_from = begin = self._uncounted_from or failure
        if failure.delay_s is not None and (failure.attempt - begin.attempt + 1) * _GROWTH >= failure.attempt:
            count = self._count_of(begin, failure, self._uncounted)
            self._uncounted, self._uncounted_from = Counter(), None
            self._counted.append(count)
            self._untold.append(count)

    def _count_of(self, begin: Failure, end: Failure, counts: Counter[str]) -> AttemptsCounted:
        return AttemptsCounted(
            at=begin.ended_at,
            position=self._which["position"],
            dispatch=self._which["dispatch"],
            first=begin.attempt,
            last=end.attempt,
            started_at=begin.started_at,
            ended_at=end.ended_at,
            counts=dict(counts),
        )

    def _together(self, items: Sequence[Failure | AttemptsCounted]) -> list[AttemptRecord]:
        """As records: failures that go together in one."""
        records: list[AttemptRecord] = []
        group: list[Failure] = []
        for item in items:
            if group and not (isinstance(item, Failure) and _go_together(group[-1], item)):
                records.append(self._record(group))
                group = []
            if isinstance(item, Failure):
                group.append(item)
            else:
                records.append(item)
        if group:
            records.append(self._record(group))
        return records

    def _record(self, group: list[Failure]) -> AttemptRecord:
        first = group[0]
        if len(group) == 1:
            fields: dict[str, Any] = first._asdict()
            return AttemptFailed(at=first.ended_at, **fields, **self._which)
        places: dict[int, int] = {}
        errors: list[ErrorInfo] = []
        attempts = []
        for failure in group:
            which = places.setdefault(id(failure.error), len(errors))
            if which == len(errors):
                errors.append(failure.error)
            attempts.append((failure.started_at, failure.ended_at, which, failure.delay_s or 0.0))
        return AttemptsFailed(
            at=group[-1].ended_at,
            first=first.attempt,
            errors=errors,
            attempts=attempts,
            delay_reason=first.delay_reason,
            breaker=first.breaker,
            **self._which,
        )


def _go_together(one: Failure, other: Failure) -> bool:
    return (
        one.fast
        and other.fast
        and other.attempt == one.attempt + 1
        and (other.delay_reason, other.breaker) == (one.delay_reason, one.breaker)
    )
