"""The screens: list, show, events, timeline, drawn of `RunView`s onto a `Screen`. Called by the commands."""

from __future__ import annotations

import datetime as dt
from collections import Counter

from pyworkflow_ray.cli.screen import NO_BREAK, STYLES, Screen, glyph
from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability import text
from pyworkflow_ray.observability.lines import started_line
from pyworkflow_ray.observability.lists import LIST_COLUMNS, list_rows, total_line
from pyworkflow_ray.observability.model import RunView, StepView
from pyworkflow_ray.observability.words import clock, error_view, instant, payload_text

EVENT_COLUMNS = ("SEQ", "TIME", "EVENT", "STEP", "DETAIL")
FOLD_AFTER = 60  # steps: on a terminal the completed ones of a longer run are folded


def run_list(screen: Screen, views: list[RunView], *, more: bool = False) -> None:
    """A row a run, a line with the counts, and the commands that act."""
    if not views:
        screen.line("no runs")
        return
    screen.table(LIST_COLUMNS, list_rows(views), [view.state for view in views])
    counts = Counter(view.state for view in views)
    total = total_line(views)
    if more:
        total += f" (older ones: --before {views[-1].run_id})"
    first = next((v for v in views if v.state not in ("completed", "cancelled")), views[0])
    hint = f"runs show {first.run_id}"
    if "retrying" in counts and len(counts) > 1:
        hint = f"{hint} · runs list --retrying"
    screen.wrapped("", f"{total}        {hint.replace(' ', NO_BREAK)}", "dim")


def run_show(screen: Screen, view: RunView, zone: dt.tzinfo, *, every: bool = False) -> None:
    """Verdict, why, next; input and output; the steps; what acts."""
    _head(screen, view, zone)
    for label, value in text.value_lines(view):
        screen.wrapped(f"  {label:<5} ", value)
    rows, states = text.step_rows(view), [step.state for step in view.steps]
    hidden = 0
    if screen.terminal and not every and len(rows) > FOLD_AFTER:
        keep = [i for i, s in enumerate(states) if s != "completed" or i < 5 or i >= len(rows) - 5]
        hidden = len(rows) - len(keep)
        rows, states = [rows[i] for i in keep], [states[i] for i in keep]
    if rows:
        screen.table(text.STEP_COLUMNS, rows, list(states))
    if hidden:
        screen.line(f"({hidden} completed steps are not shown: --all)", "dim")
    screen.commands(view.commands)


def _head(screen: Screen, view: RunView, zone: dt.tzinfo) -> None:
    name = f"{view.run_id}  {text.title(view)}"
    started = started_line(view, zone)
    room = (screen.width if screen.terminal else 80) - len(name) - len(started)
    screen.line(name + " " * max(3, room) + started)
    for index, (label, line) in enumerate(text.verdict_lines(view)):
        if index == 0:
            screen.marked(label, line, STYLES.get(view.state))
        else:
            screen.wrapped(f"  {label:<5} ", line)
    for note in view.notes:
        screen.wrapped("  note  ", note, "yellow")


def step_show(
    screen: Screen, view: RunView, step: StepView, scheduled: ev.StepScheduled | ev.MapScheduled, zone: dt.tzinfo
) -> None:
    """One step: its whole input and output, and every attempt with the delay after it and why it was chosen."""
    screen.line(f"{view.run_id}  step {step.number} {step.name}   position {step.position}, {step.executor} step")
    screen.marked(glyph(step.state), f"{step.state}  {step.outcome}".rstrip(), STYLES.get(step.state))
    for error in step.errors:
        times = f"   (same error {error.count}×)" if error.count > 1 else ""
        screen.line(f"  why   {error.kind} · {error.line}{times}   {error.where or ''}".rstrip())
    if isinstance(scheduled, ev.MapScheduled):
        chunks = f"chunks of {scheduled.chunk_size}, {scheduled.concurrency} at a time"
        screen.line(f"  in    {step.argument}, {chunks} (items are not recorded)")
    else:
        given = [payload_text(p) for p in scheduled.args]
        given += [f"{k}={payload_text(p)}" for k, p in scheduled.kwargs.items()]
        screen.line(f"  in    {', '.join(given) or '–'}")
    policy = scheduled.policy
    retries = "for ever" if policy.max_retries is None else str(policy.max_retries)
    timeout = "none" if policy.timeout_s is None else format_duration(policy.timeout_s)
    screen.line(
        f"  rule  retries {retries}, delay {format_duration(policy.retry_delay_s)} × {policy.retry_backoff:g}, "
        f"jitter {policy.jitter}, timeout {timeout}, recoveries {policy.max_recoveries}"
    )
    if step.attempts:
        last_failed = max((i for i, a in enumerate(step.attempts) if a.status == "failed"), default=-1)
        states = [
            "earlier" if a.status == "failed" and (i < last_failed or step.state != "failed") else a.status
            for i, a in enumerate(step.attempts)
        ]
        screen.table(text.ATTEMPT_COLUMNS, text.attempt_rows(step, view, zone), states)
    last = step.errors[-1] if step.errors and step.state == "failed" else None
    if last is not None and last.traceback:
        for line in last.traceback.rstrip().splitlines():
            screen.line(f"    {line}", "dim")
    screen.commands((f"runs show {view.run_id}", f"runs events {view.run_id} --step {step.number}"))


