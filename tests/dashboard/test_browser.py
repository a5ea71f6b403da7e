"""The dashboard in a real Chromium: live regions, keyboard, no scripts, narrow screens, and what others wrote.

    make test-all, or: .venv/bin/python -m pytest tests/dashboard/test_browser.py

Chromium is the machine's own (`apt-get install chromium`), or the one that PYWORKFLOW_CHROMIUM names.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from pyworkflow_ray.engine import events as ev
from tests.cli.conftest import BUSY, Shop, completed_step, error, failed_attempt, payload, scheduled
from tests.dashboard.conftest import keep_breaker
from tests.dashboard.test_serving import serving

pytestmark = pytest.mark.slow
EVIL = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 400, "height": 800}
PATIENCE_MS = 60_000

OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    found = os.environ.get("PYWORKFLOW_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert found, "no Chromium here: apt-get install chromium, or name one in PYWORKFLOW_CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"], timeout=PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture
def browse(shop: Shop, chromium: Browser) -> Iterator[OpenPage]:
    """Open a page of a dashboard of the shop; at its end no script may have failed, and no policy been broken."""
    complaints: list[str] = []
    keep_breaker(shop, "payments", (None, "closed", None, ""), ("host-7", "open", 3600.0, EVIL))
    with serving(shop, "--address", "127.0.0.1:1") as (url, _):
        contexts = []

        def open_page(path: str, **options: Any) -> Page:
            context = chromium.new_context(base_url=url, **{"viewport": WIDE, **options})
            context.set_default_timeout(PATIENCE_MS)
            contexts.append(context)
            page = context.new_page()
            page.on("pageerror", lambda problem: complaints.append(str(problem)))
            page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
            page.goto(path)
            return page

        yield open_page
        for context in contexts:
            context.close()
    assert complaints == []


def go_on(shop: Shop, run_id: str, seq: int, *events: ev.Event) -> None:
    """Append to a run's log, as its owner does."""
    journal, _ = shop.storage.activate(run_id, shop.lease.id)
    now = time.time()
    first = ev.RunActivated(epoch=1, cause="wake")
    journal.append(
        [one.model_copy(update={"seq": seq + i, "at": now}) for i, one in enumerate([first, *events])]
    ).result(timeout=10)
    journal.close()


def test_a_page_follows_its_run_and_keeps_what_the_person_did(shop: Shop, browse: OpenPage) -> None:
    page = browse("/runs/order-42")
    page.wait_for_selector(".live-state.live")
    page.click("#step-1-open")  # unfold a step
    page.click("#deed-cancel-open")
    page.fill("#deed-cancel-reason", "half a reas")
    page.focus("#step-link-2")
    go_on(shop, "order-42", 9, completed_step(0, "2"), ev.RunCompleted(result=payload("paid")))
    page.wait_for_selector(".lead.state-completed")
    assert page.inner_text("#news") == "order-42: completed"
    assert page.title().startswith("✓ order-42")
    assert page.evaluate("document.activeElement.id") == "step-link-2"
    assert page.evaluate("document.getElementById('step-1').open")
    assert page.locator("#deed-cancel").count() == 0  # it has ended: there is nothing to cancel


def test_what_is_typed_survives_news(shop: Shop, browse: OpenPage) -> None:
    page = browse("/runs/order-42")
    page.click("#deed-cancel-open")
    page.fill("#deed-cancel-reason", "half a reas")
    go_on(shop, "order-42", 9, failed_attempt(0, "2", 5, 900, BUSY))
    page.wait_for_selector("#attempt-2-5-5")
    page.wait_for_selector(".reach:has-text('none is reached')")  # the part of the page that it is typed in has changed
    assert page.input_value("#deed-cancel-reason") == "half a reas"
    assert page.evaluate("document.activeElement.id") == "deed-cancel-reason"


def test_a_new_run_comes_into_the_list_and_the_focus_stays(shop: Shop, browse: OpenPage) -> None:
    page = browse("/")
    page.wait_for_selector(".live-state.live")
    page.focus("#link-order-41")
    shop.run("order-43", (0, ev.RunActivated(epoch=0)))
    page.wait_for_selector("#run-order-43")
    assert [row.get_attribute("id") for row in page.query_selector_all("tbody tr")] == [
        f"run-order-{number}" for number in (43, 42, 41, 39, 40)
    ]
    assert page.evaluate("document.activeElement.id") == "link-order-41"
    assert page.inner_text("#news").startswith("5 runs: ")


def test_filters_pages_and_links_work_by_keyboard_alone(browse: OpenPage) -> None:
    page = browse("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.keyboard.press("Enter")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.value") == "failed":
            break
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    page.wait_for_url("**state=failed**")
    assert page.locator("tbody tr").count() == 1
    page.focus("#link-order-41")
    page.keyboard.press("Enter")
    page.wait_for_url("**/runs/order-41")
    page.focus("#step-link-1")
    page.keyboard.press("Enter")
    assert page.evaluate("document.getElementById('step-1').open")


