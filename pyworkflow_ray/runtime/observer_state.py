"""What the observer process remembers: how far each run's log was read and sent, what users' spans hang from, and the
alerts that are to be delivered. A SQLite file in the storage; every change is one durable transaction.

Called by `observing`, and by `runs trace` and tests to look. Rules:

* `seen` is advanced in the transaction that enqueues what was found in those events, so an alert is enqueued once;
* `sent` is advanced after an exporter has taken the spans: a kill between the two sends one batch again, with the same
  ids;
* losing the file loses no run: logs are read again from their start.

Fault: a damaged file is put aside and begun anew, which is logged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

log = logging.getLogger("pyworkflow_ray.observer")

DIRECTORY = "observer"
FILE = "observer/state.sqlite"
LOCK = "observer/lock"
CALLBACKS = "observer/callbacks"  # is there where runs have callbacks for alerts

_SCHEMA = """
create table if not exists runs (run_id text primary key, seen integer not null default 0,
  sent integer not null default 0, done integer not null default 0) without rowid;
create table if not exists spool (file text primary key, offset integer not null) without rowid;
create table if not exists places (span_id text primary key, run_id text not null, place text not null) without rowid;
create table if not exists alerts (id text not null, sink text not null, body text not null, tries integer not null,
  due real not null, primary key (id, sink)) without rowid;
