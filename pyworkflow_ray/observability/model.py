"""The view model of a run: what `explain` returns and every screen renders.

Rules: data only, no logic of any one screen; instants are aware UTC datetimes; spans end in `_s` and are seconds; a
field is added, never renamed, within one schema version. Called by view, html, text and the command line.
"""

from __future__ import annotations

import datetime as dt
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

VIEW_SCHEMA = 1

Status = Literal["pending", "running", "parked", "paused", "completed", "failed", "cancelled"]
State = Literal[
    "pending", "running", "parked", "paused", "completed", "failed", "cancelled", "retrying", "stuck", "waiting"
]
StepState = Literal["queued", "running", "retrying", "waiting", "completed", "failed", "cancelled"]
SegmentKind = Literal["queued", "waited", "failed", "succeeded", "lost", "running", "cancelled"]
AttemptStatus = Literal["running", "failed", "succeeded", "lost", "cancelled"]


class ViewModel(BaseModel):
    model_config = ConfigDict(frozen=True, serialize_by_alias=True, populate_by_name=True)


class ErrorView(ViewModel):
    """A failure. `where` is "file:line in function", the user's innermost frame; `count` equal ones were collapsed."""

    kind: str
    type: str
    message: str
    where: str | None = None
    traceback: str = ""
    count: int = 1

    @property
    def line(self) -> str:
        """Type and message on one line."""
        text = " ".join(self.message.split())
        return f"{self.type}: {text}" if text else self.type


class ValueView(ViewModel):
    """An argument or a result: `text` for people, cut where `complete` is false; `size` is bytes as stored.
    redacted: there is something secret in it, and `text` shows the rest."""

    text: str
    complete: bool = True
    size: int = 0
    type: str | None = None
    redacted: bool = False


class AttemptView(ViewModel):
    """One attempt of a step. `delay_s` is the wait chosen after it, `delay_reason` why it was chosen.

    Of a step that is retried very often it may stand for many, of which only the error types were `counts` (counted);
    `attempt` is the first, `number` how many they are.
    """

    attempt: int
    number: int = 1
    counts: dict[str, int] = Field(default_factory=dict)
    epoch: int
    dispatch: int
    status: AttemptStatus
    started_at: dt.datetime | None = None
    ended_at: dt.datetime | None = None
    error: ErrorView | None = None
    cause: str | None = None  # of a lost attempt: "worker_died", "node_lost" ...
    charged: bool = True  # of a lost attempt: whether it counts against max_recoveries
    delay_s: float | None = None
    delay_reason: str | None = None
    retry_at: dt.datetime | None = None
    breaker: str | None = None
    worker: str = ""
    node: str = ""

    @property
    def took_s(self) -> float | None:
        if self.started_at is None or self.ended_at is None:
            return None
        return max(0.0, (self.ended_at - self.started_at).total_seconds())


class Segment(ViewModel):
    """A stretch of a step's row: what it did from `start` to `end`. An open one ends now."""

    kind: SegmentKind
    start: dt.datetime
    end: dt.datetime
    attempt: int | None = None
    open: bool = False


class ItemsView(ViewModel):
    """The items of a map. `total`: None while their number is not known; `by_type`: failed ones by exception type."""

    total: int | None = None
    done: int = 0
    failed: int = 0
    by_type: dict[str, int] = Field(default_factory=dict)
    retried: dict[str, int] = Field(default_factory=dict)
    chunks: int = 0


class StepView(ViewModel):
    """One step: one row. `tries` counts attempts begun, the lost ones excepted; those are `lost`."""

    number: int
    position: str
    name: str
    argument: str | None = None
    state: StepState
    tries: int = 0
    max_tries: int | None = 1  # None: for ever
    lost: int = 0
    scheduled_at: dt.datetime
    ended_at: dt.datetime | None = None
    took_s: float | None = None
    input: list[ValueView] = Field(default_factory=list)
    output: ValueView | None = None
    outcome: str = ""
    error: ErrorView | None = None  # that ended the step, or that it is retried for
    errors: list[ErrorView] = Field(default_factory=list)  # all of them, equal ones collapsed, first seen first
    why: str | None = None  # why no attempt follows
    next_at: dt.datetime | None = None
    attempts: list[AttemptView] = Field(default_factory=list)
    segments: list[Segment] = Field(default_factory=list)
    breaker: str | None = None
    executor: str = "task"
    items: ItemsView | None = None  # of a map


class RowView(ViewModel):
    """The run in one row of a list."""

    state: str
    step: str | None = None
    why: str = ""
    next: str = ""


class RunView(ViewModel):
    """A run, explained. `verdict`, `why` and `next` are the three lines of every screen, without glyphs."""

    schema_: int = Field(default=VIEW_SCHEMA, alias="schema")
    run_id: str
    workflow: str
    version: str | None = None
    status: Status
    state: State
    created_at: dt.datetime
    ended_at: dt.datetime | None = None
    now: dt.datetime
    verdict: str
    why: str | None = None
    next: str | None = None
    next_at: dt.datetime | None = None
    steps: list[StepView] = Field(default_factory=list)
    result: Any = None  # the value itself where it is JSON or a model, else its text
    output: ValueView | None = None
    error: ErrorView | None = None
    input: list[ValueView] = Field(default_factory=list)
    attributes: dict[str, Any] = Field(default_factory=dict)
    retries: int = 0
    recoveries: int = 0  # activations after a lost owner, and lost attempts
    commands: list[str] = Field(default_factory=list)  # that act on this run
    notes: list[str] = Field(default_factory=list)  # what the reader must know: a torn tail, a missing owner
    row: RowView
    trace_id: str = ""
    events: int = 0
    rerun_of: str | None = None  # the run whose workflow and arguments these are

    def __str__(self) -> str:
        from pyworkflow_ray.observability.text import render_text

        return render_text(self)

    def _repr_html_(self) -> str:
        from pyworkflow_ray.observability.html import render_html

        return render_html(self)
