"""The controller's book of one code environment: its anchor, its run actors, and the runs that wait for one.

Data and decisions only, no calls: `controller` carries them out, under its lock.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pyworkflow_ray.engine.events import CodeEnvironment
from pyworkflow_ray.runtime.messages import Assignment

_BATCH_S = 0.05  # a batch should take about so long: it saves messages without making runs wait for each other
_BATCH_MOST = 32
IDLE_S = 60.0  # a run actor that nobody needed for so long is let go


@dataclass(slots=True, eq=False)
class Slot:
    """One run actor, made by that incarnation of its anchor.

    batch: what it has and has not reported; None: still starting. node: where it is, once it has started.
    """

    key: str
    handle: Any
    incarnation: str
    batch: dict[str, Assignment] | None = None
    executing: bool = False
    since: float = field(default_factory=time.monotonic)
    size: int = 0
    node: str = ""

    @property
    def idle(self) -> bool:
        return self.batch is not None and not self.executing


@dataclass(slots=True, eq=False)
class Pool:
    """urgent: runs that had an actor and lost it. failures: run actors in a row that did not start.
    broken: why Ray could not make the anchor; "": it could, or tries.
    fresh: what tells the next try from one that failed."""

    environment: CodeEnvironment
    least: int
    most: int
    anchor: Any = None
    incarnation: str = ""
    held: bool = False
    broken: str = ""
    fresh: str = ""
    slots: dict[str, Slot] = field(default_factory=dict)
    queue: deque[Assignment] = field(default_factory=deque)
    urgent: deque[Assignment] = field(default_factory=deque)
    asked: int = 0
    failures: int = 0
    grow_after: float = 0.0
    run_s: float = 0.05
    contended: bool = False

    def busy(self) -> int:
        return sum(1 for slot in self.slots.values() if slot.executing)

    def waiting(self) -> int:
        return len(self.queue) + len(self.urgent)

    def take_idle(self) -> Slot | None:
        """An idle run actor for what waits; the spare one is kept for runs that have lost theirs."""
        if not self.urgent and (not self.queue or self.busy() >= self.most):
            return None
        for slot in self.slots.values():
            if slot.idle:
                return slot
        return None

    def next_batch(self) -> list[Assignment]:
        """What one run actor gets now: many short runs at once, a long one alone."""
        if self.urgent:
            return [self.urgent.popleft()]
        usable = max(1, min(self.most, len(self.slots)))
        fair = math.ceil(len(self.queue) / usable)
        size = max(1, min(_BATCH_MOST, fair, int(_BATCH_S / max(self.run_s, 1e-4))))
        return [self.queue.popleft() for _ in range(min(size, len(self.queue)))]

    def took(self, seconds: float, runs: int) -> None:
        """A batch ended: learn how long a run takes."""
        if runs:
            self.run_s += 0.3 * (seconds / runs - self.run_s)

    def missing(self, now: float) -> int:
        """How many run actors to make now. One at a time above the least: starting one costs a second of CPU."""
        have = len(self.slots) + self.asked
        starting = self.asked + sum(1 for slot in self.slots.values() if slot.batch is None)
        wanted = min(self.most + 1, max(self.least, self.busy() + self.waiting() + (1 if self.busy() else 0)))
        if have >= wanted or now < self.grow_after:
            return 0
        if have < self.least:
            return self.least - have
        return 0 if starting else 1

    def surplus(self, now: float) -> list[Slot]:
        """Run actors that nobody has needed for a while, above the least."""
        idle = [slot for slot in self.slots.values() if slot.idle and now - slot.since > IDLE_S]
        keep = max(self.least, 1)
        return idle[: max(0, len(self.slots) - keep)] if not self.waiting() else []
