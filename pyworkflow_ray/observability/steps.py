"""One step's story, folded from its events: attempts, lost workers, waits, and the segments that are drawn of them.

Pure. Fed by view in recorded order; the streamed notes (StepStarted) may be missing, and an attempt whose outcome no
event tells was lost with its worker or owner. Attempts are told apart by (epoch, dispatch, attempt): the fence.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability import model as m
from pyworkflow_ray.observability.words import (
    argument_text,
    collapse,
    error_view,
    input_views,
    instant,
    one_line,
    payload_text,
    short_name,
    value_view,
)


@dataclass
class Attempt:
    epoch: int
    dispatch: int
    attempt: int
    status: m.AttemptStatus = "running"
    started_at: float | None = None
    ended_at: float | None = None
    error: ev.ErrorInfo | None = None
    cause: str | None = None
    charged: bool = True
    delay_s: float | None = None
    delay_reason: str | None = None
    retry_at: float | None = None
    breaker: str | None = None
    worker: str = ""
    node: str = ""
    number: int = 1  # of attempts that it stands for: the first of them is `attempt`
    counts: dict[str, int] = field(default_factory=dict)
    counted_to: int = 0
    held_until: float | None = None  # by an open breaker, later than its own delay

    def view(self) -> m.AttemptView:
        def at(value: float | None) -> object:
            return None if value is None else instant(value)

        data = {**self.__dict__, "error": error_view(self.error) if self.error else None}
        del data["counted_to"], data["held_until"]
        for name in ("started_at", "ended_at", "retry_at"):
            data[name] = at(data[name])
        return m.AttemptView(**data)


@dataclass
class Track:
    """A step while its events are read. `fresh_from`: attempts before it belong to an earlier life (resume)."""

    scheduled: ev.StepScheduled
    state: m.StepState = "queued"
    attempts: list[Attempt] = field(default_factory=list)
    fresh_from: int = 0
    counted_to: int = 0  # of attempts up to this one some are only counted
    ended_at: float | None = None
    result: ev.Payload | None = None
    error: ev.ErrorInfo | None = None
    why: str | None = None
    next_at: float | None = None
    queued_since: float = 0.0

    # Folding ------------------------------------------------------------------------------------------------------

    def started(self, event: ev.StepStarted, epoch: int) -> None:
        self._supersede(epoch, event.dispatch, event.attempt, event.at)
        attempt = self._attempt(epoch, event.dispatch, event.attempt)
        if attempt.status == "running":
            attempt.started_at, attempt.worker, attempt.node = event.started_at, event.worker, event.node
            self._go("running")
            self.next_at = None

    def attempts_counted(self, event: ev.AttemptsCounted, epoch: int) -> None:
        attempt = self._attempt(epoch, event.dispatch, event.first)
        attempt.status, attempt.started_at, attempt.ended_at = "failed", event.started_at, event.ended_at
        attempt.number, attempt.counts = event.last - event.first + 1, dict(event.counts)
        attempt.counted_to = self.counted_to = event.last
        self._go("retrying")

    def attempt_failed(self, event: ev.AttemptFailed, epoch: int) -> None:
        late = self._uncount(event)
        attempt = self._attempt(epoch, event.dispatch, event.attempt)
        if late:
            self.attempts.sort(key=lambda a: (a.epoch, a.dispatch, a.attempt))
        attempt.status = "failed"
        attempt.started_at, attempt.ended_at, attempt.error = event.started_at, event.ended_at, event.error
        attempt.delay_s, attempt.delay_reason, attempt.retry_at = event.delay_s, event.delay_reason, event.retry_at
        attempt.breaker = event.breaker
        attempt.worker, attempt.node = event.worker or attempt.worker, event.node or attempt.node
        self.error, self.next_at = event.error, event.retry_at
        self._go("retrying")

    def _uncount(self, event: ev.AttemptFailed) -> bool:
        """Whether this one had been counted: then the count is of one less."""
        if event.attempt > self.counted_to:
            return False  # most steps: nothing of them is counted
        for counted in self.attempts:
            if counted.attempt <= event.attempt <= counted.counted_to and event.error.type in counted.counts:
                counted.counts[event.error.type] -= 1
                counted.counts = {name: number for name, number in counted.counts.items() if number}
                counted.number -= 1
                counted.attempt += counted.attempt == event.attempt
                self.attempts = [a for a in self.attempts if a.number]
                return True
        return False

    def handed_back(self, event: ev.StepHandedBack) -> None:
        self.next_at = event.due_at
        last = self.attempts[-1] if self.attempts else None
        if self.scheduled.breaker and last is not None and event.due_at > max(event.at, last.retry_at or 0.0):
            last.held_until = event.due_at
        self._go("retrying" if self.tries_failed else "waiting")

    def lost(self, event: ev.StepLost, epoch: int) -> None:
        running = [a for a in self.attempts if a.status == "running"]
        if event.attempt is not None:
            running = [a for a in running if a.attempt == event.attempt] or running
        if not running:
            known = self.attempts[-1].attempt if self.attempts else 0
            running = [Attempt(epoch, event.dispatch, event.attempt or known + 1)]
            self.attempts += running
        for attempt in running:
            attempt.status, attempt.ended_at = "lost", event.at
            attempt.cause, attempt.charged = event.cause, event.charged
        self.next_at, self.queued_since = event.retry_at, event.at
        self._go("queued")

    def completed(self, event: ev.StepCompleted, epoch: int) -> None:
        attempt = self._attempt(epoch, event.dispatch, event.attempt)
        attempt.status, attempt.started_at, attempt.ended_at = "succeeded", event.started_at, event.ended_at
        attempt.breaker = event.breaker
        attempt.worker, attempt.node = event.worker or attempt.worker, event.node or attempt.node
        self.result, self.error = event.result, None
        self._end("completed", event.ended_at, event.at)

    def failed(self, event: ev.StepFailed, epoch: int) -> None:
        for attempt in self.attempts:
            if attempt.status == "running" and attempt.dispatch == event.dispatch and attempt.attempt == event.attempt:
                attempt.status, attempt.ended_at, attempt.error = "failed", event.at, event.error
        self.error, self.why = event.error, event.why
        self._end("failed", event.at, event.at)

    def cancelled(self, at: float) -> None:
        if self.state not in ("completed", "failed"):
            self._end("cancelled", at, at)

    def reset(self, at: float) -> None:
        """Resume of a failed step: its attempts begin anew, the old ones stay to be seen."""
        self.fresh_from = len(self.attempts)
        self.ended_at = self.error = self.why = self.next_at = None
        self.state, self.queued_since = "queued", at

    def _attempt(self, epoch: int, dispatch: int, number: int) -> Attempt:
        for attempt in reversed(self.attempts):
            if (attempt.dispatch, attempt.attempt) == (dispatch, number) and attempt.epoch == epoch:
                return attempt
        self.attempts.append(Attempt(epoch, dispatch, number))
        return self.attempts[-1]

    def _supersede(self, epoch: int, dispatch: int, number: int, at: float) -> None:
        # A later execution has begun, so one whose outcome nobody recorded went down with its owner.
        for old in self.attempts:
            if old.status == "running" and (old.epoch, old.dispatch, old.attempt) < (epoch, dispatch, number):
                old.status, old.ended_at, old.cause = "lost", at, "run_actor_lost"

    def _end(self, state: m.StepState, ended_at: float, recorded_at: float) -> None:
        self.state, self.ended_at, self.next_at = state, ended_at, None
        for attempt in self.attempts:
            if attempt.status == "running":
                attempt.status = "cancelled" if state == "cancelled" else "lost"
                attempt.ended_at = recorded_at

    def _go(self, state: m.StepState) -> None:
        if self.ended_at is None:
            self.state = state

    # Reading ------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return short_name(self.scheduled.step) + (" (compensation)" if self.scheduled.compensates else "")

    @property
    def open(self) -> bool:
        return self.ended_at is None

    @property
    def fresh(self) -> list[Attempt]:
        return self.attempts[self.fresh_from :]

    @property
    def tries(self) -> int:
        return sum(a.number for a in self.fresh if a.status != "lost")

    @property
    def tries_failed(self) -> int:
        return sum(a.number for a in self.fresh if a.status == "failed")

    @property
    def lost_count(self) -> int:
        return sum(a.status == "lost" for a in self.attempts)

    @property
    def max_tries(self) -> int | None:
        retries = self.scheduled.policy.max_retries
        return None if retries is None else retries + 1

    @property
    def running(self) -> Attempt | None:
        return next((a for a in reversed(self.attempts) if a.status == "running"), None)

    @property
    def last_failed(self) -> Attempt | None:
        return next((a for a in reversed(self.fresh) if a.status == "failed" and not a.counts), None)

    @property
    def held_until(self) -> float | None:
        """Until when its breaker refuses the next attempt, where it was that which put the attempt off."""
        return self.attempts[-1].held_until if self.open and self.attempts else None

    @property
    def retrying(self) -> bool:
        return self.open and self.tries_failed > 0

    def view(self, now: float) -> m.StepView:
        begun = [a.started_at for a in self.attempts if a.started_at is not None]
        end = self.ended_at if self.ended_at is not None else now
        errors = [error_view(a.error) for a in self.attempts if a.error is not None]
        if self.error is not None and not errors:
            errors = [error_view(self.error)]
        scheduled = self.scheduled
        return m.StepView(
            number=scheduled.number,
            position=scheduled.position,
            name=self.name,
            argument=argument_text(scheduled.args, scheduled.kwargs),
            state="retrying" if self.retrying else self.state,
            tries=self.tries,
            max_tries=self.max_tries,
            lost=self.lost_count,
            scheduled_at=instant(scheduled.at),
            ended_at=None if self.ended_at is None else instant(self.ended_at),
            took_s=max(0.0, end - begun[0]) if begun else None,
            input=input_views(scheduled.args, scheduled.kwargs),
            output=None if self.result is None else value_view(self.result),
            outcome=self._outcome(),
            error=None if self.error is None else error_view(self.error),
            errors=collapse(errors),
            why=self.why,
            next_at=None if self.next_at is None else instant(self.next_at),
            attempts=[a.view() for a in self.attempts],
            segments=segments(self, now),
            breaker=scheduled.breaker,
            executor=scheduled.executor,
        )

    def _outcome(self) -> str:
        if self.result is not None and self.state == "completed":
            view = value_view(self.result)
            return (
                view.text if view.complete or len(payload_text(self.result)) <= 200 else f"{view.text} ({view.size} B)"
            )
        if self.error is not None:
            return f"{self.error.type}: {one_line(self.error.message)}".rstrip(": ")
        if self.state == "queued":
            return "queued for a worker"
        return self.state if self.state == "cancelled" else ""


def segments(track: Track, now: float) -> list[m.Segment]:
    """The step's row, left to right, without overlap: what it did from its scheduling to its end, or to `now`."""
    found: list[m.Segment] = []
    cursor = track.scheduled.at
    wait_until: float | None = None  # the chosen wait before the next attempt
    between: m.SegmentKind = "queued"

    def add(kind: m.SegmentKind, start: float, end: float, attempt: int | None = None, open_: bool = False) -> None:
        if end > start or kind not in ("queued", "waited"):
            found.append(
                m.Segment(kind=kind, start=instant(start), end=instant(max(start, end)), attempt=attempt, open=open_)
            )

    def gap(end: float, open_: bool = False) -> None:
        if between == "queued":
            add("queued", cursor, end, open_=open_)
            return
        split = min(end, max(cursor, wait_until)) if wait_until is not None else end
        add("waited", cursor, split, open_=open_ and split == end)
        add("queued", split, end, open_=open_)

    for attempt in (replace(a) for a in track.attempts):
        end = now if attempt.ended_at is None else attempt.ended_at
        start = end if attempt.started_at is None else attempt.started_at
        if attempt.status == "lost" and attempt.started_at is None:
            start = max(cursor, start)
        start = max(cursor, start)
        gap(start)
        kind: m.SegmentKind = attempt.status
        add(kind, start, max(start, end), attempt.attempt, open_=attempt.ended_at is None)
        cursor = max(start, end)
        wait_until = attempt.held_until or attempt.retry_at
        between = "waited" if attempt.status == "failed" or attempt.held_until else "queued"
    if track.open and not (track.attempts and track.attempts[-1].status == "running"):
        gap(max(cursor, now), open_=True)
    return found
