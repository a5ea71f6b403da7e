"""The events of a run: what the journal holds, and all that recovery, views, SQL and traces are derived from.

Names are in the past tense. An event never changes once it is durable. `at` is the UNIX time in seconds at which the
owner of the run recorded it; order is by `seq`, never by time. `position` is the place in the program (task path and
counter: "3" is the third command of the workflow's main task, "t2.1" the first of its second child task).

Three sorts, which replay tells apart:

* *inputs*, delivered to the body in recorded order: StepCompleted, StepFailed, ChunkCompleted, TimerFired,
  RunCancelRequested, BodyAbandoned;
* *commands*, which the body gave and must give again: StepScheduled, StepCancelled, MapScheduled, TimerStarted,
  TimerCancelled, and the body's end (RunCompleted, RunFailed, RunCancelled);
* *notes*, which the body never sees: all others.

Readers ignore an unknown event type only where the record says `safe: true` (class variable `SAFE`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from pyworkflow_ray.engine.values import CodeEnvironment as CodeEnvironment
from pyworkflow_ray.engine.values import CodeRef as CodeRef
from pyworkflow_ray.engine.values import ErrorInfo as ErrorInfo
from pyworkflow_ray.engine.values import Frame as Frame
from pyworkflow_ray.engine.values import Kind as Kind
from pyworkflow_ray.engine.values import Payload as Payload
from pyworkflow_ray.resilience.breaker_settings import options_for
from pyworkflow_ray.resilience.policy import RetryPolicy

SCHEMA_VERSION = 1


class Event(BaseModel):
    """Base of all events. `seq` is dense from 0 in a run; -1 until the driver has numbered the event."""

    SAFE: ClassVar[bool] = False

    type: str
    seq: int = -1
    at: float = 0.0


# The run ----------------------------------------------------------------------------------------------------------


class RunCreated(Event):
    """Always seq 0. The run exists once this is durable."""

    type: Literal["run_created"] = "run_created"
    schema_version: int = SCHEMA_VERSION
    run_id: str
    run_uid: str
    storage_id: str
    generation: int = 0
    workflow: str
    version: str | None = None
    code: CodeRef
    environment: CodeEnvironment
    args: list[Payload] = Field(default_factory=list)
    kwargs: dict[str, Payload] = Field(default_factory=dict)
    attributes: dict[str, Any] = Field(default_factory=dict)
    max_duration_s: float | None = None
    max_recoveries: int = 20
    trace_id: str = ""
    breakers: dict[str, dict[str, Any]] = Field(default_factory=dict)
    budgets: dict[str, dict[str, Any]] = Field(default_factory=dict)
    kinds: dict[str, Kind] = Field(default_factory=dict)  # registered exception types, by "module:qualname"
    hooks: dict[str, list[CodeRef]] = Field(default_factory=dict)  # functions to be told: "retry", "run_failed", ...
    rerun_of: str | None = None  # the run whose workflow and arguments these are
    traceparent: str = Field(
        default="", exclude_if=lambda text: not text
    )  # W3C: the span that was current at its start

    def breaker_options(self, name: str | None) -> dict[str, Any] | None:
        """The settings of a breaker, or of the one that it is a key of, as the run's starter knew them."""
        return options_for(self.breakers, name)


class RunActivated(Event):
    """A run actor took the run up: the first event of each epoch after its seal (of epoch 0: the second event).

    cause: "start", "recovery" (its owner was lost), "wake" (a parked run is due), "resume", "cancel".
    charged: whether the lost activation before counts against `max_recoveries`.
    resets: positions of failed steps that are tried again with fresh attempts ("resume" of a failed run or of a step).
    """

    type: Literal["run_activated"] = "run_activated"
    epoch: int
    cause: Literal["start", "recovery", "wake", "resume", "cancel"] = "start"
    charged: bool = False
    lease: str = ""
    node: str = ""
    worker: str = ""
    resets: list[str] = Field(default_factory=list)


class RunCancelRequested(Event):
    """Input: CancelledError is raised in the body. cause "max_duration" ends the run as failed with a timeout."""

    type: Literal["run_cancel_requested"] = "run_cancel_requested"
    cause: Literal["user", "max_duration"] = "user"
    reason: str | None = None


