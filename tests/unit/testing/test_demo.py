"""The demo's checkout in a `WorkflowEnv`, on its real services: killed after each event, nobody is charged twice."""

from __future__ import annotations

import threading

import pytest

from pyworkflow_ray.demo.checkout import InvalidOrder, charge, checkout, reserve_fallback, reserve_primary, send_receipt
from pyworkflow_ray.demo.client import CardDeclined
from pyworkflow_ray.demo.ledger import Ledger, read_ledger
from pyworkflow_ray.demo.services import Services

ROW = {
    "order_id": "o-1",
    "customer": "Ada",
    "email": "ada@example.org",
    "street": "1 Main St",
    "city": "London",
    "country": "GB",
    "amount": "19.99",
    "currency": "GBP",
    "card": "tok_visa",
    "sku": "lamp-desk",
    "quantity": "1",
}


@pytest.fixture
def shop(tmp_path):
    """The services, answering always, and their books."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    server = Services(ledger, faulty=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"127.0.0.1:{server.port}", ledger
    server.shutdown()
    server.server_close()
    thread.join()
    ledger.close()


def charged(tmp_path, completed):
    return read_ledger(tmp_path / "ledger.sqlite", completed, [] if completed else ["o-1"])


async def test_a_crash_after_any_event_charges_nobody_twice(workflow_env, shop, tmp_path):
    address, _ = shop
    workflow_env.fail(charge, times=1, error=ConnectionError("503"))
    confirmation = await workflow_env.crash_everywhere(checkout, ROW, address)
    assert (confirmation.stock, confirmation.receipt_to) == ("primary", "ada@example.org")
    proof = charged(tmp_path, {"o-1": "19.99"})
    assert proof.holds
    assert proof.charges == 1
    assert proof.repeated >= len(workflow_env.events())  # every crashed run asked again, with the same key


async def test_goods_come_from_the_next_source_when_one_is_down(workflow_env, shop):
    address, _ = shop
    workflow_env.fail(reserve_primary, times=3)
    assert (await workflow_env.run(checkout, ROW, address)).stock == "fallback"
    workflow_env.fail(reserve_primary, times=3)
    workflow_env.fail(reserve_fallback, times=3, error=TimeoutError("late"))
    assert (await workflow_env.run(checkout, ROW, address)).stock == "offline (Antwerp)"


async def test_a_malformed_order_and_a_declined_card_are_not_tried_again(workflow_env, shop, tmp_path):
    address, _ = shop
    with pytest.raises(InvalidOrder, match="amount '-1' is not above zero"):
        await workflow_env.run(checkout, {**ROW, "amount": "-1"}, address)
    with pytest.raises(CardDeclined, match="402"):
        await workflow_env.run(checkout, {**ROW, "card": "tok_declined"}, address)
    assert workflow_env.explain().retries == 0
    assert charged(tmp_path, {}).holds


async def test_receipts_wait_with_growing_delays_up_to_the_cap(workflow_env, shop):
    address, _ = shop
    workflow_env.fail(send_receipt, times=10)
    await workflow_env.run(checkout, ROW, address)
    delays = [e.delay_s for e in workflow_env.events() if e.type == "attempt_failed"]
    assert len(delays) == 10
    assert delays[0] < delays[1] <= 1.0
    assert max(delays) <= 1.0
