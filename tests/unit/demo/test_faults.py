from __future__ import annotations

from collections import Counter

from pyworkflow_ray.demo.faults import OUTAGES, PATIENCE, RATES, Fault, fault
from pyworkflow_ray.demo.orders import read_orders
from pyworkflow_ray.demo.services import DEFAULT_SEED

ORDERS = [row["order_id"] for row in read_orders()]


def test_the_same_request_meets_the_same_fault_whatever_came_between() -> None:
    forward = [fault(3, "payments", order, 1) for order in ORDERS]
    backward = [fault(3, "payments", order, 1) for order in reversed(ORDERS)]
    assert forward == backward[::-1]
    assert forward != [fault(4, "payments", order, 1) for order in ORDERS]


def test_shares_are_close_to_the_table() -> None:
    counts = Counter(fault(seed, "payments", order, 1) for seed in range(20) for order in ORDERS)
    for kind, rate in RATES["payments"]:
        assert abs(counts[kind] / (20 * len(ORDERS)) - rate) < 0.02, kind


def test_a_patient_client_is_answered_in_the_end() -> None:
    for service in ("payments", "receipts"):
        assert {fault(seed, service, order, PATIENCE + 1) for seed in range(5) for order in ORDERS} == {Fault.NONE}


def test_an_outage_lasts() -> None:
    out = [order for order in ORDERS if fault(1, "stock/primary", order, 99) is Fault.UNAVAILABLE]
    assert abs(len(out) / len(ORDERS) - OUTAGES["stock/primary"]) < 0.06
    assert all(fault(1, "stock/primary", order, nth) is Fault.UNAVAILABLE for order in out for nth in range(1, 9))


def test_the_demo_shows_every_fault_and_every_source_of_stock() -> None:
    first = {fault(DEFAULT_SEED, "payments", order, 1) for order in ORDERS}
    assert first == set(Fault)
    out = {service: {o for o in ORDERS if fault(DEFAULT_SEED, service, o, 99) is not Fault.NONE} for service in OUTAGES}
    assert out["stock/primary"] - out["stock/fallback"], "nobody needs the fallback"
    assert out["stock/primary"] & out["stock/fallback"], "nobody needs the offline list"
