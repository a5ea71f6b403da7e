"""The time axis of a timeline, shared by the terminal's and the notebook's drawing.

Pure. A silent gap (nothing of the run goes on: it is parked, or its owner is away) of more than a fifth of the axis is
cut to a fixed share and labelled, so that two days of sleep do not hide four seconds of work.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.observability import model as m

SILENT_SHARE = 0.2  # of the axis: a longer silent gap is cut (UX.md)
CUT_SHARE = 0.12  # of the drawing that a cut gap takes: room for its label
LONG_WAIT_S = 600.0  # a longer wait between attempts is parked, and counts as silent


@dataclass(frozen=True)
class Cut:
    start: float
    end: float
    label: str
    share: float  # of the drawing


@dataclass(frozen=True)
class Axis:
    """From UNIX times to places in [0, 1]."""

    start: float
    end: float
    cuts: tuple[Cut, ...]

    def place(self, at: dt.datetime | float) -> float:
        moment = at.timestamp() if isinstance(at, dt.datetime) else at
        moment = min(max(moment, self.start), self.end)
        silent = sum(cut.end - cut.start for cut in self.cuts)
        live = max(1e-9, self.end - self.start - silent)
        live_share = 1.0 - sum(cut.share for cut in self.cuts)
        passed, place = moment - self.start, 0.0
        for cut in self.cuts:
            inside = min(max(moment - cut.start, 0.0), cut.end - cut.start)
            passed -= inside
            place += cut.share * inside / (cut.end - cut.start)
        return min(1.0, max(0.0, place + live_share * passed / live))


def axis_of(view: m.RunView, room: int = 100) -> Axis:
    """From the run's creation to its end, or to now. `room` is the drawing's width in characters, for the labels."""
    start = view.created_at.timestamp()
    end = max(start + 1e-6, (view.ended_at or view.now).timestamp())
    busy = sorted(
        (max(start, s.start.timestamp()), min(end, s.end.timestamp()))
        for step in view.steps
        for s in step.segments
        if not (s.kind in ("waited", "queued") and (s.end - s.start).total_seconds() > LONG_WAIT_S)
    )
    cuts, cursor = [], start
    for begin, until in [*busy, (end, end)]:
        if begin - cursor > SILENT_SHARE * (end - start):
            label = format_duration(begin - cursor)
            cuts.append(Cut(cursor, begin, label, max(CUT_SHARE, (len(label) + 6) / room)))
        cursor = max(cursor, until)
    if not busy or sum(cut.share for cut in cuts) > 0.7:
        return Axis(start, end, ())
    return Axis(start, end, tuple(cuts))