def run_timeline(screen: Screen, view: RunView, zone: dt.tzinfo) -> None:
    """The steps over time, then what happens next."""
    _head(screen, view, zone)
    scale, *bars = text.timeline(view, max(60, screen.width), zone)
    screen.line(scale)
    for bar, step in zip(bars, view.steps, strict=False):
        screen.bar(bar, failed=step.state == "failed")
    screen.line(bars[-1], "dim")
    screen.commands(c for c in view.commands if "timeline" not in c)


def run_events(screen: Screen, view: RunView, events: list[ev.Event], zone: dt.tzinfo) -> None:
    """A row an event, in the order of the log."""
    names = {step.position: f"{step.number} {step.name}" for step in view.steps}
    rows = []
    for event in events:
        position = getattr(event, "position", None)
        rows.append(
            [
                str(event.seq),
                clock(instant(event.at), view.now, zone) + f".{int(event.at * 1000) % 1000:03d}",
                event.type,
                names.get(position or "", position or ""),
                detail(event, view, zone),
            ]
        )
    screen.table(EVENT_COLUMNS, rows)
    for note in view.notes:
        screen.line(f"note   {note}", "yellow")
    screen.commands((f"runs show {view.run_id}", f"runs events {view.run_id} --json"))


def detail(event: ev.Event, view: RunView, zone: dt.tzinfo) -> str:
    """What an event says, in one line."""

    def time_of(at: float) -> str:
        return clock(instant(at), view.now, zone)

    match event:
        case ev.RunCreated():
            return f"{event.workflow}" + (f" v{event.version}" if event.version else "")
        case ev.RunActivated():
            return f"epoch {event.epoch}, {event.cause}" + (
                f", again: {', '.join(event.resets)}" if event.resets else ""
            )
        case ev.RunCancelRequested():
            return event.reason or event.cause
        case ev.RunParked():
            return f"until {time_of(event.due_at)}"
        case ev.RunPaused():
            return f"{event.reason}: {' '.join(event.message.split())}"
        case ev.RunFailed() | ev.StepFailed():
            why = f"   ({event.why})" if isinstance(event, ev.StepFailed) else ""
            return error_view(event.error).line + why
        case ev.AttemptFailed():
            wait = f", waits {format_duration(event.delay_s)}" if event.delay_s is not None else ""
            reason = f" ({event.delay_reason})" if event.delay_reason else ""
            return f"attempt {event.attempt}: {event.error.kind} · {error_view(event.error).line}{wait}{reason}"
        case ev.AttemptsFailed():
            errors = "; ".join(f"{error.kind} · {error_view(error).line}" for error in event.errors)
            longest_s = max(delay_s for _, _, _, delay_s in event.attempts)
            waits = f"waits up to {format_duration(longest_s)}" if longest_s else "no waits"
            return f"attempts {event.first} to {event.last}: {errors}, {waits}"
        case ev.AttemptsCounted():
            counts = ", ".join(f"{name} {count}" for name, count in event.counts.items())
            return f"attempts {event.first} to {event.last}: {counts}"
        case ev.StepScheduled():
            return ", ".join(payload_text(p) for p in event.args)[:80]
        case ev.MapScheduled():
            total = "items" if event.total is None else f"{event.total} items"
            return f"{total}, chunks of {event.chunk_size}, {event.concurrency} at a time"
        case ev.ChunkCompleted():
            failed = f", {len(event.failures)} failed" if event.failures else ""
            return f"items {event.first} to {event.first + event.done - 1}{failed}"
        case ev.StepStarted():
            return f"attempt {event.attempt}, dispatch {event.dispatch}" + (
                f", on {event.worker}" if event.worker else ""
            )
        case ev.StepHandedBack():
            return f"waits without a worker until {time_of(event.due_at)}"
        case ev.StepLost():
            charged = "" if event.charged else ", charged to nobody"
            return f"{event.cause.replace('_', ' ')}{charged}" + (f": {event.message}" if event.message else "")
        case ev.StepCompleted():
            took = format_duration(max(0.0, event.ended_at - event.started_at))
            return f"attempt {event.attempt}, {took}: {payload_text(event.result)[:80]}"
        case ev.RunCompleted():
            return payload_text(event.result)[:80]
        case ev.RunCancelled():
            return event.reason or ""
        case ev.TimerStarted():
            return f"{format_duration(event.delay_s)}, until {time_of(event.due_at)}"
    return ""
