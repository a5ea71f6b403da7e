"""A run in a notebook: the same three lines and table, tracebacks in `<details>`, the timeline as inline SVG.

Pure. No script, no external file, readable with styles stripped; every text is escaped, for run ids, messages and
values are other people's. Called by `RunView._repr_html_` and handles; the dashboard has the timeline from here, and
gives its rectangles other colours by their classes.
"""

from __future__ import annotations

import datetime as dt
from html import escape

from pyworkflow_ray.observability import lines
from pyworkflow_ray.observability import model as m
from pyworkflow_ray.observability.axis import axis_of
from pyworkflow_ray.observability.text import STEP_COLUMNS, step_rows, title, value_lines, verdict_lines
from pyworkflow_ray.observability.words import clock

COLOURS = {
    "failed": "#9a9a9a",  # a failed attempt; the one that ended its step is ENDED
    "succeeded": "#2e8540",
    "lost": "#7b4fa0",
    "running": "#2f6fb5",
    "waited": "#e3e3e3",
    "queued": "#f2f2f2",
    "cancelled": "#b58b2f",
}
ENDED = "#c62828"
WIDTH, ROW, LABEL = 760, 18, 170


def render_html(view: m.RunView, tz: dt.tzinfo = dt.UTC) -> str:
    """One `<div>` with the whole view."""
    colour = {"failed": ENDED, "stuck": ENDED, "completed": COLOURS["succeeded"]}.get(view.state, "inherit")
    parts = [
        '<div class="pyworkflow-run" style="font-family:monospace;font-size:13px;line-height:1.5">',
        f"<div><b>{escape(view.run_id)}</b> {escape(title(view))} "
        f'<span style="color:#777">{escape(lines.started_line(view, tz))}</span></div>',
    ]
    for index, (label, text) in enumerate(verdict_lines(view)):
        if index == 0:
            parts.append(f'<div style="color:{colour}"><b>{escape(label)} {escape(text)}</b></div>')
        else:
            parts.append(f"<div>{escape(label)}: {escape(text)}</div>")
    parts += [f"<div>{escape(label)}: {escape(text)}</div>" for label, text in value_lines(view)]
    parts += [f"<div>note: {escape(note)}</div>" for note in view.notes]
    if view.steps:
        parts += [_table(view), timeline_svg(view, tz)]
    parts += _tracebacks(view)
    commands = " · ".join(f"pyworkflow-ray {command}" for command in view.commands)
    parts.append(f'<div style="color:#777">{escape(commands)}</div></div>')
    return "\n".join(parts)


def _table(view: m.RunView) -> str:
    head = "".join(f'<th style="text-align:left;padding:0 1em 0 0">{name}</th>' for name in STEP_COLUMNS)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left;padding:0 1em 0 0">{escape(c)}</td>' for c in row) + "</tr>"
        for row in step_rows(view)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _tracebacks(view: m.RunView) -> list[str]:
    found = []
    for step in view.steps:
        for error in step.errors:
            times = f" ({error.count}×)" if error.count > 1 else ""
            text = escape(error.traceback or error.message)
            found.append(
                f"<details><summary>{step.number} {escape(step.name)}: {escape(error.line)}{times}</summary>"
                f"<pre>{text}</pre></details>"
            )
    if view.error is not None and not any(step.errors and step.state == "failed" for step in view.steps):
        text = escape(view.error.traceback or view.error.message)
        found.append(f"<details><summary>{escape(view.error.line)}</summary><pre>{text}</pre></details>")
    return found


def timeline_svg(view: m.RunView, tz: dt.tzinfo = dt.UTC) -> str:
    """The timeline as one `<svg>`: a row a step, a rectangle a segment with its words as a `<title>`."""
    axis = axis_of(view)
    top = 2 if axis.cuts else 1  # rows: the labels of cuts stand below the times, which they would cover
    height = ROW * (len(view.steps) + top) + 4
    span = WIDTH - LABEL - 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="monospace" font-size="11"><title>timeline of {escape(view.run_id)}</title>',
        f'<text x="{LABEL}" y="12">{escape(clock(view.created_at, view.now, tz))}</text>',
        f'<text x="{WIDTH - 10}" y="12" text-anchor="end">'
        f"{escape(clock(view.ended_at, view.now, tz) if view.ended_at else 'now')}</text>",
    ]
    for row, step in enumerate(view.steps, start=top):
        y = ROW * row + 2
        parts.append(f'<text x="0" y="{y + 12}">{escape(f"{step.number} {step.name}"[:26])}</text>')
        for index, segment in enumerate(step.segments):
            left = LABEL + span * axis.place(segment.start)
            width = max(
                3.0 if segment.kind not in ("queued", "waited") else 0.0, span * axis.place(segment.end) + LABEL - left
            )
            last = index == len(step.segments) - 1
            ended = segment.kind == "failed" and last and step.state == "failed"
            colour, kind = (ENDED, "failed ended") if ended else (COLOURS[segment.kind], segment.kind)
            words = segment.kind + (f", attempt {segment.attempt}" if segment.attempt else "")
            parts.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 4}" fill="{colour}">'
                f"<title>{escape(words)}</title></rect>"
            )
    for cut in axis.cuts:
        middle = LABEL + span * (axis.place(cut.start) + axis.place(cut.end)) / 2
        parts.append(f'<text x="{middle:.1f}" y="{12 + ROW}" text-anchor="middle">╱ {escape(cut.label)} ╱</text>')
    return "".join([*parts, "</svg>"])
