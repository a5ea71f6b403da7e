"""The observer process: follows the logs of a storage's runs and tells the world: spans, metrics, alerts.

Started by `observer` in the controller, which writes a line of JSON a run that began or ended to its stdin; reads the
storage by itself, with no Ray, and is nobody's way: it may be killed at any time and costs runs nothing. One a storage:
a lock is held, and a second waits. Rules:

* everything follows from the logs, and how far each was told is durable (`observer_state`): a kill loses nothing;
* an ended run is told at once, one that goes on every `period_s`; a read that takes long is made the more seldom.

Faults: SIGKILL between a batch that was sent and its cursor (the batch is sent again, with the same span ids); the
collector is away (spans wait in the logs); a damaged run (named once, left out); a controller that dies (stdin ends: it
tells what is left, and ends).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import queue
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.errors import CorruptJournalError, RunNotFoundError, StorageError
from pyworkflow_ray.observability.alerts import STRUGGLING_AFTER, AlertFold, breaker_opened
from pyworkflow_ray.observability.current import SPOOL, is_sampled, read_spool
from pyworkflow_ray.observability.measures import Measure, MeasureFold
from pyworkflow_ray.observability.otel_settings import signals
from pyworkflow_ray.observability.spandata import SpanData
from pyworkflow_ray.observability.trace import TraceFold
from pyworkflow_ray.observability.trace_gaps import untold_attempts
from pyworkflow_ray.observability.words import short_name
from pyworkflow_ray.runtime.alerts import CALLBACK, WEBHOOK, Deliverer
from pyworkflow_ray.runtime.observer_state import LOCK, State
from pyworkflow_ray.runtime.span_sender import Sender, Unit
from pyworkflow_ray.storage.breaker_states import DIRECTORY as BREAKERS
from pyworkflow_ray.storage.breaker_states import kept_breakers
from pyworkflow_ray.storage.storage import Storage

if TYPE_CHECKING:
    from pyworkflow_ray.observability.meters import Meters

log = logging.getLogger("pyworkflow_ray.observer")

GATHER_S = 0.1
PERIOD_S = 5.0
LOOK_S = 1.0  # between two looks at the breakers
LAST_WORDS_S = 5.0  # after the controller is gone, for what is left to be sent
_SELDOM = 20  # a read is repeated after so many times as long as it took
_MOST_WAITING = 20_000  # spans that wait to be sent; beyond it they wait in the logs


@dataclass(slots=True)
class Followed:
    """A run that is followed. seen: events that were read. signature: of its files at the last look."""

    trace: TraceFold | None = None
    seen: int = 0
    signature: Any = None
    not_before: float = 0.0
    finished: bool = False
    sampled: bool = True
    measures: MeasureFold | None = None
    alerts: AlertFold | None = None
    sinks: tuple[str, ...] = ()
    found: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)


class Observer:
    """See the module. `pass_` is called by one thread."""

    def __init__(
        self,
        storage: Storage,
        state: State,
        sender: Sender | None,
        meters: Meters | None = None,
        *,
        webhook: str | None = None,
        struggling_after: int = STRUGGLING_AFTER,
        calling: dict[str, Any] | None = None,
    ) -> None:
        self._storage = storage
        self._state = state
        self._sender = sender
        self._meters = meters
        self._webhook = webhook is not None
        self._struggling_after = struggling_after
        self._breakers: dict[str, int] = {}
        self._breakers_at: Any = None
        self.deliverer = Deliverer(state, {"storage": storage.root, **(calling or {})}, webhook)
        self._runs: dict[str, Followed] = {}
        self._damaged: set[str] = set()
        self._spools: dict[str, int] = {}
        self._period_s = PERIOD_S

    def begin(self) -> None:
        """Find what an earlier observer left untold."""
        directories = self._storage.run_directories()
        unfinished = set(self._storage.unfinished())
        if self._state.begin(set(directories) - unfinished):
            self.look(unfinished)
            return
        done = self._state.done()
        self._state.forget(done - set(directories))
        self.look(set(directories) - done | unfinished)

    def look(self, run_ids: set[str], *, at_once: bool = False) -> None:
        """Read what is new of these runs, and pass it on."""
        for run_id in sorted(run_ids):
            try:
                self._look(run_id, at_once)
            except RunNotFoundError:
                self._runs.pop(run_id, None)
            except (StorageError, OSError) as error:
                if run_id not in self._damaged:
                    self._damaged.add(run_id)
                    level = logging.ERROR if isinstance(error, CorruptJournalError) else logging.WARNING
                    log.log(level, "run %s can't be observed: %s", run_id, error)

    def all_unfinished(self) -> None:
        """Look at every run that goes on, and at users' spans."""
        began = time.monotonic()
        self.look(set(self._storage.unfinished()) | {r for r, f in self._runs.items() if not f.finished})
        self.read_spools()
        self._fill_gaps()
        self._period_s = max(PERIOD_S, _SELDOM * (time.monotonic() - began))

    @property
    def period_s(self) -> float:
        return self._period_s

    def _look(self, run_id: str, at_once: bool) -> None:
        signature = self._signature(run_id)
        followed = self._runs.get(run_id)
        now = time.monotonic()
        if followed is not None and (followed.signature == signature or (now < followed.not_before and not at_once)):
            return
        history = self._storage.read_run(run_id)
        if followed is None:
            followed = self._runs[run_id] = Followed()
        self._read(run_id, followed, history.events)
        followed.signature, followed.finished = signature, history.finished
        followed.not_before = now + _SELDOM * (time.monotonic() - now)
        self._damaged.discard(run_id)
        if history.finished:
            self._ended(run_id)

    def _signature(self, run_id: str) -> Any:
        """Changes when anything is written to the run; of a compacted one None."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self._storage.place(run_id).directory) as entries:
            return sorted((entry.name, entry.stat().st_size) for entry in entries)
        return None

    def _read(self, run_id: str, followed: Followed, events: list[ev.Event]) -> None:
        seen, sent = self._state.cursor(run_id)
        created = events[0]
        assert isinstance(created, ev.RunCreated)
        if followed.trace is None:
            followed.trace = TraceFold(created)
            followed.sampled = is_sampled(created.trace_id, created.traceparent)
            followed.seen = 1
            self._alert_of(followed, created)
            if self._meters is not None:
                followed.measures = MeasureFold(created)
                self._measure(followed.measures, fresh=not seen)
        units = []
        for number, event in enumerate(events[followed.seen :], followed.seen + 1):
            followed.trace.apply(event)
            spans = followed.trace.take()
            if number > sent and spans and followed.sampled:
                units.append(Unit(spans, run=(run_id, number)))
            self._told(followed, event, fresh=number > seen)
        followed.seen = len(events)
        if len(events) > seen:
            self._saw(run_id, followed)
        if self._sender is not None and len(events) > sent:
            units.append(Unit([], run=(run_id, len(events))))
            self._sender.put(units)

    def _told(self, followed: Followed, event: ev.Event, *, fresh: bool) -> None:
        """Whatever else follows from an event; `fresh`: it was not seen by an earlier observer."""
        if followed.measures is not None:
            followed.measures.apply(event)
            self._measure(followed.measures, fresh=fresh)
        if followed.alerts is not None:
            followed.alerts.apply(event)
            found = followed.alerts.take()
            if fresh:
                followed.found += [(body["id"], sink, body) for body in found for sink in followed.sinks]

    def _alert_of(self, followed: Followed, created: ev.RunCreated) -> None:
        called = bool(created.hooks.get("alert"))
        if (
            called and self._state.recall("callback_at", "0") < f"{created.at:020.6f}"
        ):  # breakers' alerts go to the last
            self._state.remember("callback_run", created.run_id)
            self._state.remember("callback_at", f"{created.at:020.6f}")
        followed.sinks = (*((WEBHOOK,) if self._webhook else ()), *((CALLBACK,) if called else ()))
        if followed.sinks:
            followed.alerts = AlertFold(created, self._struggling_after)

    def look_at_breakers(self) -> None:
        """Which have opened since the last look, by the states that are kept of them."""
        sinks = (*((WEBHOOK,) if self._webhook else ()), *((CALLBACK,) if self._state.recall("callback_run") else ()))
        directory = os.path.join(self._storage.root, BREAKERS)
        if not sinks or not os.path.isdir(directory):
            return
        changed = os.stat(directory).st_mtime_ns
        if changed == self._breakers_at:
            return
        for name, states, at in kept_breakers(self._storage.root):
            for key, state in states:
                self._look_at_breaker(name, key, state, at, sinks)
        self._breakers_at = changed

    def _look_at_breaker(
        self, name: str, key: str | None, state: dict[str, Any], at: float, sinks: tuple[str, ...]
    ) -> None:
        mark, generation = f"breaker {name}\x1f{key or ''}", int(state["generation"])
        known = self._breakers.setdefault(mark, int(self._state.recall(mark, "-1")))
        if state["state"] == "open" and generation > known:
            body = breaker_opened(name, key, generation, str(state["reason"]), at)
            self._state.enqueue([(body["id"], sink, body) for sink in sinks])
            self.deliverer.look()
        if generation != known:
            self._state.remember(mark, str(generation))
            self._breakers[mark] = generation

    def _measure(self, fold: MeasureFold, *, fresh: bool) -> None:
        measures = fold.take()
        if fresh and self._meters is not None:
            self._meters.add(measures)

    def told_by_controller(self, line: dict[str, Any]) -> None:
        """What no log says: how long commits took, and how breakers and budgets stand."""
        if self._meters is None:
            return
        for seconds in line.get("commits", ()):
            self._meters.add([Measure("pyworkflow.journal.commit.duration", seconds, {})])
        for name, value, attributes in line.get("counts", ()):
            self._meters.add([Measure(name, value, attributes)])
        for name, gauges in line.get("gauges", {}).items():
            self._meters.show(name, [(value, attributes) for value, attributes in gauges])

    def show_gauges(self) -> None:
        """How many runs are unfinished, by status."""
        if self._meters is None:
            return
        found = Counter(
            (short_name(f.measures.created.workflow), f.measures.status) for f in self._runs.values() if f.measures
        )
        self._meters.show(
            "pyworkflow.run.unfinished",
            [(n, {"pyworkflow.workflow": flow, "pyworkflow.status": status}) for (flow, status), n in found.items()],
        )
        self._meters.show("pyworkflow.alert.waiting", [(self._state.waiting_alerts(), {})])

    def _saw(self, run_id: str, followed: Followed) -> None:
        found, followed.found = followed.found, []
        self._state.saw([(run_id, followed.seen)], found)
        if found:
            self.deliverer.look()

    def _ended(self, run_id: str) -> None:
        self.read_spools()  # what its steps wrote was there before its end
        if self._sender is None:
            self._state.finish([run_id])
        else:
            self._sender.put([Unit([], ended=run_id)])
        del self._runs[run_id]

    # Users' spans -------------------------------------------------------------------------------------------------

    def read_spools(self) -> None:
        """Pass on what steps have written since the last look; remove what is sent and has no writer any more."""
        if self._sender is None:
            return
        directory = os.path.join(self._storage.root, SPOOL)
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(directory)):
                with contextlib.suppress(FileNotFoundError):
                    self._read_spool(name, os.path.join(directory, name))

    def _read_spool(self, name: str, path: str) -> None:
        offset = self._spools.setdefault(name, self._state.offset(name))
        if os.stat(path).st_size <= offset and self._state.offset(name) < offset:
            return  # nothing new, and not all sent
        groups, behind, ended = read_spool(path, offset)
        if not groups:
            if ended and behind == offset and self._state.offset(name) >= offset:
                os.unlink(path)
                self._spools.pop(name)
                self._state.drop_spool(name)
            return
        units, places = [], []
        for group in groups:
            spans = [SpanData.from_json(json.dumps(span)) for span in group["spans"]]
            units.append(Unit(spans))
            place = group["place"]
            if place is not None and "[" not in str(place[1]):
                places += [(s.parent_id, place[0], place[1:]) for s in spans if s.remote_parent and s.parent_id]
        self._state.hang(places)
        units.append(Unit([], file=(name, behind)))
        self._spools[name] = behind
        assert self._sender is not None
        self._sender.put(units)

    def _fill_gaps(self) -> None:
        """Of runs that have ended: attempts that users' spans hang from and that the log does not tell."""
        for run_id in self._state.places_of_done():
            with contextlib.suppress(StorageError, OSError):
                spans = untold_attempts(self._storage.read_run(run_id).events, self._state.places(run_id))
                if spans and self._sender is not None:
                    self._sender.put([Unit(spans)])
            self._state.unhang(run_id)

    def last_words(self) -> None:
        """The controller is gone: tell what is left."""
        self.look(set(self._storage.unfinished()) | set(self._runs), at_once=True)
        self.read_spools()
        self.look_at_breakers()
        if self._sender is not None:
            self._sender.flush(LAST_WORDS_S)
            self._fill_gaps()
            self._sender.flush(LAST_WORDS_S)
        if self._meters is not None:
            self.show_gauges()
            self._meters.flush(LAST_WORDS_S)
        self.deliverer.flush(LAST_WORDS_S)