class BodyAbandoned(Event):
    """Input: a cancelled body did not end within its grace. It does nothing any more, and its compensations begin.

    Recorded only where there are compensations: without them the run ends at once.
    """

    type: Literal["body_abandoned"] = "body_abandoned"


class RunParked(Event):
    """Note: the run waits by itself and holds no actor until `due_at`."""

    type: Literal["run_parked"] = "run_parked"
    due_at: float


class RunPaused(Event):
    """Note: the run waits for a person. `reason` is one of a few words, `message` the whole story with the remedy."""

    type: Literal["run_paused"] = "run_paused"
    reason: Literal["nondeterminism", "event_limit", "max_recoveries", "environment", "code", "user", "step_exhausted"]
    message: str
    details: dict[str, Any] = Field(default_factory=dict)


class RunCompleted(Event):
    type: Literal["run_completed"] = "run_completed"
    result: Payload


class RunFailed(Event):
    """`position` is the step whose exception ended the run, None where it was raised by the body itself."""

    type: Literal["run_failed"] = "run_failed"
    error: ErrorInfo
    position: str | None = None


class RunCancelled(Event):
    type: Literal["run_cancelled"] = "run_cancelled"
    reason: str | None = None
    error: ErrorInfo | None = None  # what the body raised while it was cancelled, if anything


# Steps ------------------------------------------------------------------------------------------------------------


class StepScheduled(Event):
    """Command, and the step's first event: name, arguments and the policy that holds until the step ends.

    number: 1 for the first step that the run scheduled, and so on; for people.
    compensates: it undoes what the run did, for the run ends as failed or cancelled (`engine.saga`).
    """

    type: Literal["step_scheduled"] = "step_scheduled"
    position: str
    number: int
    step: str
    code: CodeRef
    args: list[Payload] = Field(default_factory=list)
    kwargs: dict[str, Payload] = Field(default_factory=dict)
    policy: RetryPolicy = Field(default_factory=RetryPolicy)
    executor: Literal["task", "local"] = "task"
    ray_options: dict[str, Any] = Field(default_factory=dict)
    breaker: str | None = None
    compensates: bool = False


class StepStarted(Event):
    """Note: a worker began an attempt (time queued for a worker lies before it). Not waited for."""

    SAFE: ClassVar[bool] = True

    type: Literal["step_started"] = "step_started"
    position: str
    dispatch: int
    attempt: int
    started_at: float
    worker: str = ""
    node: str = ""


class StepDispatched(Event):
    """Note: a step was dispatched again, after a hand-back or a loss. Its first dispatch needs no event: it follows
    from `step_scheduled`. Durable before the dispatch, so that recovery knows that an attempt may have begun."""

    SAFE: ClassVar[bool] = True

    type: Literal["step_dispatched"] = "step_dispatched"
    position: str
    dispatch: int
    policy: RetryPolicy | None = Field(default=None, exclude_if=lambda policy: policy is None)  # holds from here on


class AttemptFailed(Event):
    """Note: an attempt failed and another follows (or the step's end, in the same commit).

    delay_s and delay_reason: the wait chosen before the next attempt and why ("fixed", "backoff", "backoff+jitter",
        "retry_after", "server retry_after", "none left" ...); None where no attempt follows.
    retry_at: UNIX time at which the next attempt may begin.
    breaker: state of the step's breaker when the attempt began.
    """

    type: Literal["attempt_failed"] = "attempt_failed"
    position: str
    dispatch: int
    attempt: int
    started_at: float
    ended_at: float
    error: ErrorInfo
    delay_s: float | None = None
    delay_reason: str | None = None
    retry_at: float | None = None
    breaker: str | None = None
    worker: str = ""
    node: str = ""
    why: str = Field(default="", exclude_if=lambda why: not why)  # as in `step_failed`, where no attempt follows


