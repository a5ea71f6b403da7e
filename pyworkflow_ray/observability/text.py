"""A run as text: the three lines, the table of steps, the timeline. Pure; no colour, no width but the timeline's.

Called by `RunView.__str__`, which is what a notebook shows as text/plain, and by the command line, which adds colour on
a terminal. Rows are never cut: whoever prints them decides what fits.
"""

from __future__ import annotations

import datetime as dt
import math

from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.observability import lines
from pyworkflow_ray.observability import model as m
from pyworkflow_ray.observability.axis import Axis, axis_of
from pyworkflow_ray.observability.words import GLYPHS, clock, short_name

STEP_COLUMNS = ("STEP", "STATE", "TRIES", "LOST", "TOOK", "OUTCOME")
RIGHT = {"TRIES", "LOST", "TOOK", "AGE", "SEQ", "ATTEMPT"}
MARKS = {
    "failed": "▓",
    "waited": "░",
    "succeeded": "█",
    "queued": "·",
    "lost": "↯",
    "running": "▒",
    "cancelled": "⊘",
}
LEGEND = "▓ failed  ░ waiting  █ ok  · queued  ↯ worker lost  ▒ running"


def columns(names: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """Rows padded into columns two spaces apart; the last column and trailing blanks are left as they are."""
    table = [list(names), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(names))]
    lines_ = []
    for row in table:
        cells = [
            cell.rjust(width) if name in RIGHT else cell.ljust(width)
            for name, cell, width in zip(names, row, widths, strict=True)
        ]
        lines_.append("  ".join(cells).rstrip())
    return lines_


def title(view: m.RunView) -> str:
    return short_name(view.workflow) + (f" v{view.version}" if view.version else "")


def verdict_lines(view: m.RunView) -> list[tuple[str, str]]:
    """(label, text) of the three lines; the verdict's label is its glyph. Where there is no why or next, no line."""
    found = [(GLYPHS[view.state], view.verdict)]
    if view.why:
        found.append(("why", view.why))
    if view.next:
        found.append(("next", view.next))
    return found


def step_label(step: m.StepView, view: m.RunView) -> str:
    """ "3 charge", with its argument where the run has several steps of that name."""
    several = sum(other.name == step.name for other in view.steps) > 1
    return f"{step.number} {step.name}" + (f"({step.argument})" if several and step.argument else "")


def step_state(step: m.StepView) -> str:
    if step.state == "retrying":
        return f"{GLYPHS['retrying']} {step.tries}/{step.max_tries if step.max_tries is not None else '∞'}"
    if step.state == "completed":
        return GLYPHS["completed"]
    return f"{GLYPHS[step.state]} {step.state}"


def step_rows(view: m.RunView) -> list[list[str]]:
    names = _labels(view)
    return [
        [
            name,
            step_state(step),
            str(step.tries),
            str(step.lost),
            "" if step.took_s is None else format_duration(step.took_s),
            step.outcome,
        ]
        for name, step in zip(names, view.steps, strict=True)
    ]


def _labels(view: m.RunView) -> list[str]:
    count: dict[str, int] = {}
    for step in view.steps:
        count[step.name] = count.get(step.name, 0) + 1
    return [
        f"{s.number} {s.name}" + (f"({s.argument})" if count[s.name] > 1 and s.argument else "") for s in view.steps
    ]


def value_lines(view: m.RunView) -> list[tuple[str, str]]:
    """Input and output where they are short, else their size and the command that prints them."""
    found = []
    if view.input:
        found.append(("in", ", ".join(value.text for value in view.input)))
    if view.output is not None:
        text = view.output.text
        if not view.output.complete:
            text += f"   ({view.output.size} bytes: pyworkflow-ray runs show {view.run_id} --json)"
        found.append(("out", text))
    return found


def attempt_rows(step: m.StepView, view: m.RunView, tz: dt.tzinfo) -> list[list[str]]:
    """The attempts of a step with the delay after each and why it was chosen. Equal failures in a row collapse."""
    rows: list[list[str]] = []
    before = ""
    for attempt in step.attempts:
        text = attempt.error.line if attempt.error else (attempt.cause or "").replace("_", " ")
        number = str(attempt.attempt)
        if attempt.counts:
            number += f"–{attempt.attempt + attempt.number - 1}" if attempt.number > 1 else ""
            text = ", ".join(f"{name} {count}" for name, count in attempt.counts.items())
        same, before = attempt.error is not None and text == before, text
        if same:
            text = '"'  # the same again
        delay = "" if attempt.delay_s is None else f"{format_duration(attempt.delay_s)} {attempt.delay_reason or ''}"
        rows.append(
            [
                number,
                f"{GLYPHS.get({'succeeded': 'completed'}.get(attempt.status, attempt.status), '·')} {attempt.status}",
                clock(attempt.started_at, view.now, tz) if attempt.started_at else "",
                "" if attempt.took_s is None else format_duration(attempt.took_s),
                delay.strip(),
                text,
            ]
        )
    return rows


