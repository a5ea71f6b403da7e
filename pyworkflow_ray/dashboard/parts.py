"""Views drawn as HTML: whole pages, and the regions of a page that are drawn again while it is open.

Called by `pages`, `live` and `guard`; calls `observability` for every word, and jinja2, which escapes all of them. Pure
but for its templates: what to draw, the instant and the zone are handed in. Nothing here says what a run is at.

A region is a template whose outermost element has its name as id; the script of the page replaces what differs in it.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import Response

from pyworkflow_ray.breaker import BreakerSnapshot
from pyworkflow_ray.dashboard.deeds import offered
from pyworkflow_ray.observability import text
from pyworkflow_ray.observability.html import timeline_svg
from pyworkflow_ray.observability.lines import started_line
from pyworkflow_ray.observability.lists import LIST_COLUMNS, breaker_lines, list_rows, total_line
from pyworkflow_ray.observability.model import RunView, StepView
from pyworkflow_ray.observability.words import GLYPHS, plural
from pyworkflow_ray.reading import Listed

HERE: Final = Path(__file__).parent
FOLD_AFTER: Final = 60  # steps: as on a terminal, the completed ones of a longer run are folded
MOST_STEPS: Final = 1_000
MOST_ATTEMPTS: Final = 50  # of one step
BREAKER_COLUMNS: Final = ("BREAKER", "STATE", "WHY", "NEXT", "COUNTS")

Regions = dict[str, str]


@dataclass(frozen=True)
class Reach:
    """How things stand with Ray. state: "looking", "connected", "away" (`why`), or "off": nothing is to be done."""

    state: str
    why: str = ""


@dataclass(frozen=True)
class Form:
    """What the forms of one page carry: proof that they are ours, and that they are one form."""

    csrf: str
    once: str


@dataclass(frozen=True)
class Breakers:
    """The breakers to show. kept: they are as the storage keeps them, `ages` seconds ago. silent: do not answer."""

    found: Sequence[BreakerSnapshot]
    ages: Sequence[float] = ()
    kept: bool = False
    silent: Sequence[str] = ()


class Parts:
    """The templates, and what is the same on every page."""

    def __init__(self, place: str, zone: dt.tzinfo, version: str) -> None:
        self.zone = zone
        self._jinja = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._jinja.globals.update(place=place, version=version, glyphs=GLYPHS)

    def page(self, template: str, status: int = 200, **given: Any) -> Response:
        """A whole page. A character that is none (half of a pair) is shown as a question mark."""
        html = self._jinja.get_template(template).render(**given)
        return Response(html.encode("utf-8", "replace"), status, media_type="text/html")

    def region(self, name: str, **given: Any) -> Markup:
        return Markup(self._jinja.get_template(f"region_{name}.html").render(**given))

    # The list of runs ---------------------------------------------------------------------------------------------

    def list_regions(self, listed: Listed, older: str, newest: str | None) -> Regions:
        rows = list_rows(listed.views)
        return {
            "runs": self.region(
                "runs",
                columns=LIST_COLUMNS,
                rows=list(zip(listed.views, rows, strict=True)),
                listed=listed,
                total=total_line(listed.views) if listed.views else "",
                older=older,
                newest=newest,
            )
        }

    def list_later(self) -> Regions:
        """In place of the list, while it takes long."""
        return {"runs": self.region("runs_later")}

    # One run ------------------------------------------------------------------------------------------------------

    def run_regions(self, view: RunView, *, form: Form, every: bool, reach: Reach, breakers: Breakers) -> Regions:
        shown, hidden = shown_steps(view, every)
        deeds = [] if reach.state == "off" else offered(view)
        rows = text.step_rows(view)
        numbers = {step.number for step in shown}
        steps = [(step, row) for step, row in zip(view.steps, rows, strict=True) if step.number in numbers]
        head = {
            "view": view,
            "title_line": text.title(view),
            "started": started_line(view, self.zone),
            "lines": text.verdict_lines(view),
            "values": text.value_lines(view),
        }
        return {
            "verdict": self.region("verdict", **head),
            "acts": self.region("acts", view=view, deeds=deeds, form=form, reach=reach),
            "timeline": self.region("timeline", view=view, svg=self._timeline(view, shown)),
            "steps": self.region(
                "steps", view=view, columns=text.STEP_COLUMNS, right=text.RIGHT, steps=steps, hidden=hidden, every=every
            ),
            "attempts": self.region("attempts", view=view, steps=[self._attempts(step, view) for step, _ in steps]),
            "run-breakers": self.region("run_breakers", rows=[breaker_cells(one) for one in breakers.found]),
        }

    def _timeline(self, view: RunView, shown: Sequence[StepView]) -> Markup:
        """The notebook's own drawing, which escapes what is in it."""
        return Markup(timeline_svg(view.model_copy(update={"steps": list(shown)}), self.zone)) if shown else Markup("")

    def _attempts(self, step: StepView, view: RunView) -> dict[str, Any]:
        rows = text.attempt_rows(step, view, self.zone)
        last_failed = max((i for i, one in enumerate(step.attempts) if one.status == "failed"), default=-1)
        states = [
            "earlier" if one.status == "failed" and (i < last_failed or step.state != "failed") else one.status
            for i, one in enumerate(step.attempts)
        ]
        breakers = [one.breaker for one in step.attempts if one.breaker]
        return {
            "step": step,
            "columns": text.ATTEMPT_COLUMNS,
            "rows": list(zip(states, rows, strict=True))[-MOST_ATTEMPTS:],
            "left_out": max(0, len(rows) - MOST_ATTEMPTS),
            "breaker": breakers[-1] if breakers else "",
            "open": step.state in ("failed", "retrying"),
        }

    # Breakers -----------------------------------------------------------------------------------------------------

    def breaker_regions(self, breakers: Breakers, *, form: Form, reach: Reach) -> Regions:
        rows = [breaker_cells(one) for one in breakers.found]
        given = {"columns": BREAKER_COLUMNS, "rows": rows, "breakers": breakers, "form": form, "reach": reach}
        return {"breakers": self.region("breakers", **given)}


