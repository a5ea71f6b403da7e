"""The wish that a step call stop, from any thread: set once, seen by the attempt loop, by its waits and by what runs.

Made by the step host, one for each step call, and handed to `worker.execute_call`. Faults: `cancel` may come before
the call begins, between two attempts, while one runs, or after all is over; it never raises.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Interrupt:
    """Set once, never taken back."""

    __slots__ = ("_callbacks", "_event", "_lock")

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def cancel(self) -> None:
        """Cancel what runs: an async step's task, sync code in the main thread, a wait. Later calls do nothing."""
        with self._lock:
            if self._event.is_set():
                return
            self._event.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def wait(self, seconds: float) -> bool:
        """Sleep; True as soon as it is cancelled."""
        return self._event.wait(seconds)

    def bind(self, callback: Callable[[], None]) -> None:
        """Call this once when cancelled: at once where that has happened already."""
        with self._lock:
            if not self._event.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def unbind(self, callback: Callable[[], None]) -> None:
        """Never call it from now on (a call that has begun goes on)."""
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)
