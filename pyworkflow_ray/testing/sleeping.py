"""`time.sleep` in the steps of a test environment: virtual, like every other wait.

Installed by `environment` while one is open; calls `execution.timeouts`, so that a step's timeout ends a sleep. Only
calls of `time.sleep` by that name, in the thread of the environment, from code of a step are virtual; a test's own
sleeps, other threads', and a `from time import sleep` really sleep.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pyworkflow_ray.execution.context import running_step

really = time.sleep
_open = 0
_lock = threading.Lock()


def install() -> None:
    """From now on a step's `time.sleep` is what its environment does for it; counted."""
    global _open
    with _lock:
        _open += 1
        time.sleep = _sleep  # type: ignore[assignment]


def remove() -> None:
    global _open
    with _lock:
        _open -= 1
        if _open == 0:
            time.sleep = really


def _sleep(seconds: float, /) -> None:
    step = running_step()
    virtual: Callable[[float], None] | None = getattr(step._sleep, "virtual", None) if step is not None else None
    if virtual is None or seconds < 0 or seconds != seconds:
        really(seconds)
    else:
        virtual(seconds)
