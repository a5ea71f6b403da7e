"""One background event loop a process, on which all calls of buckets are made and all journals do their writing.

Called by `storage` and `journal`. Faults: a fork, whose child has no such thread: it makes its own at first use.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Loop:
    """See the module. Its methods may be called from any thread but the loop's own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        threading.Thread(target=self._loop.run_forever, name="object-store-loop", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, waited for."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def call(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function on the loop, soon, in order of these calls."""
        self._loop.call_soon_threadsafe(function, *args)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` on the loop without waiting for it; called on the loop."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


_lock = threading.Lock()
_current: Loop | None = None


def current_loop() -> Loop:
    """The loop of this process."""
    global _current
    with _lock:
        if _current is None:
            _current = Loop()
        return _current


def _forget() -> None:
    global _current, _lock
    _current, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