def test_without_scripts_all_is_there_and_works(browse: OpenPage) -> None:
    page = browse("/", java_script_enabled=False)
    page.check("input[value=retrying]")
    page.click("text=Show")
    page.click("#link-order-42")
    assert "attempt 5" in page.inner_text("dd.next")
    assert page.is_visible("noscript")
    page.click("#deed-cancel-open")
    page.fill("#deed-cancel-reason", "why not")
    assert page.is_visible("#deed-cancel-do")
    page.click("text=Breakers")
    assert page.locator("tbody tr").count() == 2


def test_what_others_wrote_is_shown_and_never_run(shop: Shop, browse: OpenPage) -> None:
    what = error(EVIL, EVIL, "transient").model_copy(update={"traceback": EVIL})
    shop.run(
        "evil", (50, ev.RunActivated(epoch=0)), (49, scheduled(1, EVIL, max_retries=3)),
        (48, failed_attempt(48, "1", 1, 900, what)), attributes={EVIL: EVIL},
    )  # fmt: skip
    for path in ("/", "/runs/evil", "/breakers"):
        page = browse(path)
        page.wait_for_selector(".live-state.live")
        page.wait_for_timeout(1500)  # and what comes later is drawn by our script
        assert "document.title='taken'" in page.inner_text("main")
        assert "taken" not in page.title()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_nothing_sticks_out_and_everything_can_be_read(
    shop: Shop, browse: OpenPage, viewport: dict[str, int], scheme: str
) -> None:
    shop.run("a-run-with-a-long-name." + "x" * 100, (5, ev.RunActivated(epoch=0)))
    for path in ("/", "/runs/order-42", "/runs/order-41", "/breakers", "/runs/a-run-with-a-long-name." + "x" * 100):
        page = browse(path, viewport=viewport, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], path
        assert page.evaluate(WEAK) == [], path


# Text whose contrast with the colour behind it is below 4.5 : 1 (WCAG 2.2, AA).
WEAK = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = colour => {
    const [r, g, b] = rgb(colour).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (rgb(colour).length === 3 || rgb(colour)[3] > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const weak = [];
  for (const element of document.querySelectorAll("main *, header *, footer *")) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.nodeValue.trim());
    if (!own || !element.checkVisibility() || element.closest("svg, option")) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) weak.push(element.textContent.trim().slice(0, 40) + " " + contrast.toFixed(2));
  }
  return weak;
}"""


def test_a_page_that_nobody_looks_at_gives_its_connection_back(browse: OpenPage) -> None:
    page = browse("/")
    page.wait_for_selector(".live-state.live")
    hide = "value => { Object.defineProperty(document, 'hidden', {value, configurable: true});" \
        " document.dispatchEvent(new Event('visibilitychange')); }"  # fmt: skip
    page.evaluate(hide, True)
    assert page.inner_text("#live-state") == ""
    page.evaluate(hide, False)
    page.wait_for_selector(".live-state.live")


def test_another_site_can_do_nothing_though_the_browser_has_our_cookie(shop: Shop, browse: OpenPage) -> None:
    page = browse("/runs/order-42")
    csrf = page.locator("input[name=csrf]").first.get_attribute("value")
    target = page.url + "/cancel"
    other = page.context.new_page()
    other.goto("data:text/html,<form method=post><input name=csrf><input name=once value=1></form>")
    other.evaluate(
        "([target, csrf]) => { const form = document.forms[0]; form.action = target; form.csrf.value = csrf; }",
        [target, csrf],
    )
    with other.expect_navigation() as navigation:
        other.evaluate("document.forms[0].submit()")
    assert navigation.value is not None
    assert navigation.value.status == 403  # though it even knew the token
    assert "nothing was done" in other.inner_text("main").lower()


def test_a_button_pressed_in_a_browser_reaches_its_deed(browse: OpenPage) -> None:
    page = browse("/").context.new_page()  # another one: an answer that refuses is no complaint here
    page.goto("/runs/order-42")
    with page.expect_navigation() as navigation:
        page.click("#deed-pause-do")
    assert navigation.value is not None
    assert navigation.value.status == 503  # let in, and there is no Ray here
    assert "this needs Ray" in page.inner_text("main")


def test_a_browser_can_log_in(shop: Shop, chromium: Browser) -> None:
    with serving(shop, "--token", "a-token-that-is-long", "--read-only") as (url, _):
        page = chromium.new_page(base_url=url)
        page.goto("/runs/order-42")
        page.fill("#token", "a-token-that-is-long")
        page.keyboard.press("Enter")
        page.wait_for_selector("#region-verdict")
        page.close()


def test_a_breaker_that_comes_leaves_every_button_with_its_own_row(shop: Shop, browse: OpenPage) -> None:
    page = browse("/breakers")
    page.wait_for_selector(".live-state.live")
    keep_breaker(shop, "fraud", (None, "open", 60.0, "busy"))
    page.wait_for_selector("th:has-text('fraud')")
    rows = page.locator("tbody tr")
    for at, name in enumerate(("fraud", "payments", "payments[host-7]")):
        row = rows.nth(at)
        assert row.locator("th").inner_text().split("\n")[0].startswith(name)
        assert {one.input_value() for one in row.locator("input[name=name]").all()} == {name}
