"""Runs as tables: the rows of `runs`, `events`, `steps` and `attempts` that a history comes to. Pure, with pyarrow.

Called by checkpoint (Parquet) and sql (live journals), so that a run has the same rows before and after its
compaction. Status and attempts are those of `explain`: the fold is observability's. `sql` documents the columns.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Any, Protocol

import pyarrow as pa
from pydantic_core import to_json

from pyworkflow_ray.engine.events import ErrorInfo, Event, Payload, RunActivated, RunCreated
from pyworkflow_ray.observability.steps import Attempt, Track
from pyworkflow_ray.observability.story import Story
from pyworkflow_ray.storage.protection import reveal_text

TABLES = ("runs", "events", "steps", "attempts")

_TEXT, _INT, _FLOAT, _FLAG, _AT = pa.string(), pa.int32(), pa.float64(), pa.bool_(), pa.timestamp("us", "UTC")
_JSON = pa.json_(_TEXT)

SCHEMAS: dict[str, pa.Schema] = {
    "runs": pa.schema(
        [
            ("run_id", _TEXT),
            ("run_uid", _TEXT),
            ("generation", _INT),
            ("workflow", _TEXT),
            ("version", _TEXT),
            ("status", _TEXT),
            ("created_at", _AT),
            ("started_at", _AT),
            ("finished_at", _AT),
            ("attributes", _JSON),
            ("result", _JSON),
            ("error_kind", _TEXT),
            ("error_type", _TEXT),
            ("error_message", _TEXT),
            ("steps", _INT),
            ("retries", _INT),
            ("recoveries", _INT),
            ("events", _INT),
            ("trace_id", _TEXT),
        ]
    ),
    "events": pa.schema(
        [
            ("run_id", _TEXT),
            ("seq", _INT),
            ("epoch", _INT),
            ("recorded_at", _AT),  # not "at": a keyword in DuckDB
            ("type", _TEXT),
            ("position", _TEXT),
            ("safe", _FLAG),
            ("data", _JSON),
        ]
    ),
    "steps": pa.schema(
        [
            ("run_id", _TEXT),
            ("position", _TEXT),
            ("number", _INT),
            ("step", _TEXT),
            ("status", _TEXT),
            ("attempts", _INT),
            ("lost", _INT),
            ("scheduled_at", _AT),
            ("started_at", _AT),
            ("ended_at", _AT),
            ("executor", _TEXT),
            ("breaker", _TEXT),
            ("result", _JSON),
            ("error_kind", _TEXT),
            ("error_type", _TEXT),
            ("error_message", _TEXT),
            ("why", _TEXT),
        ]
    ),
    "attempts": pa.schema(
        [
            ("run_id", _TEXT),
            ("position", _TEXT),
            ("step", _TEXT),
            ("attempt", _INT),
            ("epoch", _INT),
            ("dispatch", _INT),
            ("status", _TEXT),
            ("started_at", _AT),
            ("ended_at", _AT),
            ("kind", _TEXT),
            ("error_type", _TEXT),
            ("message", _TEXT),
            ("delay_s", _FLOAT),
            ("delay_reason", _TEXT),
            ("cause", _TEXT),
            ("breaker", _TEXT),
            ("worker", _TEXT),
            ("node", _TEXT),
        ]
    ),
}

Row = tuple[Any, ...]


class History(Protocol):
    """What a storage's `read_run` gives."""

    run_id: str
    events: list[Event]
    epochs: list[int]


