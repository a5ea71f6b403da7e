"""Many runs, a batch, a breaker: as rows of text and as HTML, for notebooks and the command line.

Pure. Same rules as `html`: no script, no external file, readable with styles stripped, everything escaped. Called by
the api's `_repr_html_`s, by `watching` and by the commands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.observability.html import COLOURS, ENDED
from pyworkflow_ray.observability.model import RunView
from pyworkflow_ray.observability.text import columns
from pyworkflow_ray.observability.words import GLYPHS, one_line, plural, short_name

LIST_COLUMNS = ("RUN", "WORKFLOW", "STATE", "STEP", "WHY", "NEXT", "AGE")
FAILURES_SHOWN = 20
STATE_COLOURS = {
    "completed": COLOURS["succeeded"], "failed": ENDED, "stuck": ENDED, "retrying": COLOURS["cancelled"],
    "paused": COLOURS["lost"], "running": COLOURS["running"], "open": ENDED, "forced_open": ENDED,
    "half_open": COLOURS["cancelled"], "closed": COLOURS["succeeded"], "forced_closed": COLOURS["cancelled"],
}  # fmt: skip
_CELL = 'style="text-align:left;padding:0 1em 0 0'


def list_rows(views: Sequence[RunView]) -> list[list[str]]:
    """A row a run."""
    return [
        [
            view.run_id,
            short_name(view.workflow),
            f"{GLYPHS.get(view.state, '·')} {view.row.state}",
            view.row.step or "–",
            one_line(view.row.why),
            view.row.next,
            format_duration(max(0.0, (view.now - view.created_at).total_seconds())).split()[0],
        ]
        for view in views
    ]


def total_line(views: Sequence[RunView]) -> str:
    """ "4 runs: 1 retrying, 3 completed"."""
    counts = Counter(view.state for view in views)
    return f"{plural(len(views), 'run')}: " + ", ".join(f"{count} {state}" for state, count in counts.items())


def list_text(views: Sequence[RunView], more: int = 0, damaged: Sequence[str] = ()) -> str:
    if not views and not damaged:
        return "no runs"
    lines = [*columns(LIST_COLUMNS, list_rows(views)), total_line(views)] if views else []
    return "\n".join([*lines, *_remarks(more, damaged)])


def list_html(views: Sequence[RunView], more: int = 0, damaged: Sequence[str] = ()) -> str:
    body = table(LIST_COLUMNS, list_rows(views), [view.state for view in views]) if views else ""
    total = total_line(views) if views else "" if damaged else "no runs"
    return _box("runs", [body, *(_dim(line) for line in (total, *_remarks(more, damaged)) if line)])


def _remarks(more: int, damaged: Sequence[str]) -> list[str]:
    return ([f"{more} more are not shown"] if more else []) + [f"can't be read: {one}" for one in damaged]


def table(names: Sequence[str], rows: Sequence[Sequence[str]], states: Sequence[str] = ()) -> str:
    """A table; the cells under STATE in the colour of the row's state."""
    head = "".join(f'<th {_CELL}">{escape(name)}</th>' for name in names)
    lines = []
    for number, row in enumerate(rows):
        colour = STATE_COLOURS.get(states[number]) if number < len(states) else None
        cells = [
            f'<td {_CELL}{f";color:{colour}" if colour and name == "STATE" else ""}">{escape(cell)}</td>'
            for name, cell in zip(names, row, strict=True)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _box(kind: str, parts: Sequence[str]) -> str:
    inside = "\n".join(part for part in parts if part)
    return f'<div class="pyworkflow-{kind}" style="font-family:monospace;font-size:13px;line-height:1.5">{inside}</div>'


def _dim(text: str) -> str:
    return f'<div style="color:#777">{escape(text)}</div>'


# A batch ----------------------------------------------------------------------------------------------------------


def batch_lines(
    total: int, failed: int, not_done: int, by_type: dict[str, int], retried: dict[str, int], stopped: str | None
) -> tuple[str, str, list[str]]:
    """(state, verdict, further lines) of what a map came to."""
    done = total - not_done
    state = "failed" if failed or stopped else "completed"
    verdict = f"{done - failed:,} of {done:,} items succeeded"
    if failed:
        verdict += f", {failed:,} failed (" + ", ".join(f"{name} {count:,}" for name, count in by_type.items()) + ")"
    further = []
    if stopped:
        further.append(f"stopped early: {stopped}" + (f"; {not_done:,} not done" if not_done else ""))
    if retried:
        counts = ", ".join(f"{name} {count:,}" for name, count in retried.items())
        further.append(f"retried: {counts}")
    return state, verdict, further


def batch_text(lines: tuple[str, str, list[str]], failures: Sequence[tuple[int, str, str]], more: int) -> str:
    state, verdict, further = lines
    out = [f"{GLYPHS[state]} {verdict}", *(f"  {line}" for line in further)]
    if failures:
        out += columns(("ITEM", "ERROR"), [[str(index), error] for index, error, _ in failures])
    if more:
        out.append(f"{more:,} more failures: .failed")
    return "\n".join(out)


def batch_html(lines: tuple[str, str, list[str]], failures: Sequence[tuple[int, str, str]], more: int) -> str:
    """failures: (index, error on one line, traceback or nothing)."""
    state, verdict, further = lines
    parts = [f'<div style="color:{STATE_COLOURS[state]}"><b>{GLYPHS[state]} {escape(verdict)}</b></div>']
    parts += [f"<div>{escape(line)}</div>" for line in further]
    for index, error, trace in failures:
        summary = f"item {index}: {escape(error)}"
        parts.append(
            f"<details><summary>{summary}</summary><pre>{escape(trace)}</pre></details>"
            if trace
            else f"<div>{summary}</div>"
        )
    if more:
        parts.append(_dim(f"{more:,} more failures: .failed"))
    return _box("batch", parts)


# A breaker --------------------------------------------------------------------------------------------------------


def breaker_lines(one: Any) -> list[tuple[str, str]]:
    """(label, text) of a `BreakerSnapshot`: the verdict, why, what comes next, what is counted."""
    name = one.name
    state = str(one.state).replace("_", " ")
    found = [("open" if str(one.state) in ("open", "forced_open") else str(one.state), f"{name} is {state}")]
    if one.reason:
        found.append(("why", one_line(one.reason)))
    if str(one.state) == "open":
        rest = one.retry_after or 0.0
        after = f"in {format_duration(round(rest, 1))}" if rest > 0 else "now"
        found.append(("next", f"half-open {after}, at the next call: it is let through to probe"))
    elif str(one.state) == "half_open":
        found.append(("next", f"{plural(one.probing, 'call')} probing; {one.successes} more successes close it"))
    elif str(one.state) in ("forced_open", "forced_closed"):
        found.append(("next", "nothing by itself: .reset() lets it judge again"))
    counted = f"{plural(one.failures, 'failure')}"
    if one.failure_rate is not None:
        counted += f" of {one.calls} calls, {one.failure_rate:.0%}"
    if one.slow_call_rate is not None:
        counted += f", {one.slow_call_rate:.0%} slow"
    found.append(("counts", counted))
    if one.ramp is not None:
        found.append(("ramp", f"{one.ramp:.0%} of calls are let through"))
    found += [("node", f"{node}: open here alone, {why}") for node, why in one.nodes.items()]
    settings = ", ".join(f"{option}={value}" for option, value in one.settings.items() if value is not None)
    found.append(("rule", settings))
    return found


def breaker_text(one: Any) -> str:
    (_, verdict), *further = breaker_lines(one)
    return "\n".join([verdict, *(f"  {label:<6} {text}" for label, text in further)])


def breaker_html(one: Any) -> str:
    (_, verdict), *further = breaker_lines(one)
    colour = STATE_COLOURS.get(str(one.state), "inherit")
    parts = [f'<div style="color:{colour}"><b>{escape(verdict)}</b></div>']
    parts += [f"<div>{escape(label)}: {escape(text)}</div>" for label, text in further]
    return _box("breaker", parts)
