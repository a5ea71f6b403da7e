"""A run's story, folded from its events: status, steps, timers, owners. `view` and `lines` put it into words.

Pure. Called by view and spans; calls steps for what belongs to one step.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability import model as m
from pyworkflow_ray.observability.batches import MapTrack, map_of
from pyworkflow_ray.observability.steps import Track


@dataclass
class Story:
    """A run while its events are read. `lines` puts it into words."""

    created: ev.RunCreated
    now: float
    tz: dt.tzinfo
    status: m.Status = "pending"
    state: m.State = "pending"
    steps: dict[str, Track] = field(default_factory=dict)
    timers: dict[str, ev.TimerStarted] = field(default_factory=dict)
    last_at: float = 0.0
    ended_at: float | None = None
    epoch: int = 0
    owner_lost: int = 0
    parked: ev.RunParked | None = None
    paused: ev.RunPaused | None = None
    cancel: ev.RunCancelRequested | None = None
    failed: ev.RunFailed | None = None
    cancelled: ev.RunCancelled | None = None
    completed: ev.RunCompleted | None = None
    stuck: str | None = None  # why it is stuck, in words
    owner_alive: bool | None = None

    def apply(self, event: ev.Event) -> None:
        self.last_at = max(self.last_at, event.at)
        if isinstance(event, ev.RunActivated):
            self._activated(event)
        elif isinstance(event, ev.RunParked):
            self.status, self.parked = "parked", event
        elif isinstance(event, ev.RunPaused):
            self.status, self.paused = "paused", event
        elif isinstance(event, ev.RunCancelRequested):
            self.cancel = event
        elif isinstance(event, ev.TERMINAL):
            self._ended(event)
        elif isinstance(event, ev.TimerStarted):
            self.timers[event.position] = event
        elif isinstance(event, (ev.TimerFired, ev.TimerCancelled)):
            self.timers.pop(event.position, None)
        elif isinstance(event, ev.StepScheduled):
            self.steps[event.position] = Track(event, queued_since=event.at)
        elif isinstance(event, ev.MapScheduled):
            self.steps[event.position] = MapTrack.of(event, self.epoch)
        else:
            self._step_event(event)

    def _activated(self, event: ev.RunActivated) -> None:
        self.status, self.epoch = "running", event.epoch
        self.parked = self.paused = None
        if event.cause == "recovery":
            self.owner_lost += 1
        if event.cause == "resume":
            self.failed = self.ended_at = None
        for position in event.resets:
            if position in self.steps:
                self.steps[position].reset(event.at)

    def _ended(self, event: ev.Event) -> None:
        self.ended_at = event.at
        self.timers.clear()
        if isinstance(event, ev.RunCompleted):
            self.status, self.completed = "completed", event
        elif isinstance(event, ev.RunFailed):
            self.status, self.failed = "failed", event
        elif isinstance(event, ev.RunCancelled):
            self.status, self.cancelled = "cancelled", event
        for track in self.steps.values():
            track.cancelled(event.at)  # a step outstanding at the end of its run is cancelled

    def _step_event(self, event: ev.Event) -> None:
        position = getattr(event, "position", "")
        track = self.steps.get(map_of(position) or position)
        if isinstance(track, MapTrack) and not isinstance(event, ev.StepCancelled):
            if isinstance(event, ev.ChunkCompleted):
                track.chunk(event)
            elif isinstance(event, ev.StepLost):
                track.lost(event, self.epoch)
            return
        if track is None:
            return  # an event of a newer version, or of a step in the lost part of a torn log
        if isinstance(event, ev.StepStarted):
            track.started(event, self.epoch)
        elif isinstance(event, ev.AttemptFailed):
            track.attempt_failed(event, self.epoch)
        elif isinstance(event, ev.AttemptsFailed):
            for one in event.each():
                track.attempt_failed(one, self.epoch)
        elif isinstance(event, ev.AttemptsCounted):
            track.attempts_counted(event, self.epoch)
        elif isinstance(event, ev.StepHandedBack):
            track.handed_back(event)
        elif isinstance(event, ev.StepLost):
            track.lost(event, self.epoch)
        elif isinstance(event, ev.StepCompleted):
            track.completed(event, self.epoch)
        elif isinstance(event, ev.StepFailed):
            track.failed(event, self.epoch)
        elif isinstance(event, ev.StepCancelled):
            track.cancelled(event.at)

    # Derived ------------------------------------------------------------------------------------------------------

    @property
    def open_steps(self) -> list[Track]:
        return [t for t in self.steps.values() if t.open]

    @property
    def next_timer(self) -> ev.TimerStarted | None:
        return min(self.timers.values(), key=lambda t: t.due_at, default=None)

    @property
    def subject(self) -> Track | None:
        """The step that the verdict is about: the one that failed the run, else the open one in most trouble."""
        if self.failed is not None:
            return self.steps.get(self.failed.position or "")
        return max(self.open_steps, key=lambda t: (t.tries_failed, t.lost_count, -t.scheduled.number), default=None)

    @property
    def retries(self) -> int:
        again = sum(max(0, sum(a.number for a in t.attempts if a.status != "lost") - 1) for t in self.steps.values())
        return again + sum(t.retried.total() for t in self.steps.values() if isinstance(t, MapTrack))

    @property
    def recoveries(self) -> int:
        """Owners and workers that were lost. A step lost with its owner counts once, as the owner."""
        own = sum(a.status == "lost" and a.cause != "run_actor_lost" for t in self.steps.values() for a in t.attempts)
        return own + self.owner_lost + sum(t.chunks_lost for t in self.steps.values() if isinstance(t, MapTrack))

    @property
    def waits(self) -> bool:
        """Nothing of the run executes: its steps queue for a worker or a breaker, or the body sleeps for a moment."""
        if not self.open_steps:
            return bool(self.timers)
        return all(t.running is None for t in self.open_steps)