def hold_lock(root: str) -> int:
    """Wait until this is the one observer of the storage."""
    path = os.path.join(root, LOCK)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def follow(observer: Observer, lines: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Until the lines end: look where something happened, and at everything once a period."""
    next_round = time.monotonic()
    while True:
        touched: set[str] = set()
        wait_s = min(LOOK_S, max(0.0, next_round - time.monotonic()))
        until = None
        ended = False
        while True:
            try:
                line = lines.get(timeout=wait_s if until is None else max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if line is None:
                ended = True
                break
            touched.update(line.get("runs", ()))
            observer.told_by_controller(line)
            if until is None:
                until = time.monotonic() + GATHER_S
        if ended:
            return
        observer.look(touched, at_once=True)
        if time.monotonic() >= next_round:
            observer.all_unfinished()
            next_round = time.monotonic() + observer.period_s
        observer.look_at_breakers()
        observer.show_gauges()


def read_lines(stream: IO[str], lines: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """In a thread: what the controller says; None at the end."""
    for text in stream:
        with contextlib.suppress(ValueError):
            lines.put(json.loads(text))
    lines.put(None)


def _meters(exporters: tuple[str, ...]) -> Meters | None:
    if not exporters:
        return None
    from pyworkflow_ray.observability.meters import Meters, make_readers

    return Meters(make_readers(exporters, os.environ))


def main() -> None:
    """The process. The first line says what it is to do."""
    given = json.loads(sys.stdin.readline())
    os.environ.update(given["telemetry"])
    root: str = given["storage"]
    lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=read_lines, args=(sys.stdin, lines), daemon=True).start()
    held = hold_lock(root)
    storage = Storage.open(Path(root), create=False)
    state = State(storage.root)
    asked = signals(os.environ)
    sender = Sender(state, asked.traces) if asked.traces else None
    observer = Observer(
        storage,
        state,
        sender,
        _meters(asked.metrics),
        webhook=given.get("webhook"),
        struggling_after=given.get("struggling_after", STRUGGLING_AFTER),
        calling={"codec": given.get("codec"), "allow_pickle": given.get("allow_pickle", True)},
    )
    try:
        observer.begin()
        follow(observer, lines)
        observer.last_words()
    finally:
        state.close()
        os.close(held)
    sys.stdout.flush()
    os._exit(0)  # an exporter's threads may be in the middle of a retry
