"""`explain`: from a run's events to the view that every screen renders.

Pure: the same events and the same `now` give the same view; the clock, the time zone and what is known of the owner are
handed in. Three lines answer what a person asks after a failure: the verdict, why, and what happens next and when.
`retrying`, `waiting` and `stuck` are derived here and nowhere else. Called by handles, the command line and notebooks;
calls story (events folded), lines (the words) and steps (one step).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability import lines
from pyworkflow_ray.observability import model as m
from pyworkflow_ray.observability.story import Story
from pyworkflow_ray.observability.words import error_view, input_views, instant, payload_value, value_view


def tell(events: Sequence[ev.Event], now: float, tz: dt.tzinfo = dt.UTC, owner_alive: bool | None = None) -> Story:
    """The events folded.

    Raises:
        ValueError: `events` does not begin with `run_created`.
    """
    if not events or not isinstance(events[0], ev.RunCreated):
        raise ValueError("a run's events begin with run_created")
    story = Story(events[0], now, tz, last_at=events[0].at, owner_alive=owner_alive)
    for event in events[1:]:
        story.apply(event)
    story.stuck = lines.why_stuck(story)
    if story.stuck:
        story.state = "stuck"
    elif story.status in ("running", "parked") and any(t.retrying for t in story.open_steps):
        story.state = "retrying"
    elif story.status == "running" and story.waits:
        story.state = "waiting"
    else:
        story.state = story.status
    return story


def explain(
    events: Sequence[ev.Event],
    now: float,
    *,
    tz: dt.tzinfo = dt.UTC,
    owner_alive: bool | None = None,
    torn: bool = False,
) -> m.RunView:
    """The view of a run at `now` (UNIX time).

    Args:
        events: The run's accepted events in order, `run_created` first.
        now: The instant the view is of; relative times count from it.
        tz: Time zone of the absolute times in the texts (default UTC). Fields stay UTC.
        owner_alive: Whether a living owner holds the run; None: not known. A run that should be active and has no
            living owner is `stuck`, and the view names the command that takes it up.
        torn: The log's tail was torn: the events are a prefix, and the view says so.

    Raises:
        ValueError: `events` does not begin with `run_created`.
    """
    story = tell(events, now, tz, owner_alive)
    words = lines.compose(story)
    created = story.created
    error = story.failed.error if story.failed else story.cancelled.error if story.cancelled else None
    result = story.completed.result if story.completed else None
    notes = ["the journal's tail is torn: this is what was durable before it"] if torn else []
    if created.rerun_of is not None:
        notes.append(f"a rerun of {created.rerun_of}")
    return m.RunView(
        run_id=created.run_id,
        workflow=created.workflow,
        version=created.version,
        status=story.status,
        state=story.state,
        created_at=instant(created.at),
        ended_at=None if story.ended_at is None else instant(story.ended_at),
        now=instant(now),
        verdict=words.verdict,
        why=words.why,
        next=words.next,
        next_at=None if words.next_at is None else instant(words.next_at),
        steps=[track.view(now) for track in story.steps.values()],
        result=None if result is None else payload_value(result),
        output=None if result is None else value_view(result),
        error=None if error is None else error_view(error),
        input=input_views(created.args, created.kwargs),
        attributes=created.attributes,
        retries=story.retries,
        recoveries=story.recoveries,
        commands=words.commands,
        notes=notes,
        row=words.row,
        trace_id=created.trace_id,
        events=len(events),
        rerun_of=created.rerun_of,
    )
