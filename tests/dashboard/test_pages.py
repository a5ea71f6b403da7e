"""What the pages show, of a real storage with runs in every state: the same words as the command line and notebooks."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability.html import timeline_svg
from pyworkflow_ray.observability.lists import LIST_COLUMNS, list_rows
from pyworkflow_ray.observability.text import attempt_rows, step_rows, verdict_lines
from pyworkflow_ray.reading import Filter, Reader
from tests.cli.conftest import BUSY, Shop, completed_step, error, failed_attempt, scheduled
from tests.dashboard.conftest import Open, keep_breaker
from tests.dashboard.reading import parse

Page = Callable[[str], str]


def listed(html: str) -> list[str]:
    """The ids of the runs in the list, in order."""
    tables = parse(html).all("table")
    return [row[0] for row in tables[0].rows()] if tables else []


def view_of(shop: Shop, run_id: str) -> object:
    return Reader(shop.storage, shop.root, dt.UTC).view(run_id)


def test_the_list_has_the_rows_of_runs_list(shop: Shop, page: Page) -> None:
    rows = parse(page("/")).all("table")[0].rows()
    views = Reader(shop.storage, shop.root, dt.UTC).listing(Filter(), 100, None).views
    steady = [i for i, name in enumerate(LIST_COLUMNS) if name not in ("NEXT", "AGE")]
    assert [[row[i] for i in steady] for row in rows] == [[row[i] for i in steady] for row in list_rows(views)]
    assert rows[0][2] == "⟳ retrying 4/6"
    assert rows[0][5].startswith("attempt 5 in 3m 1")
    assert "4 runs: 1 retrying, 1 failed, 1 completed, 1 parked" in page("/")


FILTERS = [
    ("state=retrying", ["order-42"]),
    ("state=failed&state=completed", ["order-41", "order-39"]),
    ("state=running", ["order-42"]),  # its status, while its state is retrying
    ("state=stuck", []),
    ("workflow=checkout", ["order-42", "order-41", "order-39", "order-40"]),
    ("workflow=shop.flows:checkout&state=parked", ["order-40"]),
    ("workflow=refund", []),
    ("since=10m", ["order-42", "order-41"]),
    ("text=customer%3Dacme", ["order-41"]),
    ("text=FUNDS+insufficient", ["order-41"]),  # words, in any order and case
    ("text=charge", ["order-42", "order-41"]),
    ("text=sleeps", ["order-40"]),
    ("text=&workflow=&since=", ["order-42", "order-41", "order-39", "order-40"]),  # a form that was left empty
]


def test_filters(page: Page) -> None:
    found = [(query, listed(page(f"/?{query}"))) for query, _ in FILTERS]
    assert found == FILTERS


def test_a_run_is_found_by_its_id_among_however_many(
    empty: Shop, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        empty.run(f"run-{number:02d}", (500 - number, ev.RunActivated(epoch=0)))
    empty.run("of-run-00", (0, ev.RunActivated(epoch=0)))
    monkeypatch.setattr("pyworkflow_ray.dashboard.looks.SEARCH_S", -1.0)
    monkeypatch.setattr("pyworkflow_ray.dashboard.pages.LIMIT", 5)
    client = opened(empty)
    first = client.get("/?text=run-00").text
    assert listed(first) == ["run-00", "of-run-00"]
    further = parse(first).one("a", id="page-older").attributes["href"]
    assert listed(client.get(further).text) == []  # and once is enough
    assert listed(client.get("/?text=run-00&state=failed").text) == []


def test_a_filter_that_is_none_is_named(shop: Shop, opened: Open) -> None:
    client = opened(shop)
    huge = "before=9223372036854775808/x"  # more than the catalogue has numbers for: it is not to be made anew for that
    for query in ("state=broken", "since=yesterday", "since=inf", "before=nobody", "before=%00", huge):
        answer = client.get(f"/?{query}")
        assert answer.status_code == 400
        assert query.partition("=")[0] + "=" in parse(answer.text).one("p", role="alert").text


def test_pages_follow_one_another_without_gap_or_repeat(
    empty: Shop, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyworkflow_ray.dashboard.pages.LIMIT", 5)
    for number in range(24):
        empty.run(f"run-{number:03d}", (500 - number, ev.RunActivated(epoch=0)), workflow=f"flows:f{number % 2}")
    client = opened(empty)
    path, seen = "/?workflow=f0&state=stuck&state=running", []
    for _ in range(5):
        html = client.get(path).text
        seen += listed(html)
        older = parse(html).all("a", id="page-older")
        if not older:
            break
        path = older[0].attributes["href"]
    assert seen == [f"run-{number:03d}" for number in reversed(range(0, 24, 2))]


def test_a_search_that_takes_long_gives_up_and_can_go_on(
    empty: Shop, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(32):  # more than are looked at in one go, and in the next
        empty.run(f"run-{number:02d}", (500 - number, ev.RunActivated(epoch=0)))
    monkeypatch.setattr("pyworkflow_ray.dashboard.looks.SEARCH_S", -1.0)  # no time at all
    monkeypatch.setattr("pyworkflow_ray.dashboard.pages.LIMIT", 5)
    answer = opened(empty).get("/?text=un-00")
    assert "None of the 5 runs that were looked at, newest first." in parse(answer.text).text
    further = parse(answer.text).one("a", id="page-older")
    assert further.text == "Look further"
    monkeypatch.setattr("pyworkflow_ray.dashboard.looks.SEARCH_S", 600.0)
    assert listed(opened(empty).get("/?text=un-00").text) == ["run-00"]
    assert listed(opened(empty).get("/?text=un-2").text) == [f"run-{number}" for number in (29, 28, 27, 26, 25)]
    assert listed(opened(empty).get(further.attributes["href"]).text) == ["run-00"]


def test_a_run_answers_what_why_and_what_next(shop: Shop, page: Page) -> None:
    for run_id in ("order-39", "order-40", "order-41", "order-42"):
        verdict = parse(page(f"/runs/{run_id}")).one("section", id="region-verdict")
        lines = verdict_lines(view_of(shop, run_id))  # type: ignore[arg-type]
        words = " ".join(" ".join(lines[0]).split())
        lead = verdict.one("p", class_="lead state-" + view_of(shop, run_id).state).text  # type: ignore[attr-defined]
        assert lead[:12] == words[:12]  # and then how long ago
        assert [term.text for term in verdict.all("dt")][: len(lines) - 1] == [label for label, _ in lines[1:]]
    text = parse(page("/runs/order-42")).text
    assert "transient · ConnectionError: 503 from payments (same error 4×) shop/pay.py:31 in charge" in text
    assert "attempt 6 about" in text
    assert "then charge fails" in text


def test_steps_attempts_and_timeline_are_those_of_the_other_screens(shop: Shop, page: Page) -> None:
    html, view = page("/runs/order-42"), view_of(shop, "order-42")
    tree = parse(html)
    rows = tree.one("section", id="region-steps").rows()
    assert [row[0] for row in rows] == [row[0] for row in step_rows(view)]  # type: ignore[arg-type]
    charge = tree.one("details", id="step-2")
    assert "open" in charge.attributes  # what is going wrong is unfolded
    assert charge.rows() == attempt_rows(view.steps[1], view, dt.UTC)  # type: ignore[attr-defined, arg-type]
    assert [row[4] for row in charge.rows()] == ["30s backoff", "1m backoff", "2m backoff", "3m 26s backoff"]
    drawn = tree.one("section", id="region-timeline").all("svg")[0]
    expected = parse(timeline_svg(view, dt.UTC)).one("svg")  # type: ignore[arg-type]
    assert [r.attributes["class"] for r in drawn.all("rect")] == [r.attributes["class"] for r in expected.all("rect")]
    assert "failed, attempt 4" in drawn.text


def test_a_long_run_is_folded_and_unfolded(empty: Shop, opened: Open) -> None:
    events: list[tuple[float, ev.Event]] = [(500, ev.RunActivated(epoch=0))]
    for number in range(1, 201):
        events += [(499, scheduled(number, "work")), (499, completed_step(499, str(number)))]
    events += [(498, scheduled(201, "last", max_retries=3)), (497, failed_attempt(497, "201", 1, 900, BUSY))]
    empty.run("long", *events)
    client = opened(empty)
    folded, whole = client.get("/runs/long").text, client.get("/runs/long?all=1").text
    steps = parse(folded).one("section", id="region-steps")
    assert [row[0] for row in steps.rows()][4:7] == ["5 work(order)", "197 work(order)", "198 work(order)"]
    assert "191 steps are folded" in steps.text
    assert len(parse(whole).one("section", id="region-steps").rows()) == 201


def test_a_damaged_run_hides_no_other_and_is_named(shop: Shop, opened: Open) -> None:
    path = shop.journal_of("order-41")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    client = opened(shop)
    answer = client.get("/")
    assert (answer.status_code, listed(answer.text)) == (200, ["order-42", "order-39", "order-40"])
    damaged = parse(answer.text).one("section", class_="damaged")
    assert damaged.one("a").attributes["href"] == "/runs/order-41"
    own = client.get("/runs/order-41")
    assert own.status_code == 500
    assert str(path) in parse(own.text).one("p", role="alert").text
    assert "pyworkflow-ray storage verify" in own.text


def test_what_is_not_there_is_404(shop: Shop, opened: Open) -> None:
    client = opened(shop)
    for path in ("/runs/nobody", "/runs/%2e%2e%5cetc", "/runs/-", "/nothing", "/static/../app.py"):
        assert client.get(path).status_code == 404


def test_a_storage_that_comes_to_be_later_is_found(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyworkflow_ray.dashboard.looks._fresh_until", lambda *look: 0.0)
    client = opened(tmp_path / "later")
    assert "No runs." in parse(client.get("/").text).text
    from pyworkflow_ray.storage.lease import Lease
    from pyworkflow_ray.storage.storage import Storage

    storage = Storage.open(tmp_path / "later")
    with Lease.join(storage) as lease:
        Shop(tmp_path / "later", storage, lease).run("first", (1, ev.RunActivated(epoch=0)))
        assert listed(client.get("/").text) == ["first"]


def test_breakers_are_shown_as_the_storage_keeps_them(shop: Shop, opened: Open) -> None:
    keep_breaker(shop, "payments", (None, "closed", None, ""), ("host-7", "open", 3600.0, "5 consecutive failures"))
    keep_breaker(shop, "mail", (None, "forced_open", None, "by hand"))
    rows = parse(opened(shop).get("/breakers").text).one("table").rows()
    assert [row[:3] for row in rows] == [
        ["mail", "forced open", "by hand"],
        ["payments", "closed", ""],
        ["payments[host-7]", "open", "5 consecutive failures"],
    ]
    assert rows[2][3].startswith(("half-open in 1h", "half-open in 59m"))


def test_a_breaker_that_a_newer_version_kept_hides_no_other(shop: Shop, opened: Open) -> None:
    keep_breaker(shop, "mail", (None, "closed", None, ""))
    keep_breaker(shop, "newer", (None, "melted", None, ""))
    rows = parse(opened(shop).get("/breakers").text).one("table").rows()
    assert [row[0] for row in rows] == ["mail"]


def test_a_run_shows_the_breakers_of_its_steps(empty: Shop, opened: Open) -> None:
    keep_breaker(empty, "payments", ("host-7", "open", 60.0, "it is down"))
    keep_breaker(empty, "mail", (None, "open", 60.0, "it is down too"))
    step = scheduled(1, "charge").model_copy(update={"breaker": "payments[host-7]"})
    empty.run("waits", (5, ev.RunActivated(epoch=0)), (4, step))
    text = parse(opened(empty).get("/runs/waits").text).one("section", id="region-run-breakers").text
    assert "payments[host-7] open · it is down" in text
    assert "mail" not in text


def test_a_run_that_was_never_a_step_shows_its_own_error(empty: Shop, opened: Open) -> None:
    why = error("ZeroDivisionError", "division by zero", "permanent")
    empty.run("own", (5, ev.RunActivated(epoch=0)), (4, ev.RunFailed(error=why)), finish=True)
    tree = parse(opened(empty).get("/runs/own").text)
    assert "ZeroDivisionError: division by zero" in tree.one("details", id="run-error").text
    assert "failed in the workflow's own code" in tree.text


def test_every_page_can_be_used_by_keyboard_and_ear(shop: Shop, opened: Open) -> None:
    keep_breaker(shop, "payments", (None, "open", 60.0, "it is down"))
    client = opened(shop, read_only=False)
    for path in ("/", "/runs/order-42", "/runs/order-41", "/breakers"):
        tree = parse(client.get(path).text)
        assert tree.one("html").attributes["lang"] == "en"
        assert len(tree.all("h1")) == 1
        assert tree.all("a")[0].attributes["href"] == "#main"
        assert len(tree.all(role="status", id="news")) == 1
        for table in tree.all("table"):
            assert table.one("caption").text
            assert all(head.attributes["scope"] == "col" for head in table.all("thead")[0].all("th"))
            assert all(row.all("th", scope="row") for row in table.all("tbody")[0].all("tr"))
        labels = {label.attributes.get("for") for label in tree.all("label")}
        for field in [*tree.all("input"), *tree.all("select")]:
            kind = field.attributes.get("type")
            assert kind in ("hidden", "checkbox") or field.attributes["id"] in labels
        ids = [element.attributes["id"] for element in tree.all() if "id" in element.attributes]
        assert len(ids) == len(set(ids))
        for button in tree.all("button"):
            assert button.text
