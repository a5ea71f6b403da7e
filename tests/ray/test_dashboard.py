"""What is pressed on the dashboard's pages happens in a living cluster: to runs, and to breakers."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import flows
import pytest
import ray
from processes import until
from starlette.testclient import TestClient

import pyworkflow_ray as pw
from pyworkflow_ray.dashboard.app import Dashboard
from pyworkflow_ray.dashboard.guard import Rules
from tests.dashboard.reading import Element, parse

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("runtime")]
PATIENCE_S = 60


@pytest.fixture
def browser(runtime: Path) -> Iterator[TestClient]:
    address = ray.get_runtime_context().gcs_address
    with TestClient(Dashboard(runtime, dt.UTC, Rules(), address), base_url="http://localhost") as client:
        yield client


def press(client: TestClient, page: str, action: str, number: int = 0, **fields: str) -> Element:
    """Send a form of a page as a browser does, and follow where it leads."""
    form = parse(client.get(page).text).all("form", action=action)[number]
    hidden = {one.attributes["name"]: one.attributes["value"] for one in form.all("input", type="hidden")}
    answer = client.post(action, data={**hidden, **fields})
    assert answer.status_code == 200, answer.text
    return parse(answer.text)


def test_runs_are_cancelled_woken_and_rerun_from_their_pages(browser: TestClient, tmp_path: Path) -> None:
    late, never = tmp_path / "late", tmp_path / "never"
    cancelled, woken = pw.start(flows.flagged, str(never), True), pw.start(flows.flagged, str(late), True)
    until(lambda: (cancelled.status(), woken.status()) == ("parked", "parked"), "both are parked")
    page = f"/runs/{cancelled.run_id}"
    assert (
        "retrying retries_far, attempt 1 of 2 failed"
        in parse(browser.get(page).text).one("section", id="region-verdict").text
    )

    after = press(browser, page, f"{page}/cancel", reason="a person said so")
    assert "Asked for: its clean-up may still run" in after.text
    with pytest.raises(pw.RunCancelledError, match="a person said so"):
        cancelled.result(PATIENCE_S)
    until(lambda: parse(browser.get(page).text).all("p", class_="lead state-cancelled"), "its page says so")

    late.touch()
    page = f"/runs/{woken.run_id}"
    press(browser, page, f"{page}/wake")
    assert woken.result(PATIENCE_S) == "ok"
    new = press(browser, page, f"{page}/rerun")
    assert new.one("a", id="rerun-of").text == woken.run_id
    assert pw.get_run(new.one("span", class_="id").text).result(PATIENCE_S) == "ok"


def test_a_breaker_is_opened_closed_and_reset_from_its_page(browser: TestClient) -> None:
    breaker = pw.CircuitBreaker("dashboard's bank", failure_threshold=3)
    host = breaker.key("host-7")
    with host:
        pass
    host.force_open()

    def row(name: str) -> tuple[int, list[str]]:
        rows = parse(browser.get("/breakers").text).all("table")
        found = [(i, cells) for i, cells in enumerate(rows[0].rows() if rows else []) if cells[0].startswith(name)]
        return found[0] if found else (-1, [])

    until(lambda: row("dashboard's bank[host-7]")[1][1:2] == ["forced open"], "the cluster is reached")

    def order(what: str) -> None:  # other tests' breakers come and go: its place is looked up each time
        place = until(lambda: row("dashboard's bank[host-7]")[0] + 1, "it is in the list")
        press(browser, "/breakers", f"/breakers/{what}", place - 1)

    order("close")
    assert host.state == "forced_closed"
    order("open")
    assert host.state == "forced_open"
    assert row("dashboard's bank[host-7]")[1][1] == "forced open"
    with pytest.raises(pw.CircuitOpenError):
        with host:
            pass
    order("reset")
    assert (host.state, breaker.state) == ("closed", "closed")
