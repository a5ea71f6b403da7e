"""A run's events, folded: what each step and timer has come to, and the script that replay follows.

Pure. Called by `driver` on activation, and after it event by event, so that a live driver and a recovered one hold the
same state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pyworkflow_ray.engine import known, pausing
from pyworkflow_ray.engine.calls import PreviousFailure
from pyworkflow_ray.engine.chunks import as_step, chunk_position, parse_position
from pyworkflow_ray.engine.events import (
    COMMANDS,
    INPUTS,
    TERMINAL,
    AttemptFailed,
    AttemptRecord,
    AttemptsCounted,
    AttemptsFailed,
    ChunkCompleted,
    ErrorInfo,
    Event,
    MapScheduled,
    RunActivated,
    RunCancelRequested,
    RunCreated,
    RunFailed,
    RunPaused,
    StepCancelled,
    StepCompleted,
    StepDispatched,
    StepFailed,
    StepHandedBack,
    StepLost,
    StepScheduled,
    StepStarted,
    TimerCancelled,
    TimerFired,
    TimerStarted,
)

MAX_PREVIOUS = 1_000  # earlier failures that an attempt can read


_SCRIPTED = (*INPUTS, *COMMANDS)  # joined once: `apply` sees every event of a history


@dataclass(slots=True)
class StepState:
    """One step of the run.

    attempt: number of the last attempt known. retries_used: failed attempts that count against `max_retries`.
    recoveries: charged losses; out_of_memory: those that were out-of-memory kills. retry_at: when the next attempt may
    begin. waiting: nobody executes it (handed back, or lost and backing off). dispatch: how often it was dispatched in
    this epoch. dispatched: a worker has it now.
    chunk: (map, first, count) of a map's chunk, which is a step of its own.
    """

    event: StepScheduled
    chunk: tuple[str, int, int] | None = None
    ended: str | None = None  # "completed", "failed", "cancelled"
    attempt: int = 0
    retries_used: int = 0
    recoveries: int = 0
    out_of_memory: int = 0
    retry_at: float | None = None
    first_attempt: int = 1  # of the dispatch that runs now
    waiting: bool = False
    started_at: float | None = None  # of the attempt that runs now
    began_at: float | None = None  # of the first attempt, or of the wait before it
    last_error: ErrorInfo | None = None  # of the last failed attempt
    dispatch: int = 0
    dispatched: bool = False
    previous: list[PreviousFailure] = field(default_factory=list)
    failed_attempts: set[int] = field(default_factory=set)
    counted_to: int = 0  # of attempts up to this one some are only counted
    verdict: AttemptFailed | None = None  # the last attempt, after which none follows: the step's failure is due

    def knows(self, attempt: int) -> bool:
        """Whether the log has this attempt's failure."""
        return attempt in self.failed_attempts or 0 < attempt <= self.counted_to

    def has(self, record: AttemptRecord) -> bool:
        """Whether the log has this very record; one that was counted may still come whole."""
        if isinstance(record, AttemptsCounted):
            return self.knows(record.last)
        return (record.last if isinstance(record, AttemptsFailed) else record.attempt) in self.failed_attempts

    def unseen(self, record: AttemptRecord) -> AttemptRecord:
        """What the log does not have of a record: of attempts told together the first may have been told before."""
        if isinstance(record, AttemptsFailed) and record.first in self.failed_attempts:
            return record.after(next(n for n in range(record.last, 0, -1) if n in self.failed_attempts))
        return record

    def follows(self, event: AttemptRecord) -> bool:
        """Whether the log has all before it, and not it itself; a streamed record may be late, or overtake others."""
        first, last = (event.attempt,) * 2 if isinstance(event, AttemptFailed) else (event.first, event.last)
        return not self.knows(last) and (first == self.first_attempt or self.knows(first - 1))

    def begin(self, at: float) -> None:
        """An attempt began, or the wait for the first one: the total timeout counts from the earliest.

        A chunk of many has none: its items have, each its own.
        """
        if self.chunk is not None and self.chunk[2] > 1:
            return
        self.began_at = at if self.began_at is None else min(self.began_at, at)

    def ends_at(self) -> float | None:
        """UNIX time at which the total timeout is over; None: it has none, or has not begun."""
        total_s = self.event.policy.total_timeout_s
        return None if total_s is None or self.began_at is None else self.began_at + total_s


