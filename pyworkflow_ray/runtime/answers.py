"""Ray's answers, handled in a thread of ours. Used by `dispatcher`.

Faults: Ray calls back on the thread that brings all answers. Were that one to wait for our lock while the lock's holder
waits for an answer (`get_actor` does), the two would wait for each other for ever.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

log = logging.getLogger("pyworkflow_ray.controller")


class Answers:
    """One daemon thread that handles answers in the order in which they came."""

    def __init__(self) -> None:
        self._come: queue.SimpleQueue[tuple[Callable[[Any], None], Any]] = queue.SimpleQueue()
        threading.Thread(target=self._loop, name="answers", daemon=True).start()

    def then(self, ref: Any, do: Callable[[Any], None]) -> None:
        """Call `do` with the future of `ref`, an object ref, once that is done. `do` may take locks and block."""
        ref.future().add_done_callback(lambda future: self._come.put((do, future)))

    def _loop(self) -> None:
        while True:
            do, future = self._come.get()
            try:
                do(future)
            except Exception:
                log.exception("an answer could not be handled")
