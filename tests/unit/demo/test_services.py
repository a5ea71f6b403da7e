"""The demo's services over real HTTP, asked by the demo's own client and by a bare one."""

from __future__ import annotations

import http.client
import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.demo.client import CardDeclined, ServicesClient
from pyworkflow_ray.demo.faults import PATIENCE, Fault, fault
from pyworkflow_ray.demo.ledger import Ledger
from pyworkflow_ray.demo.services import RETRY_AFTER_S, SLOW_S, STUCK_S, Services
from pyworkflow_ray.errors import FatalError, RetryableError

Start = Callable[..., str]
SEED = 5


class Shop:
    """A running server: its address, its ledger file, and the pauses it would have made."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "ledger.db"
        self.pauses: list[float] = []
        self._ledger = Ledger(self.file)
        self._servers: list[Services] = []
        self.client = ServicesClient(timeout_s=10)

    def start(self, *, faulty: bool = True) -> str:
        server = Services(self._ledger, seed=SEED, faulty=faulty, pause=self.pauses.append)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self._servers.append(server)
        return f"127.0.0.1:{server.port}"

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        db = sqlite3.connect(self.file)
        try:
            return db.execute(query).fetchall()
        finally:
            db.close()

    def close(self) -> None:
        self.client.close()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._ledger.close()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    yield shop
    shop.close()


def order_meeting(kind: Fault, service: str = "payments") -> str:
    return next(f"B{n}" for n in range(10_000) if fault(SEED, service, f"B{n}", 1) is kind)


def charge(order_id: str, amount: str = "19.90", card: str = "tok_1") -> dict[str, str]:
    return {"order_id": order_id, "amount": amount, "currency": "EUR", "card": card}


def test_a_repeated_key_is_answered_alike_and_charges_once(shop: Shop) -> None:
    address = shop.start(faulty=False)
    answers = [shop.client.post(address, "/payments/charges", charge("A1"), key="k1") for _ in range(3)]
    assert [answer["replayed"] for answer in answers] == [False, True, True]
    assert len({answer["charge"] for answer in answers}) == 1
    assert shop.rows("select key, order_id, amount from charges") == [("k1", "A1", 19.9)]
    assert [row[:2] for row in shop.rows("select * from requests")] == [("k1", "A1")] * 3


def test_without_a_key_each_request_charges(shop: Shop) -> None:
    connection = http.client.HTTPConnection(shop.start(faulty=False))
    for _ in range(2):
        connection.request("POST", "/payments/charges", json.dumps(charge("A1")))
        response = connection.getresponse()
        response.read()
        assert response.status == 200
    connection.close()
    assert shop.rows("select count(*), count(distinct key) from charges") == [(2, 2)]


def test_eight_clients_with_one_key_charge_once(shop: Shop) -> None:
    address = shop.start(faulty=False)
    answers: list[bool] = []

    def ask() -> None:
        client = ServicesClient(timeout_s=10)
        answers.append(client.post(address, "/payments/charges", charge("A1"), key="k1")["replayed"])
        client.close()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False] + [True] * 7
    assert shop.rows("select count(*) from charges") == [(1,)]


def test_unavailable_is_a_connection_error_and_charges_nothing(shop: Shop) -> None:
    with pytest.raises(ConnectionError, match="503 from /payments/charges: payments is unavailable"):
        shop.client.post(shop.start(), "/payments/charges", charge(order_meeting(Fault.UNAVAILABLE)), key="k1")
    assert shop.rows("select count(*) from charges") == [(0,)]
    assert shop.rows("select count(*) from requests") == [(1,)]


def test_throttling_says_when_to_come_back(shop: Shop) -> None:
    with pytest.raises(RetryableError) as caught:
        shop.client.post(shop.start(), "/payments/charges", charge(order_meeting(Fault.THROTTLED)), key="k1")
    assert caught.value.retry_after == RETRY_AFTER_S


@pytest.mark.parametrize(("kind", "charges"), [(Fault.DROPPED, 0), (Fault.DROPPED_AFTER, 1)])
def test_a_dropped_connection_is_an_error_whether_charged_or_not(shop: Shop, kind: Fault, charges: int) -> None:
    address, order = shop.start(), order_meeting(kind)
    with pytest.raises(ConnectionError):
        shop.client.post(address, "/payments/charges", charge(order), key="k1")
    assert shop.rows("select count(*) from charges") == [(charges,)]


def test_asking_until_answered_charges_once(shop: Shop) -> None:
    address, order = shop.start(), order_meeting(Fault.DROPPED_AFTER)
    for _ in range(PATIENCE + 1):
        try:
            shop.client.post(address, "/payments/charges", charge(order), key="k1")
            break
        except (ConnectionError, RetryableError):
            continue
    else:
        pytest.fail("never answered")
    assert shop.rows("select order_id, count(*) from charges group by 1") == [(order, 1)]
    assert shop.rows("select count(*) > 1 from requests") == [(1,)]


@pytest.mark.parametrize(("kind", "pause"), [(Fault.SLOW, SLOW_S), (Fault.STUCK, STUCK_S)])
def test_a_late_answer_is_right_all_the_same(shop: Shop, kind: Fault, pause: float) -> None:
    answer = shop.client.post(shop.start(), "/payments/charges", charge(order_meeting(kind)), key="k1")
    assert answer["amount"] == "19.90"
    assert shop.pauses == [pause]


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (charge("A1", card="tok_declined"), CardDeclined, "402 .* insufficient funds"),
        (charge("A1", amount="-1"), FatalError, "400 .* not above zero"),
        (charge("A1", amount="NaN"), FatalError, "400 .* not above zero"),
        (charge("A1", amount="ten"), FatalError, "400"),
        ({"order_id": "A1"}, FatalError, "400 .* KeyError: 'amount'"),
        ({}, FatalError, "400 .* an order_id is needed"),
    ],
)
def test_what_makes_no_sense_is_refused_for_good(
    shop: Shop, body: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        shop.client.post(shop.start(faulty=False), "/payments/charges", body, key="k1")
    assert shop.rows("select count(*) from charges") == [(0,)]


def test_a_key_with_another_order_is_refused(shop: Shop) -> None:
    address = shop.start(faulty=False)
    shop.client.post(address, "/payments/charges", charge("A1"), key="k1")
    with pytest.raises(FatalError, match="409"):
        shop.client.post(address, "/payments/charges", charge("A2"), key="k1")


def test_stock_and_receipts_are_kept_once_a_key(shop: Shop) -> None:
    address = shop.start(faulty=False)
    goods = {"order_id": "A1", "sku": "mug-blue", "quantity": 2}
    for _ in range(2):
        assert shop.client.post(address, "/stock/primary/reservations", goods, key="k2")["source"] == "primary"
        shop.client.post(address, "/receipts", {"order_id": "A1", "email": "a@b.c"}, key="k3")
    assert shop.client.post(address, "/stock/fallback/reservations", goods, key="k4")["source"] == "fallback"
    assert shop.rows("select order_id, source from reservations") == [("A1", "primary"), ("A1", "fallback")]
    assert shop.rows("select * from receipts") == [("k3", "A1", "a@b.c")]
    assert shop.rows("select count(*) from requests") == [(0,)], "requests are those of the payment service"


def test_an_unknown_path_is_404(shop: Shop) -> None:
    with pytest.raises(FatalError, match="404"):
        shop.client.post(shop.start(), "/refunds", {"order_id": "A1"}, key="k1")


def test_no_server_is_a_connection_error_and_the_client_recovers(shop: Shop) -> None:
    with pytest.raises(ConnectionError):
        shop.client.post("127.0.0.1:1", "/payments/charges", charge("A1"), key="k1")
    assert shop.client.post(shop.start(faulty=False), "/payments/charges", charge("A1"), key="k1")["charge"]


def test_the_process_says_its_port_and_ends_with_its_input(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pyworkflow_ray.demo.services", "--ledger", str(tmp_path / "ledger.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())["port"]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
        process.stdin.close()
        assert process.wait(timeout=20) == 0
