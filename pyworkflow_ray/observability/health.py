"""The health report: what was checked, what came of it, why, and what to do. Data and its words; nothing is asked here.

Pure. Made by `pyworkflow_ray.health`, which asks; rendered by the command line, by notebooks and over HTTP. Rules:

* A check is `ok`, `degraded` (it works, and somebody should look), `failing`, or `skipped` (there is nothing to ask:
  no Ray runs here, say). The report is as bad as its worst check; a skipped one counts for nothing.
* Whatever is not ok has a remedy.
"""

from __future__ import annotations

import datetime as dt
from html import escape
from typing import Any, Literal

from pydantic import Field, computed_field

from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.observability.model import ViewModel
from pyworkflow_ray.observability.text import columns
from pyworkflow_ray.observability.words import plural

HEALTH_SCHEMA = 1
Status = Literal["ok", "degraded", "failing"]
CheckStatus = Literal["ok", "degraded", "failing", "skipped"]
COLUMNS = ("CHECK", "STATE", "WHY", "REMEDY")
MARKS = {"ok": "✓", "degraded": "!", "failing": "✗", "skipped": "–"}
_WORST: tuple[Status, ...] = ("failing", "degraded")


class Absent(Exception):
    """In place of an answer: there is nothing to ask, and that is no fault. No Ray runs here, or no controller yet."""


class Check(ViewModel):
    """One thing that was looked at.

    Attributes:
        name: "ray", "controller", "anchors", "pool", "storage", "runs", "timers" or "breakers".
        status: "ok", "degraded", "failing", or "skipped" where there was nothing to ask.
        why: What was found, on one line.
        remedy: What to do; None where nothing is to be done.
        took_s: Seconds until the answer, or until it was given up.
        details: The figures behind it.
    """

    name: str
    status: CheckStatus
    why: str
    remedy: str | None = None
    took_s: float = 0.0
    details: dict[str, Any] = Field(default_factory=dict)


class HealthReport(ViewModel):
    """What `pw.health()` found: `status` is "ok", "degraded" or "failing", `checks` are the reasons, one by one.

    True where nothing is failing: `if not pw.health(): ...`.
    """

    schema_: int = Field(default=HEALTH_SCHEMA, alias="schema")
    at: dt.datetime
    storage: str
    checks: list[Check]
    took_s: float = 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def status(self) -> Status:
        found = {check.status for check in self.checks}
        return next((status for status in _WORST if status in found), "ok")

    def __bool__(self) -> bool:
        return self.status != "failing"

    def __getitem__(self, name: str) -> Check:
        """The check of this name.

        Raises:
            KeyError: there is none.
        """
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    @property
    def verdict(self) -> str:
        """One line: "degraded: runs; 1 of 8 checks, in 0.2 s"."""
        bad = [check.name for check in self.checks if check.status in _WORST]
        of = f"{len(bad)} of {plural(len(self.checks), 'check')}" if bad else plural(len(self.checks), "check")
        text = f"{of}, in {format_duration(self.took_s)}"
        return f"{self.status}: {', '.join(bad)}; {text}" if bad else f"{self.status}: {text}"

    def __str__(self) -> str:
        lines = [f"{MARKS[self.status]} {self.verdict}   {self.storage}", *columns(COLUMNS, check_rows(self))]
        return "\n".join(lines)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        colour = {"ok": "#2e8540", "degraded": "#b58b2f", "failing": "#c62828", "skipped": "#777"}
        head = "".join(f'<th style="text-align:left;padding:0 1em 0 0">{name}</th>' for name in COLUMNS)
        body = "".join(
            f'<tr style="color:{colour[check.status] if check.status != "ok" else "inherit"}">'
            + "".join(f'<td style="text-align:left;padding:0 1em 0 0">{escape(cell)}</td>' for cell in row)
            + "</tr>"
            for check, row in zip(self.checks, check_rows(self), strict=True)
        )
        return (
            '<div class="pyworkflow-health" style="font-family:monospace;font-size:13px;line-height:1.5">'
            f'<div style="color:{colour[self.status]}"><b>{MARKS[self.status]} {escape(self.verdict)}</b> '
            f'<span style="color:#777">{escape(self.storage)}</span></div>'
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )


def check_rows(report: HealthReport) -> list[list[str]]:
    return [
        [check.name, f"{MARKS[check.status]} {check.status}", " ".join(check.why.split()), check.remedy or ""]
        for check in report.checks
    ]
