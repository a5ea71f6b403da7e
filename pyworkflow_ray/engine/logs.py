"""Log lines of a body appear once: those made while it replays, or after it was evicted, are dropped.

This holds for the user's own stdlib loggers as well, so the filter sits where every record passes, whatever logger and
handlers it has: `logging.Logger.handle`. Outside of a workflow it does nothing but ask for the running loop.
"""

from __future__ import annotations

import logging

from pyworkflow_ray.engine.loop import current_workflow

_original = logging.Logger.handle


def _handle(self: logging.Logger, record: logging.LogRecord) -> None:
    loop = current_workflow()
    if loop is None or not (loop.replaying or loop.evicted):
        _original(self, record)


def filter_replayed_lines() -> None:
    """Install the filter, once a process."""
    if logging.Logger.handle is not _handle:
        logging.Logger.handle = _handle  # type: ignore[method-assign]