class Rows:
    """Rows gathered of many runs, a list a table. Tables that are not asked for stay empty."""

    def __init__(self, wanted: Iterable[str] = TABLES) -> None:
        self.rows: dict[str, list[Row]] = {name: [] for name in wanted}

    def add(self, history: History) -> None:
        """Take one run in.

        Raises:
            ValueError: its events do not begin with `run_created`.
        """
        if "events" in self.rows:
            self.rows["events"] += [
                event_row(history.run_id, event, epoch)
                for event, epoch in zip(history.events, history.epochs, strict=True)
            ]
        if self.rows.keys() != {"events"}:
            self._add_story(history)

    def _add_story(self, history: History) -> None:
        created = history.events[0] if history.events else None
        if not isinstance(created, RunCreated):
            raise ValueError(f"run {history.run_id!r}: its events do not begin with run_created")
        story = Story(created, now=0.0, tz=dt.UTC, last_at=created.at)
        started: float | None = None
        for event in history.events[1:]:
            story.apply(event)
            if started is None and isinstance(event, RunActivated):
                started = event.at
        if "runs" in self.rows:
            self.rows["runs"].append(_run_row(story, started, len(history.events)))
        for track in story.steps.values():
            if "steps" in self.rows:
                self.rows["steps"].append(_step_row(created.run_id, track))
            if "attempts" in self.rows:
                self.rows["attempts"] += [
                    _attempt_row(created.run_id, track, attempt) for attempt in track.attempts if not attempt.counts
                ]

    def table(self, name: str) -> pa.Table:
        """One table as Arrow; empty where no rows were gathered."""
        schema, rows = SCHEMAS[name], self.rows.get(name, [])
        if not rows:
            return schema.empty_table()
        columns = zip(*rows, strict=True)
        arrays = [pa.array(column, type=kind) for column, kind in zip(columns, schema.types, strict=True)]
        return pa.Table.from_arrays(arrays, schema=schema)


def event_row(run_id: str, event: Event, epoch: int) -> Row:
    position = getattr(event, "position", None)
    data = to_json(event).decode()
    return (run_id, event.seq, epoch, _micros(event.at), event.type, position, type(event).SAFE, data)


def _run_row(story: Story, started: float | None, events: int) -> Row:
    created = story.created
    ended = story.failed or story.cancelled
    result = story.completed.result if story.completed else None
    return (
        created.run_id,
        created.run_uid,
        created.generation,
        created.workflow,
        created.version,
        story.status,
        _micros(created.at),
        _micros(started),
        _micros(story.ended_at),
        to_json(created.attributes).decode(),
        _value(result),
        *_error(ended.error if ended else None),
        len(story.steps),
        story.retries,
        story.recoveries,
        events,
        created.trace_id,
    )


def _step_row(run_id: str, track: Track) -> Row:
    scheduled = track.scheduled
    begun = [attempt.started_at for attempt in track.attempts if attempt.started_at is not None]
    lost = sum(attempt.status == "lost" for attempt in track.attempts)
    return (
        run_id,
        scheduled.position,
        scheduled.number,
        scheduled.step,
        "retrying" if track.retrying else track.state,
        sum(attempt.number for attempt in track.attempts) - lost,
        lost,
        _micros(scheduled.at),
        _micros(min(begun, default=None)),
        _micros(track.ended_at),
        scheduled.executor,
        scheduled.breaker,
        _value(track.result if track.state == "completed" else None),
        *_error(track.error),
        track.why,
    )


def _attempt_row(run_id: str, track: Track, attempt: Attempt) -> Row:
    return (
        run_id,
        track.scheduled.position,
        track.scheduled.step,
        attempt.attempt,
        attempt.epoch,
        attempt.dispatch,
        attempt.status,
        _micros(attempt.started_at),
        _micros(attempt.ended_at),
        *_error(attempt.error),
        attempt.delay_s,
        attempt.delay_reason,
        attempt.cause,
        attempt.breaker,
        attempt.worker,
        attempt.node,
    )


def _error(error: ErrorInfo | None) -> tuple[str | None, str | None, str | None]:
    return (None, None, None) if error is None else (error.kind, error.type, reveal_text(None, error.message))


def _value(payload: Payload | None) -> str | None:
    """JSON of a value that is stored as JSON in the journal itself; None for pickles and large ones."""
    if payload is None or payload.redacted or payload.ref is not None or payload.enc not in ("json", "model"):
        return None
    return to_json(payload.data).decode()


def _micros(at: float | None) -> int | None:
    return None if at is None else round(at * 1_000_000)
