"""Sends spans, in a thread of the observer process: packs what belongs together, sends, then moves the cursors.

Made by `observing`. Rules:

* what is sent is durable as sent before the next batch goes out, so a kill sends at most one batch again;
* a batch that an exporter did not take is kept and sent again, to that exporter only, with growing pauses.

Fault: the collector is away or slow: nothing else waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.observability.spandata import SpanData
from pyworkflow_ray.runtime.observer_state import State

log = logging.getLogger("pyworkflow_ray.observer")

BATCH = 512
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0


@dataclass(slots=True)
class Unit:
    """Spans that are sent together, and what holds once they are: the run's events up to a number are sent, a spool's
    up to an offset, a run is done with."""

    spans: list[SpanData]
    run: tuple[str, int] | None = None
    file: tuple[str, int] | None = None
    ended: str | None = None


class Sender:
    """See the module. `put` may be called by any thread."""

    def __init__(self, state: State, exporters: tuple[str, ...]) -> None:
        from pyworkflow_ray.observability.spans import default_resource, make_exporters

        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # an outage is told once, by us
        self._state = state
        self._exporters: list[Any] = []
        try:
            import os

            self._exporters = make_exporters(exporters, os.environ)
        except ConfigurationError as error:
            log.error("traces are not exported: %s", error)
        self._resource = default_resource()
        self._units: deque[Unit] = deque()
        self._lock = threading.Condition()
        self._sending = False
        self._failures = 0
        threading.Thread(target=self._loop, name="send-spans", daemon=True).start()

    def put(self, units: list[Unit]) -> None:
        with self._lock:
            self._units.extend(units)
            self._lock.notify()

    @property
    def waiting(self) -> int:
        return len(self._units)

    def flush(self, timeout_s: float) -> bool:
        """Whether everything was sent in time."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while self._units or self._sending:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._lock.wait(left)
        return True

    def _loop(self) -> None:
        while True:
            with self._lock:
                self._sending = False
                self._lock.notify_all()
                while not self._units:
                    self._lock.wait()
                batch = self._take_locked()
                self._sending = True
            try:
                self._send(batch)
                self._told(batch)
            except Exception:
                log.exception("sending spans failed; going on")
                time.sleep(_FIRST_PAUSE_S)

    def _take_locked(self) -> list[Unit]:
        batch: list[Unit] = []
        size = 0
        while self._units and (not batch or size + len(self._units[0].spans) <= BATCH):
            batch.append(self._units.popleft())
            size += len(batch[-1].spans)
        return batch

    def _send(self, batch: list[Unit]) -> None:
        from pyworkflow_ray.observability.spans import readable, send

        spans = [readable(span, self._resource) for unit in batch for span in unit.spans]
        if not spans:
            return
        for exporter in self._exporters:
            while True:
                try:
                    send(spans, exporter)
                    break
                except Exception as error:
                    if not self._failures:
                        log.warning("spans wait, for they can't be exported: %s", error)
                    self._failures += 1
                    time.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self._failures, 10)))
            if self._failures:
                log.warning("spans are exported again")
                self._failures = 0

    def _told(self, batch: list[Unit]) -> None:
        runs: dict[str, int] = {}
        for unit in batch:
            if unit.run is not None:
                runs[unit.run[0]] = max(unit.run[1], runs.get(unit.run[0], 0))
        self._state.sent(runs.items(), [unit.file for unit in batch if unit.file is not None])
        ended = [unit.ended for unit in batch if unit.ended is not None]
        if ended:
            self._state.finish(ended)
