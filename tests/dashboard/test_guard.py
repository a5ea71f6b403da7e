"""Who is let in: host names, tokens, sessions, forms of ours and of others; and what no page may carry."""

from __future__ import annotations

import datetime as dt
import re
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from pyworkflow_ray.dashboard.guard import HEADERS, MAX_BODY_BYTES, Rules, inside
from pyworkflow_ray.dashboard.parts import Parts
from pyworkflow_ray.dashboard.server import rules_for
from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.errors import ConfigurationError
from tests.cli.conftest import Shop, error, failed_attempt, payload, scheduled
from tests.dashboard.conftest import Open, keep_breaker
from tests.dashboard.reading import Element, parse

TOKEN = "a-token-of-24-characters"
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'`&amp;</textarea><!--"


def csrf_of(html: str) -> str:
    return parse(html).all("input", name="csrf")[0].attributes["value"]


# What others wrote ------------------------------------------------------------------------------------------------


def assert_harmless(html: str) -> Element:
    tree = parse(html)
    assert [script.attributes["src"] for script in tree.all("script")] == ["/static/live.js"]
    assert not tree.all("img")
    assert not tree.all("textarea")
    for element in tree.all():
        assert not any(name.startswith("on") or name == "style" for name in element.attributes), element
        assert not element.attributes.get("href", "").lower().startswith(("javascript:", "data:"))
    return tree