create table if not exists meta (name text primary key, value text not null) without rowid;
"""


class State:
    """See the module. Used by two threads: one lock round each transaction."""

    def __init__(self, root: str) -> None:
        os.makedirs(os.path.join(root, DIRECTORY), mode=0o700, exist_ok=True)
        self._path = os.path.join(root, FILE)
        self._lock = threading.RLock()
        try:
            self._db = self._open()
        except sqlite3.DatabaseError as error:
            aside = f"{self._path}.damaged"
            log.error("%s is damaged and put aside as %s; spans may be sent again: %s", self._path, aside, error)
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self._path + suffix, aside + suffix)
            self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=30.0)
        try:
            db.execute("pragma journal_mode=wal")
            db.execute("pragma synchronous=full")
            found = db.execute("pragma quick_check").fetchone()
            if found is None or found[0] != "ok":
                raise sqlite3.DatabaseError(str(found))
            db.executescript(_SCHEMA)
        except sqlite3.DatabaseError:
            db.close()
            raise
        return db

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("begin immediate")
            try:
                yield self._db
            except BaseException:
                self._db.execute("rollback")
                raise
            self._db.execute("commit")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # Runs -------------------------------------------------------------------------------------------------------

    def begin(self, finished: Iterable[str]) -> bool:
        """The first time: runs that had ended before anybody observed them are none of ours. Whether it was."""
        with self._writing() as db:
            if db.execute("select 1 from meta where name='begun'").fetchone():
                return False
            db.executemany("insert or ignore into runs values (?, 0, 0, 1)", [(run_id,) for run_id in finished])
            db.execute("insert into meta values ('begun', '1')")
            return True

    def done(self) -> set[str]:
        """Runs of which nothing is left to tell."""
        with self._lock:
            return {row[0] for row in self._db.execute("select run_id from runs where done")}

    def forget(self, run_ids: Iterable[str]) -> None:
        """Runs that the storage has no directory of any more."""
        with self._writing() as db:
            db.executemany("delete from runs where run_id=? and done", [(run_id,) for run_id in run_ids])

    def cursor(self, run_id: str) -> tuple[int, int]:
        """(events seen, events whose spans were sent): numbers of events, from the first."""
        with self._lock:
            row = self._db.execute("select seen, sent from runs where run_id=?", (run_id,)).fetchone()
        return (int(row[0]), int(row[1])) if row else (0, 0)

    def saw(self, seen: Iterable[tuple[str, int]], alerts: Iterable[tuple[str, str, dict[str, Any]]] = ()) -> None:
        """Events were read, up to a number each; `alerts` (id, sink, body) are to be delivered."""
        with self._writing() as db:
            db.executemany(
                "insert into runs values (?, ?, 0, 0) on conflict do update set seen=max(seen, excluded.seen), done=0",
                list(seen),
            )
            self._enqueue(db, alerts)

    def sent(self, runs: Iterable[tuple[str, int]], files: Iterable[tuple[str, int]] = ()) -> None:
        """Spans of events up to a number each, and of spools up to an offset, were taken by every exporter."""
        with self._writing() as db:
            db.executemany(
                "insert into runs values (?, 0, ?, 0) on conflict do update set sent=max(sent, excluded.sent)",
                list(runs),
            )
            db.executemany("insert or replace into spool values (?, ?)", list(files))

    def finish(self, run_ids: Iterable[str]) -> None:
        """Nothing is left to tell of these runs, unless they are resumed."""
        with self._writing() as db:
            db.executemany("update runs set done=1 where run_id=?", [(run_id,) for run_id in run_ids])

    # Users' spans -----------------------------------------------------------------------------------------------

    def offset(self, file: str) -> int:
        with self._lock:
            row = self._db.execute("select offset from spool where file=?", (file,)).fetchone()
        return int(row[0]) if row else 0

    def drop_spool(self, file: str) -> None:
        with self._writing() as db:
            db.execute("delete from spool where file=?", (file,))

    def hang(self, places: Iterable[tuple[str, str, Sequence[Any]]]) -> None:
        """Users' spans hang from these attempts: (span id, run, place)."""
        with self._writing() as db:
            db.executemany(
                "insert or ignore into places values (?, ?, ?)", [(s, r, json.dumps(list(p))) for s, r, p in places]
            )

    def places(self, run_id: str) -> dict[str, list[Any]]:
        with self._lock:
            rows = self._db.execute("select span_id, place from places where run_id=?", (run_id,)).fetchall()
        return {span: json.loads(place) for span, place in rows}

    def places_of_done(self) -> list[str]:
        """Runs that have ended and still have such attempts."""
        with self._lock:
            sql = "select distinct p.run_id from places p join runs r on r.run_id = p.run_id where r.done"
            return [row[0] for row in self._db.execute(sql)]

    def unhang(self, run_id: str) -> None:
        with self._writing() as db:
            db.execute("delete from places where run_id=?", (run_id,))

    # Alerts -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _enqueue(db: sqlite3.Connection, alerts: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
        rows = [(alert_id, sink, json.dumps(body)) for alert_id, sink, body in alerts]
        db.executemany("insert or ignore into alerts values (?, ?, ?, 0, 0)", rows)

    def enqueue(self, alerts: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
        """Alerts are to be delivered: (id, sink, body). One of the same id and sink is there once."""
        with self._writing() as db:
            self._enqueue(db, alerts)

    def due_alerts(self, now: float, limit: int = 100) -> list[tuple[str, str, dict[str, Any], int]]:
        with self._lock:
            sql = "select id, sink, body, tries from alerts where due <= ? order by due, id limit ?"
            rows = self._db.execute(sql, (now, limit)).fetchall()
        return [(alert_id, sink, json.loads(body), tries) for alert_id, sink, body, tries in rows]

    def waiting_alerts(self) -> int:
        with self._lock:
            return int(self._db.execute("select count(*) from alerts").fetchone()[0])

    def delivered(self, alert_id: str, sink: str) -> None:
        with self._writing() as db:
            db.execute("delete from alerts where id=? and sink=?", (alert_id, sink))

    def postpone(self, alert_id: str, sink: str, due: float) -> None:
        with self._writing() as db:
            db.execute("update alerts set tries=tries+1, due=? where id=? and sink=?", (due, alert_id, sink))

    def remember(self, name: str, value: str) -> None:
        with self._writing() as db:
            db.execute("insert or replace into meta values (?, ?)", (name, value))

    @overload
    def recall(self, name: str) -> str | None: ...

    @overload
    def recall(self, name: str, default: str) -> str: ...

    def recall(self, name: str, default: str | None = None) -> str | None:
        with self._lock:
            row = self._db.execute("select value from meta where name=?", (name,)).fetchone()
        return default if row is None else str(row[0])
