"""A map as one row: how many of its items are done, how many failed and of what, folded from its chunks.

Pure. Made and fed by `story`; a map is a step to every screen, with one attempt that lasts as long as the map.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.engine.chunks import as_step, parse_position
from pyworkflow_ray.observability import model as m
from pyworkflow_ray.observability.steps import Attempt, Track
from pyworkflow_ray.observability.words import plural

_TYPES_SHOWN = 3


@dataclass
class MapTrack(Track):
    """A map while its events are read. `total`: None while its length is not known."""

    total: int | None = None
    done: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    retried: Counter[str] = field(default_factory=Counter)
    chunks: int = 0
    chunks_lost: int = 0
    last_at: float = 0.0
    quiet_s: float | None = None

    @classmethod
    def of(cls, event: ev.MapScheduled, epoch: int) -> MapTrack:
        timeout = event.policy.timeout_s
        track = cls(
            as_step(event, event.position),
            state="running",
            attempts=[Attempt(epoch, 0, 1, started_at=event.at)],
            queued_since=event.at,
            total=event.total,
            last_at=event.at,
            quiet_s=None if timeout is None else timeout * event.chunk_size,
        )
        if event.total == 0:
            track._finish(event.at)
        return track

    def chunk(self, event: ev.ChunkCompleted) -> None:
        """A chunk, or a part of one, has ended."""
        self.done += event.done - len(event.waiting)
        self.next_at = min((item.retry_at for item in event.waiting), default=None)
        self.chunks += 1
        self.last_at = event.at
        for failure in event.failures:
            if failure.error < len(event.errors):
                self.failures[event.errors[failure.error].type] += 1
        self.retried.update(event.retried)
        if event.last:
            self.total = event.first + event.count
        if self.total is not None and self.done >= self.total:
            self._finish(event.at)

    def lost(self, event: ev.StepLost, epoch: int) -> None:
        self.chunks_lost += event.charged
        self.last_at = event.at

    def reset(self, at: float) -> None:
        """Resume of a run that failed of this map: its failed items are tried again."""
        self.done -= self.failures.total()
        self.failures.clear()
        super().reset(at)
        self.state, self.last_at = "running", at
        self.attempts.append(Attempt(0, 0, len(self.attempts) + 1, started_at=at))

    def _finish(self, at: float) -> None:
        self.attempts[-1].status, self.attempts[-1].ended_at = "succeeded", at
        self._end("completed", at, at)

    @property
    def lost_count(self) -> int:
        return self.chunks_lost

    def view(self, now: float) -> m.StepView:
        items = m.ItemsView(
            total=self.total,
            done=self.done,
            failed=sum(self.failures.values()),
            by_type=dict(self.failures.most_common()),
            retried=dict(self.retried.most_common()),
            chunks=self.chunks,
        )
        argument = "items" if self.total is None else plural(self.total, "item")
        return super().view(now).model_copy(update={"items": items, "argument": argument})

    def _outcome(self) -> str:
        total = f"{self.total:,}" if self.total is not None else "?"
        text = f"{self.done:,} of {total} done"
        if self.failures:
            shown = [f"{name} {count:,}" for name, count in self.failures.most_common(_TYPES_SHOWN)]
            more = len(self.failures) - len(shown)
            text += (
                f", {sum(self.failures.values()):,} failed ({', '.join(shown)}{f', {more} more types' if more else ''})"
            )
        if self.retried:
            text += f", {sum(self.retried.values()):,} retries"
        return text if self.state != "cancelled" else f"cancelled: {text}"


def map_of(position: str) -> str | None:
    """Position of the map that a chunk's position belongs to; None of any other."""
    chunk = parse_position(position)
    return chunk[0] if chunk is not None else None