class AttemptsFailed(Event):
    """Note: attempts from `first` on failed one after another, each followed by the next at once or after a short wait.

    Together, for one record each would cost more than the attempts. errors: each once. attempts: of each [started_at,
    ended_at, index of its error, delay_s]. What else there is holds for all of them. `each` takes them apart.
    """

    type: Literal["attempts_failed"] = "attempts_failed"
    position: str
    dispatch: int
    first: int
    errors: list[ErrorInfo]
    attempts: list[tuple[float, float, int, float]]
    delay_reason: str | None = None
    breaker: str | None = None
    worker: str = ""
    node: str = ""

    @property
    def last(self) -> int:
        return self.first + len(self.attempts) - 1

    def each(self) -> Iterator[AttemptFailed]:
        """As one event an attempt."""
        names = ("seq", "at", "position", "dispatch", "delay_reason", "breaker", "worker", "node")
        shared: dict[str, Any] = {name: getattr(self, name) for name in names}
        for attempt, (started_at, ended_at, which, delay_s) in enumerate(self.attempts, self.first):
            yield AttemptFailed(
                attempt=attempt,
                started_at=started_at,
                ended_at=ended_at,
                error=self.errors[which],
                delay_s=delay_s,
                retry_at=ended_at + delay_s,
                **shared,
            )

    def after(self, attempt: int) -> AttemptsFailed:
        """Those after number `attempt`."""
        skipped = max(0, attempt + 1 - self.first)
        return self.model_copy(update={"first": self.first + skipped, "attempts": self.attempts[skipped:]})


class AttemptsCounted(Event):
    """Note: attempts `first` to `last` failed, each followed by another. Of a step that is retried very often only the
    first and last are recorded whole; these are counted, by the types of their errors. Those of them that turn out to
    be the last follow whole, as `attempt_failed`, with the step's outcome."""

    SAFE: ClassVar[bool] = True

    type: Literal["attempts_counted"] = "attempts_counted"
    position: str
    dispatch: int
    first: int
    last: int
    started_at: float
    ended_at: float
    counts: dict[str, int] = Field(default_factory=dict)


AttemptRecord = AttemptFailed | AttemptsFailed | AttemptsCounted
AttemptNote = StepStarted | AttemptRecord  # what a worker streams of an execution


class StepHandedBack(Event):
    """Note: the wait before the next attempt is long, so the worker was given back; the run dispatches at `due_at`.

    Of dispatch 0: it was never dispatched, for the run was about to pause.
    """

    type: Literal["step_handed_back"] = "step_handed_back"
    position: str
    dispatch: int
    due_at: float


class StepLost(Event):
    """Note: the worker of a dispatch was lost; attempts it had begun and not reported are unknown.

    cause: "worker_died", "out_of_memory", "node_lost", "run_actor_lost", "timeout_kill".
    charged: whether it counts against `max_recoveries`. retry_at: when the step is dispatched again.
    parts: of a map's chunk, (first, count) of each part that is dispatched in its place; empty: as a whole.
    """

    type: Literal["step_lost"] = "step_lost"
    position: str
    dispatch: int
    attempt: int | None = None
    cause: str = "worker_died"
    charged: bool = True
    retry_at: float | None = None
    message: str = ""
    parts: list[tuple[int, int]] = Field(default_factory=list)


class StepCompleted(Event):
    """Input."""

    type: Literal["step_completed"] = "step_completed"
    position: str
    dispatch: int
    attempt: int
    started_at: float
    ended_at: float
    result: Payload
    breaker: str | None = None
    worker: str = ""
    node: str = ""


class StepFailed(Event):
    """Input: no attempt follows. why: "permanent", "exhausted", "lost", "refused", "deadline", "code", "no retry"."""

    type: Literal["step_failed"] = "step_failed"
    position: str
    dispatch: int
    attempt: int
    error: ErrorInfo
    why: str = "exhausted"


class StepCancelled(Event):
    """Command: the body no longer waits for the step (timeout, TaskGroup, cancel, end of the run).

    Its outcome, should one come, is dropped.
    forced: by the driver, of a body that did not end within its grace; the body never gave this command.
    """

    type: Literal["step_cancelled"] = "step_cancelled"
    position: str
    forced: bool = False


# Maps -------------------------------------------------------------------------------------------------------------


class ItemFailure(BaseModel):
    """An item that failed for good. error: its place among the chunk's `errors`. attempt, why: as in `StepFailed`."""

    model_config = ConfigDict(frozen=True)

    index: int
    error: int
    attempt: int
    why: str = "exhausted"


class PreviousAttempt(BaseModel):
    """A failed attempt of an item, as its next attempt sees it. delay_s: the wait chosen after it."""

    model_config = ConfigDict(frozen=True)

    attempt: int
    kind: Kind
    type: str
    message: str
    delay_s: float | None = None


