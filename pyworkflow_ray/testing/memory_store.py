"""A journal in memory with the promises of the real one, and its crashes: any prefix of what was not acknowledged may
survive.

Used by the simulator and by tests of the driver.
"""

from __future__ import annotations

import random

from pyworkflow_ray.engine.events import Event, StepCompleted, StepScheduled, event_adapter


class MemoryStore:
    """The events of one run. Events are kept as JSON, so that what comes back has been through the format."""

    def __init__(self) -> None:
        self.durable: list[bytes] = []
        self.acknowledged = -1
        self.completed: set[str] = set()  # positions of steps whose completion is durable
        self.scheduled: set[str] = set()  # positions of steps that are durably scheduled
        self._written: list[Event] = []  # appended, not durable yet
        self._read: list[Event] = []  # durable ones that have been read; nobody changes an event that is durable

    def append(self, events: tuple[Event, ...]) -> int:
        """Take events in; gives the seq that `sync` will make durable."""
        expected = len(self.durable) + len(self._written)
        for offset, event in enumerate(events):
            if event.seq != expected + offset:
                raise AssertionError(f"event {event.type} has seq {event.seq}, not {expected + offset}")
        self._written.extend(events)
        return expected + len(events) - 1

    def pending(self) -> list[Event]:
        """What was appended and is not durable yet."""
        return list(self._written)

    def sync(self) -> int:
        """Make all that was appended durable; gives the last durable seq."""
        self._persist(self._written)
        self.acknowledged = len(self.durable) - 1
        return self.acknowledged

    def crash(self, rng: random.Random) -> None:
        """The owner died: a prefix of what was not durable survives."""
        self._persist(self._written[: rng.randint(0, len(self._written))])

    def _persist(self, events: list[Event]) -> None:
        self.durable.extend(event.model_dump_json().encode() for event in events)
        self.completed.update(event.position for event in events if isinstance(event, StepCompleted))
        self.scheduled.update(event.position for event in events if isinstance(event, StepScheduled))
        self._written = []

    def events(self) -> list[Event]:
        """The accepted history."""
        self._read += [event_adapter.validate_json(line) for line in self.durable[len(self._read) :]]
        return list(self._read)