@dataclass(slots=True)
class History:
    """All that the events say, for the driver."""

    created: RunCreated | None = None
    steps: dict[str, StepState] = field(default_factory=dict)  # chunks of maps too, while they are open
    # Those of them that have not ended. Not a dict: one whose first keys went slows down each look at its first one.
    open_steps: OrderedDict[str, StepState] = field(default_factory=OrderedDict)
    maps: dict[str, MapScheduled] = field(default_factory=dict)
    open_timers: dict[str, float] = field(default_factory=dict)
    script: list[Event] = field(default_factory=list)  # inputs and commands, in order
    known: known.Known = field(default_factory=dict)  # completions that outlive a reset, of calls that do not
    deferred: list[Event] = field(default_factory=list)  # inputs that outlive a reset: to be delivered again
    next_seq: int = 0
    counted: int = 0  # events since the run began or was resumed
    first_activated_at: float | None = None
    last_at: float = 0.0
    epoch: int = -1
    lost_activations: int = 0  # charged ones since a step completed
    cancel: RunCancelRequested | None = None
    ended: Event | None = None
    paused: RunPaused | None = None

    @classmethod
    def of(cls, events: Iterable[Event]) -> History:
        history = cls()
        for event in events:
            history.apply(event)
        return history

    def apply(self, event: Event) -> None:
        """Take one event in, in order of `seq`."""
        self.next_seq = event.seq + 1
        self.counted += 1
        self.last_at = max(self.last_at, event.at)
        if isinstance(event, _SCRIPTED) and not (isinstance(event, StepCancelled) and event.forced):
            self.script.append(event)
        if self.deferred and isinstance(
            event, (StepCompleted, StepFailed, ChunkCompleted, TimerFired, StepCancelled, TimerCancelled)
        ):
            self.deferred = [e for e in self.deferred if not _supersedes(event, e)]
        match event:
            case RunCreated():
                self.created = event
            case RunActivated():
                self._activated(event)
            case StepScheduled():
                self._add(event.position, StepState(event))
                known.meet(self.known, event)
            case StepStarted():
                step = self.step(event.position)
                step.attempt = max(step.attempt, event.attempt)
                step.started_at = event.started_at
                step.begin(event.started_at)
            case StepDispatched():
                self.step(event.position).waiting = False
                self._dispatched(event)
            case AttemptFailed():
                self._attempt_failed(event)
            case AttemptsFailed():
                self._attempts_failed(event)
            case AttemptsCounted():
                self._attempts_counted(event)
            case StepHandedBack():
                step = self.step(event.position)
                step.waiting, step.dispatched, step.retry_at = True, False, event.due_at
                if event.dispatch:
                    step.begin(event.at)
            case StepLost():
                step = self.step(event.position)
                step.recoveries += event.charged
                step.out_of_memory += event.cause == "out_of_memory"
                # without a retry its failure follows, and may be missing: it must not look as if it waited for a retry
                step.waiting, step.dispatched, step.retry_at = event.retry_at is not None, False, event.retry_at
                step.attempt = max(step.attempt, event.attempt or 0)
                self._divide(step, event)
            case MapScheduled():
                self.maps[event.position] = event
            case ChunkCompleted():
                self._chunk_completed(event)
                self.lost_activations = 0
            case StepCompleted():
                self._end_step(event.position, "completed", event.attempt)
                self.lost_activations = 0
            case StepFailed():
                self._end_step(event.position, "failed", event.attempt)
            case StepCancelled() if event.position in self.maps:
                for position in self.chunks_of(event.position):
                    self._drop(position)
            case StepCancelled():
                self._end_step(event.position, "cancelled", 0)
            case TimerStarted():
                self.open_timers[event.position] = event.due_at
            case TimerFired() | TimerCancelled():
                self.open_timers.pop(event.position, None)
            case RunCancelRequested():
                self.cancel = event
            case RunPaused():
                self.paused = event
            case _:
                pass
        if isinstance(event, TERMINAL):
            self.ended = event

    def step(self, position: str) -> StepState:
        """The step, or the chunk of a map, at this position."""
        found = self.steps.get(position)
        if found is None:
            chunk = parse_position(position)
            if chunk is None:
                raise KeyError(position)
            found = StepState(as_step(self.maps[chunk[0]], position), chunk=chunk)
            self._add(position, found)
        return found

    def _add(self, position: str, step: StepState) -> None:
        self.steps[position] = self.open_steps[position] = step

    def _drop(self, position: str) -> StepState | None:
        self.open_steps.pop(position, None)
        return self.steps.pop(position, None)

    def chunks_of(self, map_position: str) -> list[str]:
        """Positions of the map's chunks that are known here, in order of their items."""
        found = [s.chunk for s in self.open_steps.values() if s.chunk is not None and s.chunk[0] == map_position]
        return [chunk_position(*chunk) for chunk in sorted(found)]

    def _chunk_completed(self, event: ChunkCompleted) -> None:
        """Items that wait for their next attempt are chunks of one from here on."""
        ended = self._drop(chunk_position(event.position, event.first, event.count))
        for item in event.waiting:
            step = self.step(chunk_position(event.position, item.index, 1))
            step.waiting, step.retry_at, step.dispatch = True, item.retry_at, event.dispatch
            step.attempt, step.retries_used, step.began_at = item.attempt, item.retries_used, item.began_at
            step.recoveries = ended.recoveries if ended is not None and event.count == 1 else 0
            step.previous = [PreviousFailure(p.attempt, p.kind, p.type, p.message, p.delay_s) for p in item.previous]

    def _divide(self, step: StepState, event: StepLost) -> None:
        """Parts of a lost chunk take its place: with its losses, and numbers of dispatches above its own."""
        if step.chunk is None or not event.parts:
            return
        self._drop(event.position)
        for first, count in event.parts:
            part = self.step(chunk_position(step.chunk[0], first, count))
            part.recoveries, part.dispatch, part.out_of_memory = step.recoveries, step.dispatch, step.out_of_memory
            part.waiting, part.retry_at = step.waiting, step.retry_at

    def _end_step(self, position: str, how: str, attempt: int) -> None:
        step = self.steps[position]
        self.known.pop(position, None)
        self.open_steps.pop(position, None)
        step.ended = how
        step.waiting = step.dispatched = False
        step.retry_at = None
        step.attempt = max(step.attempt, attempt)

    def _dispatched(self, event: StepDispatched) -> None:
        step = self.step(event.position)
        step.retry_at = None  # it was due, or a person would not wait for it: a loss must not wait for it again
        if event.policy is not None:
            step.event = step.event.model_copy(update={"policy": event.policy})

    def _attempts_counted(self, event: AttemptsCounted) -> None:
        step = self.step(event.position)
        if step.knows(event.last):
            return
        step.counted_to = event.last
        step.attempt = max(step.attempt, event.last)
        step.retries_used += event.last - event.first + 1
        step.begin(event.started_at)
        step.started_at = step.retry_at = step.verdict = None

    def _attempt_failed(self, event: AttemptFailed) -> None:
        step = self.step(event.position)
        if self._failed(step, event.attempt, event.started_at, event.error, event.delay_s):
            step.retry_at = event.retry_at
            step.verdict = event if event.retry_at is None else None

    def _attempts_failed(self, event: AttemptsFailed) -> None:
        step = self.step(event.position)
        for attempt, (started_at, ended_at, which, delay_s) in enumerate(event.attempts, event.first):
            if self._failed(step, attempt, started_at, event.errors[which], delay_s):
                step.retry_at, step.verdict = ended_at + delay_s, None

    @staticmethod
    def _failed(step: StepState, attempt: int, started_at: float, error: ErrorInfo, delay_s: float | None) -> bool:
        """Whether this is news of the step's last attempt; of one that has been counted only its details are new."""
        if attempt in step.failed_attempts:
            return False
        step.failed_attempts.add(attempt)
        step.previous.append(PreviousFailure(attempt, error.kind, error.type, error.message, delay_s))
        if len(step.previous) > MAX_PREVIOUS:  # the first and the last
            del step.previous[MAX_PREVIOUS // 2]
        if attempt <= step.counted_to:
            return False
        step.attempt = max(step.attempt, attempt)
        step.retries_used += 1
        step.begin(started_at)
        step.started_at = None
        step.last_error = error
        return True

    def _activated(self, event: RunActivated) -> None:
        unseen = event.epoch - max(self.epoch, 0)  # this loss, and those of owners that died before they wrote a word
        self.epoch = event.epoch
        if self.first_activated_at is None:
            self.first_activated_at = event.at
        if event.cause == "recovery" and event.charged:
            self.lost_activations += max(1, unseen)
        elif event.cause in ("resume", "cancel"):  # a person asked for it: the limits begin anew
            self.lost_activations = 0
            self.counted = 0
            if event.cause == "resume":
                pausing.grant(self.steps.values(), self.paused, event.at)
        self.paused = None
        for step in self.steps.values():
            step.dispatch, step.dispatched = 0, False
        if event.resets:
            self._reset(set(event.resets), event.at)

    def _cut(self, positions: set[str]) -> int | None:
        """Where the script ends for a reset: before the failure of a step, behind the last chunk of a map."""
        for i, event in enumerate(self.script):
            if isinstance(event, StepFailed) and event.position in positions:
                return i
        ends = [i for i, e in enumerate(self.script) if isinstance(e, ChunkCompleted) and e.position in positions]
        return ends[-1] + 1 if ends else None

    def _reset(self, positions: set[str], now: float) -> None:
        """Take failed steps back: they are open again, with fresh attempts, and what the body did because they had
        failed never happened. The run's end is taken back too; keys of the steps (idempotency) stay the same. Timers
        that were cancelled for the failure go on with the time they had left."""
        cut = self._cut(positions)
        if cut is None:
            self.script = [e for e in self.script if not isinstance(e, TERMINAL)]
        else:
            kept = {e.position for e in self.script[:cut] if isinstance(e, (StepScheduled, MapScheduled, TimerStarted))}
            due = {e.position: e.due_at for e in self.script[:cut] if isinstance(e, TimerStarted)}
            later: list[Event] = [
                e
                for e in self.script[cut:]
                if isinstance(e, (StepCompleted, StepFailed, ChunkCompleted, TimerFired))
                and e.position in kept - positions
            ]
            for event in self.script[cut:]:
                if isinstance(event, StepScheduled):
                    self.steps.pop(event.position, None)
                elif isinstance(event, MapScheduled):
                    for position in self.chunks_of(event.position):
                        del self.steps[position]
                    del self.maps[event.position]
                elif isinstance(event, StepCancelled) and event.position in self.steps:
                    self.steps[event.position].ended = None
                elif isinstance(event, TimerCancelled) and event.position in kept:
                    self.open_timers[event.position] = now + max(0.0, due[event.position] - event.at)
                elif isinstance(event, TimerStarted):
                    self.open_timers.pop(event.position, None)
            self.known.update(known.known_from(self.script[cut:]))
            self.script = [_redone(event, positions) for event in self.script[:cut]]
            self.deferred = later
        for position in positions & self.steps.keys():
            event = self.steps[position].event
            attempt = self.steps[position].attempt
            self.steps[position] = StepState(event, attempt=attempt)
        self.open_steps = OrderedDict((p, step) for p, step in self.steps.items() if step.ended is None)
        self.ended = None
        self.cancel = None


def _redone(event: Event, positions: set[str]) -> Event:
    """Failed items of a map that is reset are tried again, the others stay as they are."""
    if (
        isinstance(event, ChunkCompleted)
        and event.position in positions
        and (event.failures or event.done < event.count)
    ):
        return event.model_copy(update={"redo": True})
    return event


def _supersedes(event: Event, deferred: Event) -> bool:
    """Whether what is to be delivered again is this event, or was cancelled by it."""
    if getattr(event, "position", None) != getattr(deferred, "position", ""):
        return False
    if isinstance(event, ChunkCompleted) and isinstance(deferred, ChunkCompleted):
        return (event.first, event.count) == (deferred.first, deferred.count)
    return True


def failed_positions(events: Iterable[Event]) -> list[str]:
    """The steps that `resume` of a failed run tries again: the one whose exception ended the run."""
    ended: RunFailed | None = None
    for event in events:
        if isinstance(event, RunFailed):
            ended = event
        elif isinstance(event, RunActivated) and event.resets:
            ended = None
    return [ended.position] if ended is not None and ended.position is not None else []


def run_status(events: Sequence[Event]) -> str:
    """The status of a run with this history: pending, running, parked, paused, completed, failed or cancelled."""
    for event in reversed(events):
        status = _STATUS.get(event.type)
        if status is not None:
            return status
    return "pending"


_STATUS = {
    "run_activated": "running",
    "run_parked": "parked",
    "run_paused": "paused",
    "run_completed": "completed",
    "run_failed": "failed",
    "run_cancelled": "cancelled",
}