class ItemWaiting(BaseModel):
    """An item whose next attempt is far off, so that its worker was given back.

    attempt: number of its last one. retries_used: failed attempts that count. retry_at: UNIX time of the next.
    began_at: UNIX time of its first. previous: its failures, the last 20 of them.
    """

    model_config = ConfigDict(frozen=True)

    index: int
    attempt: int
    retries_used: int
    retry_at: float
    began_at: float
    previous: list[PreviousAttempt] = Field(default_factory=list)


class MapScheduled(Event):
    """Command: `step.map`. Its items are not recorded, for replay draws them anew; its chunks follow from its fields.

    total: how many items there are, None where their iterable does not say. max_failures, max_ratio: beyond which it
    stops early, None: never.
    """

    type: Literal["map_scheduled"] = "map_scheduled"
    position: str
    number: int
    step: str
    code: CodeRef
    policy: RetryPolicy = Field(default_factory=RetryPolicy)
    executor: Literal["task", "local"] = "task"
    ray_options: dict[str, Any] = Field(default_factory=dict)
    breaker: str | None = None
    chunk_size: int
    concurrency: int
    total: int | None = None
    max_failures: int | None = None
    max_ratio: float | None = None


class ChunkCompleted(Event):
    """Input: items `first` to `first + count - 1` of the map at `position` have ended.

    done: how many of them; fewer than `count` where the chunk ended early, for too many had failed.
    results: a list, a value an item and None for a failed one. single: each value is a payload of its own in it.
    failures, errors: the failed items, and each distinct error once.
    waiting: items that have not ended, and wait for their next attempt without a worker.
    retried: attempts that were made again, by type of the error before them.
    items: digest of the items where their encoding is canonical: replay compares what is drawn with it.
    last: no item follows.
    redo: never recorded: its failed items are tried again, for the run was resumed from this map.
    """

    type: Literal["chunk_completed"] = "chunk_completed"
    position: str
    first: int
    count: int
    done: int
    dispatch: int
    started_at: float
    ended_at: float
    results: Payload | None = None
    single: bool = False
    failures: list[ItemFailure] = Field(default_factory=list)
    errors: list[ErrorInfo] = Field(default_factory=list)
    waiting: list[ItemWaiting] = Field(default_factory=list)
    retried: dict[str, int] = Field(default_factory=dict)
    items: str | None = None
    last: bool = False
    redo: bool = Field(default=False, exclude=True)
    worker: str = ""
    node: str = ""


# Timers -----------------------------------------------------------------------------------------------------------


class TimerStarted(Event):
    """Command: asyncio.sleep, asyncio.timeout or pw.sleep in the body."""

    type: Literal["timer_started"] = "timer_started"
    position: str
    due_at: float
    delay_s: float


class TimerFired(Event):
    """Input."""

    type: Literal["timer_fired"] = "timer_fired"
    position: str


class TimerCancelled(Event):
    """Command."""

    type: Literal["timer_cancelled"] = "timer_cancelled"
    position: str


class UnknownEvent(Event):
    """An event type of a newer version, kept as it is; made only for records that are marked safe to ignore."""

    model_config = ConfigDict(extra="allow")

    SAFE: ClassVar[bool] = True


AnyEvent = Annotated[
    Union[
        RunCreated,
        RunActivated,
        RunCancelRequested,
        BodyAbandoned,
        RunParked,
        RunPaused,
        RunCompleted,
        RunFailed,
        RunCancelled,
        StepScheduled,
        StepStarted,
        StepDispatched,
        AttemptFailed,
        AttemptsFailed,
        AttemptsCounted,
        StepHandedBack,
        StepLost,
        StepCompleted,
        StepFailed,
        StepCancelled,
        MapScheduled,
        ChunkCompleted,
        TimerStarted,
        TimerFired,
        TimerCancelled,
    ],
    Field(discriminator="type"),
]

event_adapter: TypeAdapter[Event] = TypeAdapter(AnyEvent)

INPUTS = (StepCompleted, StepFailed, ChunkCompleted, TimerFired, RunCancelRequested, BodyAbandoned)
COMMANDS = (
    StepScheduled,
    StepCancelled,
    MapScheduled,
    TimerStarted,
    TimerCancelled,
    RunCompleted,
    RunFailed,
    RunCancelled,
)
TERMINAL = (RunCompleted, RunFailed, RunCancelled)
