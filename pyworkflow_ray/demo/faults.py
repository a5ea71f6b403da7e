"""How the demo's services fail: a pure function of seed, service, order and how often the order asked before.

Called by `services`; calls nothing. No clock and no shared random state: whatever the order of arrival, the n-th
request for an order meets the same fault, so a seed fails in the same way each time. From the seventh request on a
service answers: nothing in the demo fails for ever but what is meant to.
"""

from __future__ import annotations

import enum
import hashlib

PATIENCE = 6


class Fault(enum.StrEnum):
    """What a service does instead of answering."""

    NONE = "none"
    UNAVAILABLE = "503"
    THROTTLED = "429"  # with Retry-After
    DROPPED = "dropped"  # the connection ends before anything was done
    DROPPED_AFTER = "dropped after"  # the work is done and durable, then the connection ends without an answer
    SLOW = "slow"  # answers late
    STUCK = "stuck"  # does the work, and answers long after the client has given up


# Share of requests, by service; the rest is answered.
RATES: dict[str, list[tuple[Fault, float]]] = {
    "payments": [
        (Fault.UNAVAILABLE, 0.10),
        (Fault.DROPPED_AFTER, 0.08),
        (Fault.DROPPED, 0.03),
        (Fault.THROTTLED, 0.03),
        (Fault.SLOW, 0.06),
        (Fault.STUCK, 0.01),
    ],
    "stock/primary": [(Fault.UNAVAILABLE, 0.05), (Fault.SLOW, 0.05)],
    "stock/fallback": [(Fault.UNAVAILABLE, 0.05), (Fault.DROPPED_AFTER, 0.03)],
    "receipts": [(Fault.UNAVAILABLE, 0.05), (Fault.DROPPED_AFTER, 0.04), (Fault.SLOW, 0.03)],
}
# Share of orders whose part of the warehouse is out of reach for as long as the demo runs.
OUTAGES: dict[str, float] = {"stock/primary": 0.12, "stock/fallback": 0.35}


def _share(*parts: object) -> float:
    """A number in [0, 1), the same in every process for the same parts."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56


def fault(seed: int, service: str, order_id: str, nth: int) -> Fault:
    """What happens to the `nth` request (from 1) that `service` gets for this order."""
    if _share(seed, "outage", service, order_id) < OUTAGES.get(service, 0.0):
        return Fault.UNAVAILABLE
    if nth > PATIENCE:
        return Fault.NONE
    share = _share(seed, service, order_id, nth)
    for kind, rate in RATES[service]:
        if share < rate:
            return kind
        share -= rate
    return Fault.NONE
