"""Progress while it happens: a block that is drawn over itself on a terminal, lines where nothing can be drawn over.

Called by the command line and by `watching`; `block` and `Told` are pure. Faults: a stream that has gone away (progress
is given up, the run is not), one that can't encode a glyph (its twin is written).
"""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import IO

from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.observability.lists import list_rows
from pyworkflow_ray.observability.model import RunView, StepView
from pyworkflow_ray.observability.text import verdict_lines
from pyworkflow_ray.observability.words import ASCII, GLYPHS, plural

BAR = 24
ROWS = 8  # of runs that have not ended, beside their bar
_STEP = 10  # per cent of a batch, or of many runs, that are worth a line
_ENDED = ("completed", "failed", "cancelled")


def bar(done: int, total: int, width: int = BAR) -> str:
    filled = width if total <= 0 else min(width, round(width * done / total))
    return "█" * filled + "░" * (width - filled)


def cells(text: str) -> int:
    """Columns of a terminal that it takes: a wide character takes two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def block(views: Sequence[RunView], ended: Sequence[RunView] = ()) -> list[str]:
    """What a terminal shows: one run's three lines and its batches, or a bar over many runs and what is under way.

    views: those that are still looked at. ended: those that have ended, of many.
    """
    if len(views) + len(ended) == 1:
        return _one([*views, *ended][0])
    counts = Counter(view.state for view in (*ended, *views))
    total = len(views) + len(ended)
    said = ", ".join(f"{count} {state}" for state, count in counts.items())
    lines = [f"{bar(len(ended), total)} {len(ended)} of {plural(total, 'run')} ended: {said}"]
    busy = sorted(views, key=lambda view: view.state not in ("failed", "stuck", "retrying", "paused"))[:ROWS]
    for row in list_rows(busy):
        lines.append("  ".join(cell for cell in (row[0], row[2], row[3], row[4], row[5]) if cell and cell != "–"))
    return lines + ([f"... {len(views) - ROWS} more"] if len(views) > ROWS else [])


def _one(view: RunView) -> list[str]:
    took = (view.ended_at or view.now) - view.created_at
    (glyph, verdict), *further = verdict_lines(view)
    lines = [f"{glyph} {verdict}   {format_duration(round(took.total_seconds(), 1))}"]
    lines += [f"  {label:<5} {text}" for label, text in further]
    for step in view.steps:
        if step.items is not None and step.ended_at is None:
            lines.append(f"  {_map_line(step)}")
    done = sum(step.ended_at is not None for step in view.steps)
    if len(view.steps) > 1:
        lines.append(f"  steps {done} of {len(view.steps)} that were begun are done")
    return lines


def _map_line(step: StepView) -> str:
    items = step.items
    assert items is not None
    drawn = bar(items.done, items.total) + " " if items.total else ""
    return f"{drawn}{step.name}: {step.outcome}"


class Told:
    """Lines for a log: what is news since the last look. Not every step: what a person would want to have been told."""

    def __init__(self) -> None:
        self._seen: set[tuple[object, ...]] = set()

    def news(self, views: Sequence[RunView], ended: Sequence[RunView] = ()) -> list[str]:
        lines = []
        many = len(views) + len(ended) > 1
        for view in (*views, *ended):
            lines += [line for key, line in self._of_run(view, many) if self._new(key)]
        if many and ended:
            total = len(views) + len(ended)
            share = 100 * len(ended) // total // _STEP * _STEP
            if self._new(("ended", share)):
                lines.append(f"{len(ended)} of {plural(total, 'run')} ended")
        return lines

    def _new(self, key: tuple[object, ...]) -> bool:
        if key in self._seen:
            return False
        self._seen.add(key)
        return True

    def _of_run(self, view: RunView, many: bool) -> list[tuple[tuple[object, ...], str]]:
        run = f"{view.run_id}: " if many else ""
        found: list[tuple[tuple[object, ...], str]] = []
        for step in view.steps:
            place = (view.run_id, step.position)
            if step.items is not None and step.items.total:
                share = 100 * step.items.done // step.items.total // _STEP * _STEP
                if share > 0:
                    found.append(((*place, "share", share), f"{run}{step.name}: {step.outcome}"))
            elif step.error is not None and step.state in ("retrying", "failed"):
                tries = f"attempt {step.tries}" + (f" of {step.max_tries}" if step.max_tries is not None else "")
                failed = "failed" if step.state == "failed" else f"{tries} failed"
                found.append(((*place, step.state, step.tries), f"{run}{step.name} {failed}: {step.error.line}"))
            if step.lost:
                found.append(((*place, "lost", step.lost), f"{run}{step.name}: its worker was lost, it is begun again"))
        if view.state in ("parked", "paused", "stuck", "waiting"):
            why = f": {view.why}" if view.why else ""
            found.append(((view.run_id, view.state, view.why), f"{run}{GLYPHS[view.state]} {view.verdict}{why}"))
        return found


class Drawing:
    """A block on a terminal, drawn over itself; on any other stream, lines of news.

    live: whether the stream is a terminal that can be drawn on (TERM=dumb is none).
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.live = bool(getattr(stream, "isatty", lambda: False)()) and os.environ.get("TERM") != "dumb"
        self._told = Told()
        self._height = 0
        self._gone = False

    def show(self, views: Sequence[RunView], ended: Sequence[RunView] = ()) -> None:
        lines = block(views, ended) if self.live else self._told.news(views, ended)
        if self.live:
            self._write(self._erasing() + "".join(f"{self._fitting(line)}\n" for line in lines))
            self._height = len(lines)
        elif lines:
            self._write("".join(f"{self._encodable(line)}\n" for line in lines))

    def clear(self) -> None:
        """Take the block away: what is said now is the result."""
        if self.live:
            self._write(self._erasing())
            self._height = 0

    def _erasing(self) -> str:
        return f"\x1b[{self._height}F\x1b[J" if self._height else ""

    def _fitting(self, line: str) -> str:
        """One line of the terminal: a wrapped one could not be drawn over."""
        room = max(20, shutil.get_terminal_size((80, 24)).columns - 1)
        shown = self._encodable(line)
        if cells(shown) <= room:
            return shown
        end = self._encodable("…")
        while cells(shown) > room - len(end):
            shown = shown[:-1]
        return shown + end

    def _encodable(self, text: str) -> str:
        text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            text.encode(encoding)
        except (UnicodeEncodeError, LookupError):
            return text.translate(ASCII).encode("ascii", "backslashreplace").decode("ascii")
        return text

    def _write(self, text: str) -> None:
        if self._gone:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # whoever read it has gone: the run goes on
            self._gone = True