ATTEMPT_COLUMNS = ("ATTEMPT", "STATE", "STARTED", "TOOK", "THEN WAITS", "ERROR")


def render_text(view: m.RunView, tz: dt.tzinfo = dt.UTC) -> str:
    """The whole view as plain text."""
    out = [f"{view.run_id}  {title(view)}   {lines.started_line(view, tz)}"]
    out += [
        f"{'  ' if i else ''}{label:<{5 if i else 1}} {text}" for i, (label, text) in enumerate(verdict_lines(view))
    ]
    out += [f"  {label:<5} {text}" for label, text in value_lines(view)]
    out += [f"  note  {note}" for note in view.notes]
    if view.steps:
        out += columns(STEP_COLUMNS, step_rows(view))
    out.append("do     " + " · ".join(view.commands))
    return "\n".join(out)


# The timeline -----------------------------------------------------------------------------------------------------


def timeline(view: m.RunView, width: int, tz: dt.tzinfo = dt.UTC) -> list[str]:
    """One row a step, drawn to `width` characters at least 40; every attempt keeps at least one character."""
    labels = _labels(view)
    margin = min(max((len(label) for label in labels), default=0), max(12, width // 3)) + 2
    room = max(24, width - margin - (2 if view.ended_at else 24))
    axis = axis_of(view, room)
    out = [(" " * margin + _ticks(axis, view, room, tz)).rstrip()]
    for label, step in zip(labels, view.steps, strict=True):
        name = label if len(label) <= margin - 2 else label[: margin - 3] + "…"
        out.append((name.ljust(margin) + _bar(step, view, axis, room)).rstrip())
        if view.ended_at is None:
            out[-1] = out[-1].ljust(margin + room) + "┊" + _upcoming(step, view, tz)
    legend = LEGEND + ("" if view.ended_at else "  ┊ now")
    out.append(" " * margin + legend if margin + len(legend) <= width else legend)
    return out


def _bar(step: m.StepView, view: m.RunView, axis: Axis, room: int) -> str:
    cells = [" "] * room
    for cut in axis.cuts:
        left, right = math.ceil(axis.place(cut.start) * room), math.floor(axis.place(cut.end) * room)
        text = f"╱ {cut.label} ╱".center(max(0, right - left))
        cells[left:right] = list(text[: right - left])
    cursor = 0
    for index, segment in enumerate(step.segments):
        left, right = int(axis.place(segment.start) * room), round(axis.place(segment.end) * room)
        if any(c.start <= segment.start.timestamp() and segment.end.timestamp() <= c.end for c in axis.cuts):
            cursor = max(cursor, right)
            continue  # the gap is cut and labelled
        keep = segment.kind not in ("queued", "waited")
        after = sum(s.kind not in ("queued", "waited") for s in step.segments[index + 1 :])
        left = min(max(left, cursor), max(cursor, room - after - 1))
        right = min(max(right, left + 1 if keep else left), room - after if room > after else room)
        cells[left:right] = MARKS[segment.kind] * (right - left)
        if segment.kind == "lost" and right - left > 1:
            cells[left : right - 1] = "▒" * (right - left - 1)
        cursor = max(cursor, right)
    return "".join(cells[:room])


def _upcoming(step: m.StepView, view: m.RunView, tz: dt.tzinfo) -> str:
    if step.next_at is None or step.next_at <= view.now or step.ended_at is not None:
        return ""
    return f"- -> {step.tries + 1} {clock(step.next_at, view.now, tz)}"


def _ticks(axis: Axis, view: m.RunView, room: int, tz: dt.tzinfo) -> str:
    """Times over the axis, as many as fit without touching; the first is the start."""
    cells = [" "] * room
    free = 0
    moments = [axis.start + (axis.end - axis.start) * i / 4 for i in range(5)] if not axis.cuts else [axis.start]
    moments += [moment for cut in axis.cuts for moment in (cut.end,)]
    short = axis.end - axis.start < 8
    for moment in sorted(moments):
        left = round(axis.place(moment) * room)
        at = dt.datetime.fromtimestamp(moment, dt.UTC)
        text = clock(at, view.now, tz)
        if short and moment > axis.start:
            text = "+" + format_duration(moment - axis.start)
        if left >= free and left + len(text) <= room:
            cells[left : left + len(text)] = text
            free = left + len(text) + 3
    end = "" if view.ended_at else "now"
    return "".join(cells) + end
