"""How long an object that was seen in a bucket may be taken to be still there, though a compaction may remove it.

Called by `journal`, `commit`, `files`, `retire` and `compact`. Slots fence stale owners by being there, and a bucket
has no removal that asks whether somebody still relies on what goes. So the two sides keep apart in time. Rules:

* Nothing is removed before `GRACE_S` have passed, by the store's clock, since everybody could see that it will be.
* Who writes by what he saw more than `TRUSTED_S` ago looks again *after* the write, and before he believes it.

Faults: a process that stands still at any point (the look after the write finds it), clocks that run apart. Time since
a look is the larger of what the wall clock and the clock that counts sleep say. For `GRACE_S` to pass within
`TRUSTED_S` of both, a whole machine must be stopped and neither notice: then its requests would be signed with a time
that is off by more than a quarter of an hour, and S3 and Azure refuse these.
"""

from __future__ import annotations

import time
from typing import Final

TRUSTED_S: Final = 300.0
GRACE_S: Final = 3600.0

Moment = tuple[float, float]


def now() -> Moment:
    """This moment, by both clocks."""
    return time.time(), time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def is_trusted(seen: Moment | None) -> bool:
    """Whether what was seen at that moment may still be taken for granted."""
    if seen is None:
        return False
    return age_s(seen) <= TRUSTED_S


def age_s(seen: Moment) -> float:
    """Seconds since that moment, by the clock that says more."""
    wall, awake = now()
    return max(abs(wall - seen[0]), awake - seen[1])


def seen_at(store_time: float) -> Moment:
    """The moment of the store's clock `store_time`, for what the store says was written then.

    The store's and our clock may differ by what `GRACE_S` leaves beside `TRUSTED_S`.
    """
    wall, awake = now()
    return store_time, awake - max(0.0, wall - store_time)
