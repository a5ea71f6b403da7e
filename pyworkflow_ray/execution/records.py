"""What is kept of a step's attempts: the first and the last whole, those between as counts by error type.

Called by `worker`. Rules:

* of `LIMIT` (1,000) attempts the first half is recorded whole as it happens, the last half with the outcome;
* attempts beyond the first half are counted, and the count is told as soon as it has grown by a twentieth: a step that
  is retried for ever writes ever more seldom (a million attempts: 160 counts), and a worker that dies takes no more
  than the last twentieth of the numbers with it;
* the last attempt, which none follows, is never counted.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from pyworkflow_ray.engine.events import AttemptFailed, AttemptRecord, AttemptsCounted

LIMIT = 1_000
FIRST = LIMIT // 2
_GROWTH = 20  # a count is told when it has grown by 1/20 of the attempts so far


class Records:
    """The attempt records of one dispatch, in order.

    Args:
        report: Gets what is to be streamed.
    """

    def __init__(self, report: Callable[[AttemptRecord], None]) -> None:
        self._report = report
        self._first: list[AttemptFailed] = []
        self._told: list[AttemptsCounted] = []
        self._untold: Counter[str] = Counter()
        self._untold_from: AttemptFailed | None = None
        self._last: deque[AttemptFailed] = deque(maxlen=LIMIT - FIRST)

    def tells_start(self, attempt: int) -> bool:
        """Whether the start of this attempt is worth an event: of the first ones each, then one after each count."""
        return attempt <= FIRST or self._untold_from is None

    def add(self, record: AttemptFailed) -> None:
        """An attempt failed."""
        if record.attempt <= FIRST:
            self._first.append(record)
            self._report(record)
            return
        self._last.append(record)
        self._untold[record.error.type] += 1
        self._untold_from = begin = self._untold_from or record
        if record.delay_s is not None and (record.attempt - begin.attempt + 1) * _GROWTH >= record.attempt:
            count = self._counted(begin, record, self._untold)
            self._untold, self._untold_from = Counter(), None
            self._told.append(count)
            self._report(count)

    def all(self, after: int = 0) -> list[AttemptRecord]:
        """Every record for the outcome; of attempts up to number `after`, those streamed are left out."""
        kept: list[AttemptRecord] = [record for record in self._first if record.attempt > after]
        kept += [count for count in self._told if count.last > after]
        begin = self._untold_from
        if begin is not None and begin.attempt < self._last[0].attempt:  # the rest has left the last ones
            whole = Counter(record.error.type for record in self._last)
            end = self._last[0].model_copy(update={"attempt": self._last[0].attempt - 1})
            kept.append(self._counted(begin, end, self._untold - whole))
        return [*kept, *self._last]

    @staticmethod
    def _counted(begin: AttemptFailed, end: AttemptFailed, counts: Counter[str]) -> AttemptsCounted:
        return AttemptsCounted(
            at=begin.at,
            position=begin.position,
            dispatch=begin.dispatch,
            first=begin.attempt,
            last=end.attempt,
            started_at=begin.started_at,
            ended_at=end.ended_at,
            counts=dict(counts),
        )
