"""Effects: what the driver asks its shell to do. Data only; made by `driver`, carried out by the run actor, the
simulator and the test environment."""

from __future__ import annotations

from dataclasses import dataclass

from pyworkflow_ray.engine.calls import StepCall
from pyworkflow_ray.engine.events import Event, RunPaused


@dataclass(slots=True, frozen=True)
class Append:
    """Write these numbered events, in this order, then tell the driver `durable(last seq)`."""

    events: tuple[Event, ...]


@dataclass(slots=True, frozen=True)
class Dispatch:
    """Execute this step: everything that must be durable before it is."""

    call: StepCall


@dataclass(slots=True, frozen=True)
class CancelDispatch:
    """Interrupt this dispatch, by force after a grace of 2 s; its outcome is dropped."""

    position: str
    dispatch: int


@dataclass(slots=True, frozen=True)
class Park:
    """The run waits by itself until `due_at` (UNIX seconds) and needs no actor: evict and drop the driver."""

    due_at: float


@dataclass(slots=True, frozen=True)
class Pause:
    """The run waits for a person: evict and drop the driver."""

    event: RunPaused


@dataclass(slots=True, frozen=True)
class Finish:
    """The run has ended, durably, with this terminal event: evict and drop the driver."""

    event: Event


Effect = Append | Dispatch | CancelDispatch | Park | Pause | Finish


@dataclass(slots=True, frozen=True)
class Limits:
    """Limits of one run. Events are counted since the run began or was last resumed.

    warn_events: log a warning at so many events. max_events: pause the run at so many. park_after_s: a run that waits
    longer than this and executes nothing is parked. cancel_grace_s: how long a cancelled body may go on.
    flush_after_s: notes that nobody waits for (a started attempt) become durable within this time.
    """

    warn_events: int = 10_000
    max_events: int = 1_000_000
    park_after_s: float = 1.0
    cancel_grace_s: float = 10.0
    flush_after_s: float = 0.2
