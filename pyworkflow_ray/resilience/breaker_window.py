"""The outcomes that a breaker's rates are shares of: the last n calls, or those of the last seconds. Pure.

Called by `breaker`. Rules: a time window drops an outcome once it is as old as the window; outcomes within a
thousandth of the window are kept as one entry, at the time of the first, so memory is bounded whatever the rate.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_RESOLUTION = 1000


@dataclass(slots=True)
class _Entry:
    at: float
    calls: int = 0
    failures: int = 0
    slow: int = 0
    nodes: tuple[str, ...] = ()


class Window:
    """size: an int: so many calls; a float: so many seconds."""

    def __init__(self, size: int | float) -> None:
        self.size = size
        self.calls = self.failures = self.slow = 0
        self._entries: deque[_Entry] = deque()

    def add(self, now: float, *, failed: bool = False, slow: bool = False, count: int = 1, node: str = "") -> None:
        """`count` calls of one kind ended now, on `node`."""
        self.expire(now)
        bad = (node,) if failed or slow else ()
        if isinstance(self.size, int):
            for _ in range(min(count, self.size)):
                self._append(_Entry(now, 1, int(failed), int(slow), bad))
            while self.calls > self.size:
                self._drop()
            return
        last = self._entries[-1] if self._entries else None
        if last is None or now - last.at >= self.size / _RESOLUTION:
            last = _Entry(now)
            self._entries.append(last)
        last.calls += count
        last.failures += count * failed
        last.slow += count * slow
        last.nodes = tuple({*last.nodes, *bad}) if bad else last.nodes
        self._total(_Entry(now, count, count * failed, count * slow), 1)

    def expire(self, now: float) -> None:
        """Drop what is too old."""
        if isinstance(self.size, int):
            return
        while self._entries and now - self._entries[0].at >= self.size:
            self._drop()

    def clear(self) -> None:
        self._entries.clear()
        self.calls = self.failures = self.slow = 0

    def rates(self) -> tuple[float, float]:
        """Shares of failed and of slow calls."""
        return (self.failures / self.calls, self.slow / self.calls) if self.calls else (0.0, 0.0)

    def nodes(self) -> set[str]:
        """Where the failed and slow calls were made."""
        return {node for entry in self._entries for node in entry.nodes}

    def _append(self, entry: _Entry) -> None:
        self._entries.append(entry)
        self._total(entry, 1)

    def _drop(self) -> None:
        self._total(self._entries.popleft(), -1)

    def _total(self, entry: _Entry, sign: int) -> None:
        self.calls += sign * entry.calls
        self.failures += sign * entry.failures
        self.slow += sign * entry.slow
