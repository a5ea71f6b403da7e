"""Timeline and notebook: what is drawn, cut, escaped."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability.html import timeline_svg
from pyworkflow_ray.observability.text import attempt_rows, timeline
from pyworkflow_ray.observability.view import explain
from pyworkflow_ray.observability.words import ASCII, GLYPHS
from tests.unit.observability.conftest import error

START = 1_800_000_000.0
Make = Callable[..., Any]


def test_timeline_reads_as_specified(retrying: Any) -> None:
    view = explain(retrying.events, START + 425)
    scale, one, two, three, legend = timeline(view, 100)
    assert scale.split() == ["08:00:00", "08:01:46", "08:03:32", "08:05:18", "now"]
    assert one.rstrip(" ┊") == "1 validate  █"
    assert two.rstrip(" ┊") == "2 reserve   ▓↯█"
    assert three.count("▓") == 4
    assert three.endswith("▓░┊- -> 5 08:10:17")
    assert legend.strip() == "▓ failed  ░ waiting  █ ok  · queued  ↯ worker lost  ▒ running  ┊ now"


@pytest.mark.parametrize("width", [40, 60, 80, 120, 400])
def test_timeline_rows_have_one_length_and_keep_every_attempt(retrying: Any, width: int) -> None:
    view = explain(retrying.events, START + 425)
    rows = timeline(view, width)[1:-1]
    bars = [row.partition("┊")[0] for row in rows]
    assert len({len(bar) for bar in bars}) == 1
    assert [(bar.count("▓"), bar.count("↯"), bar.count("█")) for bar in bars][1:2] == [(1, 1, 1)]


def test_silent_gap_is_cut_and_labelled(history: Make) -> None:
    run = history().activated(0).scheduled(0, "a").completed_step(2, "1", took=2)
    run.add(2, ev.TimerStarted(position="2", due_at=START + 172_802, delay_s=172_800))
    run.add(2, ev.RunParked(due_at=START + 172_802)).activated(172_802, 1, "wake").add(
        172_802, ev.TimerFired(position="2")
    )
    run.scheduled(172_802, "b").completed_step(172_804, "3", took=2)
    run.events[-2] = run.events[-2].model_copy(update={"position": "3"})
    run.add(172_804, ev.RunCompleted(result=ev.Payload(enc="json", data=1)))
    rows = timeline(explain(run.events, START + 172_900), 80)
    assert all("╱ 2d ╱" in row for row in rows[1:3])
    assert rows[1].count("█") > 15, "the two seconds before the gap are seen"
    assert rows[2].count("█") > 15


def test_run_without_steps_has_a_timeline(history: Make) -> None:
    assert timeline(explain(history().events, START + 5), 80)


def test_delay_of_each_attempt_and_why_it_was_chosen_is_shown(retrying: Any) -> None:
    view = explain(retrying.events, START + 425)
    rows = attempt_rows(view.steps[2], view, UTC)
    assert [row[4] for row in rows] == ["30s backoff", "1m backoff", "2m backoff", "3m 26s backoff"]
    assert [row[5] for row in rows] == ["ConnectionError: 503 from payments", '"', '"', '"']


def test_another_error_between_equal_ones_is_shown(history: Make) -> None:
    run = history().activated(0).scheduled(0, "charge", max_retries=9)
    for attempt, what in enumerate(("503", "503", "429", "429", "503"), start=1):
        run.failed_attempt(attempt, "1", attempt, 1, what=error("ConnectionError", what, "transient"))
    view = explain(run.events, START + 9)
    told = [row[5] for row in attempt_rows(view.steps[0], view, UTC)]
    assert told == ["ConnectionError: 503", '"', "ConnectionError: 429", '"', "ConnectionError: 503"]


def test_the_labels_of_cuts_do_not_cover_the_times(history: Make) -> None:
    run = history().activated(0).scheduled(7200, "a").completed_step(7201, "1", took=1)
    texts = ElementTree.fromstring(timeline_svg(explain(run.events, START + 7300))).iter(
        "{http://www.w3.org/2000/svg}text"
    )
    places = {text.get("y") for text in texts if "╱" in (text.text or "")}
    assert len(places) == 1
    assert places.isdisjoint({"12"})  # where the times stand


def test_every_glyph_has_an_ascii_twin() -> None:
    drawn = "".join(GLYPHS.values()) + "▓░█·↯▒┊│╱–×…"
    assert drawn.translate(ASCII).isascii()


class Collector(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_notebook_shows_the_three_lines_table_tracebacks_and_timeline(retrying: Any) -> None:
    view = explain(retrying.events, START + 425)
    seen = Collector()
    seen.feed(view._repr_html_())
    text = " ".join(seen.text)
    assert view.verdict in text
    assert str(view.why) in text
    assert str(view.next) in text
    assert {"table", "details", "svg"} <= set(seen.tags)
    assert "script" not in seen.tags
    assert "Traceback (most recent call last)" in text


def test_notebook_escapes_what_other_people_wrote(history: Make, make_error: Make) -> None:
    evil = "<script>alert('x')</script>&\""
    run = history(workflow=evil, attributes={evil: evil}, args=[ev.Payload(enc="json", data=evil, size=9)])
    run.activated(0).scheduled(0, "x", evil).failed_attempt(1, "1", 1, None, what=make_error(evil, evil, "permanent"))
    run.events[-2] = run.events[-2].model_copy(update={"step": evil})
    run.add(1, ev.RunFailed(error=make_error(evil, evil, "permanent"), position="1"))
    html = explain(run.events, START + 2)._repr_html_()
    assert "<script" not in html
    seen = Collector()
    seen.feed(html)
    assert evil in "".join(seen.text)


def test_svg_is_well_formed_and_has_a_rectangle_a_segment(retrying: Any) -> None:
    view = explain(retrying.events, START + 425)
    root = ElementTree.fromstring(timeline_svg(view))
    rectangles = root.findall("{http://www.w3.org/2000/svg}rect")
    assert len(rectangles) == sum(len(step.segments) for step in view.steps)
