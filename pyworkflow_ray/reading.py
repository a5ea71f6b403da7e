"""Runs read straight from the storage, explained: no Ray, no lock, while their owners go on writing.

Called by the commands that show runs and by the dashboard. Faults: no storage at the path, an unknown run, a damaged
journal (named, and never hiding the others), a torn tail of an unfinished journal (the prefix is shown and the view
says so).
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pyworkflow_ray.connection import readable_events
from pyworkflow_ray.engine.events import Event
from pyworkflow_ray.errors import ConfigurationError, PyWorkflowError, RunNotFoundError, StorageError
from pyworkflow_ray.ids import check_run_id
from pyworkflow_ray.observability.model import RunView
from pyworkflow_ray.observability.view import explain
from pyworkflow_ray.observability.words import one_line, short_name

if TYPE_CHECKING:
    import datetime as dt

    from pyworkflow_ray.storage.catalogue import Query, Row
    from pyworkflow_ray.storage.port import StoragePort


ENDED = frozenset({"completed", "failed", "cancelled"})
UNFINISHED = frozenset({"pending", "running", "parked", "paused"})
MOST_DIGITS = 18  # of microseconds: the catalogue's integers hold them, for 30,000 years
MOST_AT_ONCE = 2_000  # rows of the catalogue, when few of many are wanted


@dataclass
class Reader:
    """An open storage for reading. `now` is asked once a screen, so that all its ages agree."""

    storage: StoragePort | None
    root: Path | str
    zone: dt.tzinfo
    alive: dict[str, bool | None] = field(default_factory=dict)

    def view(self, run_id: str, now: float | None = None) -> RunView:
        return self.read(run_id, now)[0]

    def read(self, run_id: str, now: float | None = None) -> tuple[RunView, list[Event]]:
        """The view of a run and its events.

        Raises:
            RunNotFoundError: the storage has no such run.
            CorruptJournalError: a file of it is damaged.
        """
        if self.storage is None:
            raise RunNotFoundError(f"no run {run_id!r} in {self.root}: there is no storage yet", run_id=run_id)
        history = self.storage.read_run(run_id)
        events = readable_events(self.storage, history)
        now = time.time() if now is None else now
        view = explain(events, now, tz=self.zone, owner_alive=self._alive(history.lease), torn=history.torn)
        return view, events

    def shown(self, run_id: str, events: list[Event]) -> list[Event]:
        """The events without the data of values that are redacted."""
        from pyworkflow_ray.storage.codec import StorageCodec
        from pyworkflow_ray.storage.revealing import revealed

        return revealed(run_id, events, StorageCodec(cast("Any", self.storage)))

    def listing(self, wanted: Filter, limit: int, before: str | None, search_s: float | None = None) -> Listed:
        """The newest `limit` runs that are wanted, and what is wrong with runs that can't be read, wanted or not.

        Args:
            wanted: Which runs.
            limit: At most so many.
            before: Only runs that come after this one in the list: its id, or a cursor of `Listed`.
            search_s: Leave off after so many seconds, though the list is not full, once `limit` runs were looked at:
                what a run is at can only be told by reading it, and there may be very many that are not wanted.
        """
        from pyworkflow_ray.storage.listing import page

        found = Listed()
        if self.storage is None:
            return found
        now = time.time()
        query = wanted.query(now, None if before is None else place_in_list(self.storage, before))
        first = self._named_by(wanted, now, found)
        if first is not None and before is None:
            found.views.append(first)
        size, give_up_at = limit + 1, None
        while not found.more:
            rows = page(self.storage, query, size)
            if give_up_at is None and search_s is not None:
                give_up_at = time.monotonic() + search_s  # from here: the first rows may have taken long, once
            size = min(MOST_AT_ONCE, 4 * size)  # what follows a page with few wanted ones is like it
            found.damaged |= rows.damaged
            for row in rows.rows:
                if first is not None and row.run_id == first.run_id:
                    continue  # it stands first
                if give_up_at is not None and found.looked_at >= limit and time.monotonic() > give_up_at:
                    found.more, found.gave_up = True, len(found.views) < limit
                    break
                view = self._looked_at(row.run_id, now, found) if wanted.may_take(row) else None
                if view is not None and wanted.takes(view):
                    found.more = len(found.views) == limit
                    if found.more:
                        break
                    found.views.append(view)
                found.looked_at, found.cursor = found.looked_at + 1, f"{row.created}/{row.run_id}"
            if not rows.more:
                break
            query = dataclasses.replace(query, before=rows.rows[-1].key)
        return found

    def _named_by(self, wanted: Filter, now: float, found: Listed) -> RunView | None:
        """The run whose id the text is, found however many there are; it stands before all others."""
        try:
            view = self._looked_at(check_run_id(wanted.text), now, found) if wanted.text else None
        except ConfigurationError:
            return None
        return view if view is not None and wanted.takes(view) else None

    def _looked_at(self, run_id: str, now: float, found: Listed) -> RunView | None:
        try:
            return self.view(run_id, now)
        except RunNotFoundError:
            return None  # it went while we listed
        except (StorageError, ValueError) as error:
            found.damaged[run_id] = str(error)
            return None

    def views(self, now: float) -> Iterator[RunView | PyWorkflowError]:
        """Every run, in no particular order; of a damaged one its error, with the run named in it. Reads them all."""
        if self.storage is None:
            return
        for run_id in self.storage.list_run_ids(None):
            try:
                yield self.view(run_id, now)
            except RunNotFoundError:
                continue  # it went while we listed
            except (StorageError, ValueError) as error:
                yield named(run_id, error)

    def _alive(self, lease: str) -> bool | None:
        if not lease or self.storage is None:
            return None
        if lease not in self.alive:
            self.alive[lease] = self.storage.is_held(lease)
        return self.alive[lease]


def named(run_id: str, error: Exception) -> PyWorkflowError:
    """The error with its run in the message."""
    text = str(error)
    return StorageError(text if run_id in text else f"run {run_id}: {text}", path=getattr(error, "path", ""))


def place_in_list(storage: StoragePort, before: str) -> tuple[int, str]:
    """The place in the list that a run id or a cursor, `microseconds/run id`, means.

    Raises:
        RunNotFoundError: no such run. ConfigurationError: neither an id nor a cursor.
    """
    from pyworkflow_ray.storage.listing import find

    micros, slash, run_id = before.partition("/")
    if slash and micros.isdecimal() and len(micros) <= MOST_DIGITS:
        return int(micros), check_run_id(run_id)
    return find(storage, check_run_id(before)).key


@dataclass
class Listed:
    """One screen of runs.

    more: others may come after; `cursor` is where to go on. gave_up: it was left off before it was full. looked_at: how
    many runs were. damaged: run id to what is wrong.
    """

    views: list[RunView] = field(default_factory=list)
    more: bool = False
    damaged: dict[str, str] = field(default_factory=dict)
    cursor: str = ""
    looked_at: int = 0
    gave_up: bool = False


@dataclass
class Filter:
    """What a list shows. A state and a status are asked for alike: both name what the run is now.

    text: all of its words, whatever their case, are in the run's id, workflow or attributes, or in what it is at:
    state, step, why, next. Of a completed run, which is at nothing, only the former count, so that it need not be read.
    """

    states: frozenset[str] = frozenset()
    workflow: str | None = None
    since_s: float | None = None
    attributes: dict[str, str] = field(default_factory=dict)
    text: str = ""

    def query(self, now: float, before: tuple[int, str] | None) -> Query:
        """What the storage can tell from its index: no less than `takes`, which looks at the run itself."""
        from pyworkflow_ray.storage.catalogue import Query

        unfinished = self.states - ENDED
        return Query(
            statuses=(self.states & ENDED) | (UNFINISHED if unfinished else frozenset()) if self.states else None,
            workflow=self.workflow,
            attributes=tuple((name, _texts(value)) for name, value in self.attributes.items()),
            since=None if self.since_s is None else round((now - self.since_s) * 1_000_000),
            before=before,
        )

    def takes(self, view: RunView) -> bool:
        if self.states and view.state not in self.states and view.status not in self.states:
            return False
        if self.workflow is not None and self.workflow not in (view.workflow, short_name(view.workflow)):
            return False
        if self.since_s is not None and (view.now - view.created_at).total_seconds() > self.since_s:
            return False
        if not all(str(view.attributes.get(name)) == value for name, value in self.attributes.items()):
            return False
        return not self.text or self._says(view)

    def may_take(self, row: Row) -> bool:
        """Whether `takes` may say yes of the run, by its row alone."""
        if not self.text or row.status != "completed":
            return True
        return self._has_words([row.run_id, row.workflow], json.loads(row.attributes))

    def _says(self, view: RunView) -> bool:
        said, row = [view.run_id, view.workflow], view.row
        if view.status != "completed":
            said += [row.state, row.step or "", one_line(row.why), row.next]
        return self._has_words(said, view.attributes)

    def _has_words(self, said: list[str], attributes: dict[str, Any]) -> bool:
        text = "\n".join([*said, *(f"{name}={value}" for name, value in attributes.items())]).casefold()
        return all(word in text for word in self.text.casefold().split())


def _texts(value: str) -> frozenset[str]:
    """Every value, as `canonical` has it, that a person may have written so."""
    from pyworkflow_ray.storage.catalogue import ABSENT, canonical

    found = {canonical(value)} | ({ABSENT} if value == "None" else set())
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            found.add(canonical(parse(value)))
    return frozenset(found)