def breaker_cells(one: BreakerSnapshot) -> dict[str, Any]:
    """The notebook's lines of a breaker, as cells."""
    (_, verdict), *further = breaker_lines(one)
    told: dict[str, list[str]] = {}
    for label, line in further:
        told.setdefault(label, []).append(line)
    why = [*told.get("why", []), *told.get("node", [])]
    counts = [*told.get("counts", []), *told.get("ramp", [])]
    return {
        "name": one.name,
        "state": str(one.state),
        "verdict": verdict.removeprefix(f"{one.name} is "),
        "why": why,
        "next": told.get("next", []),
        "counts": counts,
        "rule": told.get("rule", [""])[0],
    }


def shown_steps(view: RunView, every: bool) -> tuple[list[StepView], int]:
    """The steps to draw, and how many are left out: of a long run the completed ones, but the first and last five; of
    what is then left the middle, where that is still too much."""
    steps = view.steps
    if not every and len(steps) > FOLD_AFTER:
        last = len(steps) - 5
        steps = [step for i, step in enumerate(steps) if step.state != "completed" or i < 5 or i >= last]
    if every:
        steps = steps[:MOST_STEPS]
    elif len(steps) > 2 * FOLD_AFTER:
        steps = [*steps[:FOLD_AFTER], *steps[-FOLD_AFTER:]]
    return list(steps), len(view.steps) - len(steps)


def news_of_run(view: RunView) -> str:
    """What a screen reader is told when it changes: nothing that changes with every second."""
    return f"{view.run_id}: {view.row.state}" + (f", {view.row.step}" if view.row.step else "")


def news_of_list(listed: Listed) -> str:
    return total_line(listed.views) if listed.views else "no runs"


def news_of_breakers(breakers: Breakers) -> str:
    counts = Counter(str(one.state).replace("_", " ") for one in breakers.found)
    return ", ".join(f"{plural(number, 'breaker')} {state}" for state, number in counts.items()) or "no breakers"
