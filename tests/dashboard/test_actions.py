"""What is done from pages: which deeds a run is offered, how often a form counts, what is said without Ray."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import pyworkflow_ray as pw
from pyworkflow_ray.dashboard import hands
from pyworkflow_ray.dashboard.cluster import Away, Cluster
from pyworkflow_ray.dashboard.deeds import DEEDS, STEERS, offered
from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.errors import PyWorkflowError
from pyworkflow_ray.reading import Reader
from tests.cli.conftest import BUSY, DECLINED, Shop, completed_step, failed_attempt, scheduled
from tests.dashboard.conftest import Open, keep_breaker
from tests.dashboard.reading import parse


class Recorded:
    """In the place of the way to Ray: what was to be done, and an answer for it."""

    def __init__(self, client: TestClient) -> None:
        self.done: list[tuple[str, dict[str, Any]]] = []
        self.answer: str | Exception = "order-42"
        cluster = client.app.cluster  # type: ignore[attr-defined]
        cluster.call, cluster.look = self.call, lambda: None

    async def call(self, what: str, given: Mapping[str, Any], timeout_s: float = 1.0) -> Any:
        self.done.append((what, dict(given)))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def acting(shop: Shop, opened: Open, monkeypatch: pytest.MonkeyPatch) -> tuple[TestClient, Recorded]:
    monkeypatch.setattr("pyworkflow_ray.dashboard.actions.SEEN_S", 0.0)
    client = opened(shop, read_only=False)
    return client, Recorded(client)


def form_of(client: TestClient, page: str, action: str) -> dict[str, str]:
    """The hidden fields of a form of a page, as a browser sends them."""
    form = parse(client.get(page).text).all("form", action=action)[0]
    return {one.attributes["name"]: one.attributes["value"] for one in form.all("input", type="hidden")}


def offers(shop: Shop, run_id: str) -> list[str]:
    return [deed.name for deed in offered(Reader(shop.storage, shop.root, None).view(run_id))]  # type: ignore[arg-type]


def test_a_run_is_offered_what_makes_sense(shop: Shop) -> None:
    start = ev.RunActivated(epoch=0)
    undo = scheduled(2, "refund").model_copy(update={"compensates": True})
    shop.run("paused", (9, start), (8, ev.RunPaused(reason="user", message="wait")))
    shop.run(
        "undone", (9, start), (8, scheduled(1, "charge")), (7, completed_step(7, "1")), (6, undo),
        (5, completed_step(5, "2")), (4, ev.RunFailed(error=DECLINED)), finish=True,
    )  # fmt: skip
    shop.run("lost", (9, start), (8, scheduled(1, "charge", max_retries=3)), (7, failed_attempt(7, "1", 1, 90, BUSY)),
             lease="0" * 32)  # fmt: skip
    assert offers(shop, "order-39") == ["rerun"]
    assert offers(shop, "order-40") == ["pause", "rerun", "cancel"]
    assert offers(shop, "order-41") == ["resume", "rerun"]
    assert offers(shop, "order-42") == ["wake", "pause", "rerun", "cancel"]
    assert offers(shop, "paused") == ["resume", "rerun", "cancel"]
    assert offers(shop, "undone") == ["rerun"]  # what it did is undone: there is nothing to go on from
    assert offers(shop, "lost")[-2:] == ["rerun", "cancel"]


def test_a_deed_is_done_and_the_page_says_so(acting: tuple[TestClient, Recorded]) -> None:
    client, recorded = acting
    form = form_of(client, "/runs/order-42", "/runs/order-42/cancel")
    answer = client.post("/runs/order-42/cancel", data={**form, "reason": "  a person said so  "})
    assert recorded.done == [("cancel", {"run_id": "order-42", "reason": "a person said so"})]
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs/order-42?told=cancel")
    assert DEEDS["cancel"].told in parse(client.get(answer.headers["location"]).text).text


def test_a_deed_that_was_done_is_not_called_refused_because_its_run_can_t_be_read(
    acting: tuple[TestClient, Recorded], shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = acting
    monkeypatch.setattr("pyworkflow_ray.dashboard.actions.SEEN_S", 5.0)
    form = form_of(client, "/runs/order-42", "/runs/order-42/wake")

    async def wake(what: str, given: Mapping[str, Any], timeout_s: float = 1.0) -> str:
        for file in Path(shop.storage.place("order-42").directory).iterdir():
            file.write_bytes(b"damaged" + file.read_bytes())
        return "order-42"

    client.app.cluster.call = wake  # type: ignore[attr-defined]
    assert client.post("/runs/order-42/wake", data=form).status_code == 303


def test_a_form_counts_once_however_often_it_is_sent(acting: tuple[TestClient, Recorded]) -> None:
    client, recorded = acting
    recorded.answer = "new-run"
    form = form_of(client, "/runs/order-41", "/runs/order-41/rerun")
    first, second = (client.post("/runs/order-41/rerun", data=form) for _ in range(2))
    assert first.headers["location"] == second.headers["location"] == "/runs/new-run?told=rerun"
    assert len(recorded.done) == 1
    again = client.post("/runs/order-41/rerun", data=form_of(client, "/runs/order-41", "/runs/order-41/rerun"))
    assert (again.status_code, len(recorded.done)) == (303, 2)  # the page anew is another form


def test_a_refusal_is_said_and_the_form_may_be_sent_again(acting: tuple[TestClient, Recorded]) -> None:
    client, recorded = acting
    recorded.answer = PyWorkflowError("another Ray, which lives, owns <it>")
    form = form_of(client, "/runs/order-42", "/runs/order-42/wake")
    answer = client.post("/runs/order-42/wake", data=form)
    assert answer.status_code == 409
    assert parse(answer.text).one("p", role="alert").text == "Refused: another Ray, which lives, owns <it>"
    recorded.answer = Away("it has gone")
    answer = client.post("/runs/order-42/wake", data=form)
    assert (answer.status_code, "Nothing was done" in answer.text) == (503, True)
    recorded.answer = Away("it has gone", asked=True)
    answer = client.post("/runs/order-42/wake", data=form)
    assert (answer.status_code, "not known whether it was done" in answer.text) == (503, True)
    recorded.answer = "order-42"
    assert client.post("/runs/order-42/wake", data=form).status_code == 303


def test_a_breaker_is_steered_by_its_whole_name(acting: tuple[TestClient, Recorded], shop: Shop) -> None:
    client, recorded = acting
    keep_breaker(shop, "payments", (None, "closed", None, ""), ("host-7", "open", 60.0, "down"))
    tree = parse(client.get("/breakers").text)
    for number, how in ((0, "open"), (1, "close"), (1, "reset")):
        form = tree.all("form", action=f"/breakers/{how}")[number]
        fields = {one.attributes["name"]: one.attributes["value"] for one in form.all("input")}
        answer = client.post(f"/breakers/{how}", data=fields)
        assert STEERS[how].told in parse(client.get(answer.headers["location"]).text).text
    names = [given["name"] for _, given in recorded.done]
    assert names == ["payments", "payments[host-7]", "payments[host-7]"]
    assert client.post("/breakers/burn", data=fields).status_code == 404
    assert client.post("/breakers/open", data={**fields, "name": ""}).status_code == 404


def test_an_unknown_run_or_deed_reaches_no_ray(acting: tuple[TestClient, Recorded]) -> None:
    client, recorded = acting
    form = form_of(client, "/runs/order-42", "/runs/order-42/wake")
    assert client.post("/runs/nobody/wake", data=form).status_code == 404
    assert client.post("/runs/order-42/steer", data=form).status_code == 404
    assert recorded.done == []


def test_without_ray_pages_show_all_and_say_what_is_missing(shop: Shop, opened: Open) -> None:
    client = opened(shop, read_only=False)
    assert "which is being looked for" in parse(client.get("/runs/order-42").text).one("section", id="region-acts").text
    form = form_of(client, "/runs/order-42", "/runs/order-42/cancel")
    answer = client.post("/runs/order-42/cancel", data=form)
    assert answer.status_code == 503
    said = parse(answer.text).one("p", role="alert").text
    assert said.startswith("Nothing was done: this needs Ray. address='127.0.0.1:1': no Ray cluster answers there")
    for path in ("/runs/order-42", "/breakers"):
        text = parse(client.get(path).text).text
        assert "Actions need Ray, and none is reached: address='127.0.0.1:1'" in text
    assert "retrying" in text or "order-42" in client.get("/").text


# The other end ----------------------------------------------------------------------------------------------------


def test_hands_know_every_deed_and_no_other() -> None:
    assert {*DEEDS, "steer", "list_breakers"} == hands.DEEDS
    assert all(callable(getattr(hands.Hands, name)) for name in hands.DEEDS)
    with pytest.raises(ValueError, match="no deed is called '_run'"):
        hands.serve(hands.Hands("nowhere"), StringIO('{"id": 1, "do": "_run", "with": {}}\n'), StringIO())


def test_hands_tell_what_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one, answers = hands.Hands("nowhere"), StringIO()

    def refuse(run_id: str) -> str:
        raise pw.RunNotFoundError(f"no run {run_id!r}", run_id=run_id)

    monkeypatch.setattr(one, "wake", refuse)
    monkeypatch.setattr(one, "pause", lambda run_id: run_id)
    orders = [{"id": 1, "do": "wake", "with": {"run_id": "x"}}, {"id": 2, "do": "pause", "with": {"run_id": "y"}}]
    hands.serve(one, StringIO("".join(json.dumps(order) + "\n" for order in orders)), answers)
    give_up_at = time.monotonic() + 30
    while answers.getvalue().count("\n") < 2 and time.monotonic() < give_up_at:
        os.sched_yield()
    told = {line["id"]: line for line in map(json.loads, answers.getvalue().splitlines())}
    assert told == {1: {"id": 1, "refused": "no run 'x'"}, 2: {"id": 2, "done": "y"}}


async def test_a_child_that_is_lost_is_told_of_and_another_is_made(tmp_path: Path) -> None:
    """The real pipes and processes; in the place of Ray a script that answers, or dies, as it is told."""
    script = tmp_path / "hands.py"
    script.write_text(
        "import json, os, sys\n"
        "print(json.dumps({'ready': json.loads(sys.stdin.readline())['storage']}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    order = json.loads(line)\n"
        "    if order['do'] == 'die': os._exit(1)\n"
        "    if order['do'] != 'hang': print(json.dumps({'id': order['id'], 'done': os.getpid()}), flush=True)\n"
    )
    cluster = Cluster("here", None, command=(sys.executable, str(script)))
    try:
        first = await cluster.call("pause", {})
        assert cluster.reach.state == "connected"
        assert await cluster.call("pause", {}) == first
        with pytest.raises(Away, match="was lost") as lost:
            await cluster.call("die", {})
        assert lost.value.asked
        assert (cluster.reach.state, cluster.reach.why) == ("away", "the connection to it was lost")
        second = await cluster.call("pause", {})
        assert second != first
        with pytest.raises(Away, match="did not answer within 0 s"):
            await cluster.call("hang", {}, 0.1)
        assert await cluster.call("pause", {}) not in (first, second)
    finally:
        await cluster.close()
    with pytest.raises(Away):
        await cluster.call("pause", {})
