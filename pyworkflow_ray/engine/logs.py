"""Log lines of a body appear once: those made while it replays, or after it was evicted, are dropped.

This holds for the user's own stdlib loggers as well, so the filter sits where every record passes, whatever logger and
handlers it has: `logging.Logger.handle`. Outside of a workflow it does nothing but ask for the running loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from pyworkflow_ray.engine.loop import current_workflow

_original = logging.Logger.handle


def _handle(self: logging.Logger, record: logging.LogRecord) -> None:
    loop = current_workflow()
    if loop is None or not (loop.replaying or loop.evicted):
        if _enrich is not None:
            _enrich(record)
        _original(self, record)


_enrich: Callable[[logging.LogRecord], None] | None = None


def filter_replayed_lines(enrich: Callable[[logging.LogRecord], None] | None = None) -> None:
    """Install the filter, once a process. `enrich` is given each record that passes, before any handler."""
    global _enrich
    _enrich = enrich or _enrich
    if logging.Logger.handle is not _handle:
        logging.Logger.handle = _handle  # type: ignore[method-assign]