def test_nothing_that_others_wrote_becomes_markup(empty: Shop, opened: Open) -> None:
    what = error(EVIL, EVIL, "transient").model_copy(update={"traceback": EVIL})
    step = scheduled(1, EVIL, max_retries=3).model_copy(update={"breaker": EVIL, "args": [payload(EVIL)]})
    failed = failed_attempt(48, "1", 1, 900, what).model_copy(update={"delay_reason": EVIL, "breaker": EVIL})
    given = {"attributes": {EVIL: EVIL}, "workflow": EVIL, "version": EVIL, "kwargs": {EVIL: payload(EVIL)}}
    empty.run("tries", (50, ev.RunActivated(epoch=0)), (49, step), (48, failed), **given)
    empty.run("ended", (50, ev.RunActivated(epoch=0)), (48, ev.RunFailed(error=what)), finish=True, **given)
    empty.run("stops", (50, ev.RunActivated(epoch=0)), (48, ev.RunCancelled(reason=EVIL)), finish=True, **given)
    keep_breaker(empty, EVIL, (EVIL, "open", 60.0, EVIL))
    client = opened(empty, read_only=False)
    for path in ("/", "/runs/tries", "/runs/ended", "/runs/stops", "/breakers"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "alert(1)" in assert_harmless(answer.text).text, path
    for name in ("text", "workflow", "since", "state", "before", "told", EVIL):
        assert_harmless(client.get("/", params={name: EVIL}).text)
    for path in (
        f"/runs/{quote(EVIL, safe='')}",
        f"/{quote(EVIL)}",
        f"/runs/tries?told={quote(EVIL)}&all={quote(EVIL)}",
    ):
        assert_harmless(client.get(path).text)


def test_half_a_character_is_shown_as_a_question_mark() -> None:
    parts = Parts("here", dt.UTC, "1")
    answer = parts.page("message.html", title="Refused", texts=["half \ud83d of it"], commands=[], back="/")
    assert b"half ? of it" in answer.body


def test_every_answer_forbids_foreign_and_inline_code(shop: Shop, opened: Open) -> None:
    client = opened(shop)
    for path in ("/", "/runs/order-42", "/runs/nobody", "/breakers", "/static/live.js", "/static/dashboard.css"):
        answer = client.get(path)
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    policy = HEADERS["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert client.get("/").headers["cache-control"] == "no-store"


def test_pages_load_nothing_from_elsewhere(shop: Shop, opened: Open) -> None:
    client = opened(shop)
    for path in ("/", "/runs/order-42", "/breakers", "/static/live.js", "/static/dashboard.css", "/static/icon.svg"):
        found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", client.get(path).text)
        assert [one for one in found if "www.w3.org" not in one] == [], path


# Host names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "local", "beyond"),
    [
        ("localhost:8237", True, True),
        ("LOCALHOST.", True, True),
        ("127.0.0.1", True, True),
        ("127.8.9.1:80", True, True),
        ("[::1]:8237", True, True),
        ("box.example", True, True),  # allowed by name
        ("10.1.2.3:8237", False, True),  # an address can't be made to lead elsewhere
        ("[2001:db8::1]", False, True),
        ("evil.example", False, False),
        ("localhost.evil.example", False, False),
        ("evil.example@localhost", False, False),
        ("localhost/evil", False, False),
        ("localhost:port", False, False),
        ("", False, False),
        ("[::1", False, False),
    ],
)
def test_names_that_the_dashboard_answers_to(host: str, local: bool, beyond: bool) -> None:
    assert rules_for("127.0.0.1", 8237, None, ["Box.example"])[0].takes_host(host) is local
    assert rules_for("0.0.0.0", 8237, None, ["box.example."])[0].takes_host(host) is beyond


def test_a_name_that_was_made_to_lead_here_sees_and_does_nothing(shop: Shop, opened: Open) -> None:
    client = opened(shop, base_url="http://evil.example", read_only=False)
    for answer in (client.get("/"), client.get("/static/live.js"), client.post("/runs/order-42/cancel")):
        assert answer.status_code == 421
        assert "order-42" not in answer.text
        assert "set-cookie" not in answer.headers


def with_cookie(client: TestClient, value: str) -> TestClient:
    client.cookies.clear()
    client.headers["cookie"] = f"pyworkflow_ray={value}"
    return client


# Forms ------------------------------------------------------------------------------------------------------------


def test_a_form_must_be_ours(shop: Shop, opened: Open) -> None:
    client = opened(shop, read_only=False)
    csrf = csrf_of(client.get("/runs/order-42").text)
    other = opened(shop, read_only=False)
    theirs = csrf_of(other.get("/runs/order-42").text)
    path = "/runs/order-42/cancel"

    def code(headers: dict[str, str] | None = None, **form: str) -> int:
        return client.post(path, data=form, headers=headers).status_code

    assert code(csrf="") == 403
    assert code(csrf=theirs) == 403  # of another session
    assert code(csrf=csrf, headers={"sec-fetch-site": "cross-site"}) == 403
    assert code(csrf=csrf, headers={"sec-fetch-site": "same-site"}) == 403
    assert code(csrf=csrf, headers={"origin": "http://evil.example"}) == 403
    assert code(csrf=csrf, headers={"origin": "null"}) == 403
    assert client.get(path).headers["referrer-policy"] != "no-referrer"  # or browsers say "null" of our own forms
    assert code(csrf=csrf, headers={"origin": "http://["}) == 403
    assert client.post(path, content=f"csrf={csrf}", headers={"content-type": "text/plain"}).status_code == 415
    assert client.post(path, json={"csrf": csrf}).status_code == 415
    assert code(csrf=csrf, reason="x" * MAX_BODY_BYTES) == 413
    assert client.get(path).status_code == 405  # nothing is done by following a link
    assert client.request("DELETE", "/runs/order-42").status_code == 405
    good = {"origin": "http://localhost", "sec-fetch-site": "same-origin"}
    assert client.post("/runs/order-42/nothing", data={"csrf": csrf}, headers=good).status_code == 404  # let in
    assert with_cookie(client, "forged.1.00").post(path, data={"csrf": csrf}).status_code == 403


def test_a_dashboard_that_only_shows_does_nothing_and_offers_nothing(shop: Shop, opened: Open) -> None:
    client = opened(shop, token=TOKEN)
    client.get("/", params={"token": TOKEN})
    html = client.get("/runs/order-42").text
    assert not parse(html).all("form")
    csrf = csrf_of(opened(shop, token="another token, and long").get("/").text)  # a login form has one
    assert client.post("/runs/order-42/cancel", data={"csrf": csrf}).status_code == 403


# The token --------------------------------------------------------------------------------------------------------


def test_beyond_loopback_a_token_is_demanded_and_made_where_none_is_given() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert rules_for(host, 1, None)[0].token is None
    for host in ("0.0.0.0", "::", "10.0.0.1", "box.example"):
        rules, made = rules_for(host, 1, None)
        assert made
        assert rules.token is not None
        assert len(rules.token) >= 32
        assert rules_for(host, 1, TOKEN)[0].token == TOKEN
    assert rules_for("127.0.0.1", 1, TOKEN)[0].token == TOKEN
    with pytest.raises(ConfigurationError, match="8 characters: give 16 or more"):
        rules_for("0.0.0.0", 1, "password")


@pytest.fixture
def locked(shop: Shop, opened: Open, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setattr("pyworkflow_ray.dashboard.guard.WRONG_TOKEN_S", 0.0)
    return opened(shop, token=TOKEN)


def test_without_the_token_nothing_is_shown(locked: TestClient, shop: Shop) -> None:
    for path in ("/", "/runs/order-42", "/runs/nobody", "/runs/order-42/live", "/live", "/breakers"):
        answer = locked.get(path)
        assert answer.status_code == 401
        assert str(shop.root) not in answer.text
        assert "order" not in re.sub(r'name="to" value="[^"]*"', "", answer.text), path
    assert str(shop.root) not in locked.post("/runs/order-42/cancel", data={}).text
    assert locked.get("/static/live.js").status_code == 200


def test_the_login_form_lets_in_and_leads_on(locked: TestClient) -> None:
    first = locked.get("/runs/order-42?all=1")
    form = {"csrf": csrf_of(first.text), "to": parse(first.text).one("input", name="to").attributes["value"]}
    wrong = locked.post("/login", data={**form, "token": "a-token-of-24-charactersX"})
    assert wrong.status_code == 401
    assert "not the token" in wrong.text
    before = locked.cookies["pyworkflow_ray"]
    right = locked.post("/login", data={**form, "token": TOKEN})
    assert (right.status_code, right.headers["location"]) == (303, "/runs/order-42?all=1")
    assert locked.cookies["pyworkflow_ray"] != before  # a session that somebody planted is not let in
    flags = right.headers["set-cookie"]
    assert "HttpOnly" in flags
    assert "SameSite=Lax" in flags
    assert locked.get("/runs/order-42").status_code == 200


def test_a_link_with_the_token_lets_in_once_and_the_token_is_gone_from_the_address(locked: TestClient) -> None:
    assert locked.get("/?token=wrong").status_code == 401
    answer = locked.get(f"/?state=failed&token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/?state=failed")
    assert locked.get("/").status_code == 200


def test_a_cookie_can_t_be_made_up(locked: TestClient, shop: Shop, opened: Open) -> None:
    locked.get("/")
    session_id, mark, signature = locked.cookies["pyworkflow_ray"].split(".")
    assert mark == "0"
    for forged in (f"{session_id}.1.{signature}", f"{session_id}.1.", "..", "x", f"{session_id}.1.{'0' * 64}"):
        assert with_cookie(locked, forged).get("/").status_code == 401
    elsewhere = opened(shop, token=TOKEN)  # another process has another secret
    elsewhere.get("/", params={"token": TOKEN})
    taken = elsewhere.cookies["pyworkflow_ray"]
    assert elsewhere.get("/").status_code == 200
    assert with_cookie(opened(shop, token=TOKEN), taken).get("/").status_code == 401
    assert with_cookie(opened(shop, token=TOKEN, secret=b"known"), taken).get("/").status_code == 401


@pytest.mark.parametrize(
    "to", ["//evil.example", "/\\evil.example", "https://evil.example", "", "evil", "/\t/evil", "/login?to=/login"]
)
def test_a_login_leads_nowhere_else(to: str) -> None:
    assert inside(to) == "/"


def test_rules_show_no_secret() -> None:
    assert "secret" not in repr(Rules())
