"""The catalogue: what listings ask, in one SQLite file. Derived from the journals and checkpoints, never the truth.

Called by `listing`, which fills it; calls sqlite3 alone. Rules:

* A row an ended run, under its *kind* (workflow and status) and its time of creation; a *tag* for each of its
  attributes, with the same order. So every page of every filter is a few ranges of one index, read from the end.
* Rows carry a check of their own; a row that fails it, an index that names no row, and errors of SQLite raise
  `DamagedCatalogue`, and `listing` makes the file anew. What a damaged index page hides is found by `damage`, which
  reads everything.
* A commit is durable when it returns (WAL, synchronous=FULL): `listing` forgets a run's entry in `ended` after it.
* Several processes read while one writes; who may write is decided by `listing`'s lock, not here.

Faults: a crash at any time (SQLite rolls back), a full disk, a read-only file system, damage, other processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from urllib.parse import quote

FORMAT: Final = 1
ABSENT: Final = ""  # no JSON text: the attribute is not there

_BUSY_S: Final = 30.0
_PROBE: Final = 10_000  # of two tags the rarer leads; beyond so many both count as frequent
_BROKEN: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH}

_TABLES: Final = """
create table meta (name text primary key, value text not null) without rowid;
create table kinds (
    id integer primary key, workflow text not null, status text not null, sum integer not null,
    unique (workflow, status)
);
create table parts (id integer primary key, path text not null unique);
create table runs (
    run_id text primary key, kind integer not null, created integer not null, attributes text not null, part integer,
    sum integer not null
) without rowid;
create table tags (
    tag integer not null, kind integer not null, created integer not null, run_id text not null,
    primary key (tag, kind, created, run_id)
) without rowid;
create table live (
    run_id text primary key, created integer not null, workflow text not null, attributes text not null,
    status text not null, stamp text not null, sum integer not null
) without rowid;
create table damaged (run_id text primary key, message text not null, sum integer not null) without rowid;
create table blocks (
    path text primary key, sha256 text not null, sums blob not null, sum integer not null
) without rowid;
"""
_INDEXES: Final = """
create index runs_of_kind on runs (kind, created, run_id);
create index runs_of_part on runs (part) where part is not null;
create index runs_in_journals on runs (run_id) where part is null;
"""


class DamagedCatalogue(Exception):
    """The file is not what was written. Caught by `listing`: the catalogue is made anew."""


class Row(NamedTuple):
    """One run as a listing knows it. created: microseconds since 1970. part: the checkpoint that holds it, or None."""

    run_id: str
    created: int
    workflow: str
    status: str
    attributes: str
    part: int | None = None

    @property
    def key(self) -> tuple[int, str]:
        """The order of listings, oldest first: by time of creation, then by id."""
        return (self.created, self.run_id)


class LiveRow(NamedTuple):
    """An unfinished run as it was when its files had `stamp` ("": look again)."""

    run: Row
    stamp: str


@dataclass(slots=True, frozen=True)
class Query:
    """Which runs are meant. Pure.

    statuses: None for all. workflow: whole name, or what follows its colon. attributes: for each name the JSON texts
    that do (see `canonical`; ABSENT: also where it is not there). since: created at it or later, in microseconds.
    before: older than this key.
    """

    statuses: frozenset[str] | None = None
    workflow: str | None = None
    attributes: tuple[tuple[str, frozenset[str]], ...] = ()
    since: int | None = None
    before: tuple[int, str] | None = None

    def takes_kind(self, workflow: str, status: str) -> bool:
        if self.statuses is not None and status not in self.statuses:
            return False
        return self.workflow is None or self.workflow in (workflow, workflow.rpartition(":")[2])

    def takes(self, row: Row) -> bool:
        """Whether it takes the run, by all that a row holds."""
        if not self.takes_kind(row.workflow, row.status):
            return False
        if (self.since is not None and row.created < self.since) or (
            self.before is not None and row.key >= self.before
        ):
            return False
        if not self.attributes:
            return True
        found = attribute_texts(row.attributes)
        return all(found.get(name, ABSENT) in texts for name, texts in self.attributes)


def canonical(value: Any) -> str:
    """JSON by which attributes are compared: 1 and 1.0 are equal, 1 and true are not; keys have no order."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def attribute_texts(attributes: str) -> dict[str, str]:
    """Each attribute's value as `canonical` writes it."""
    return {name: canonical(value) for name, value in json.loads(attributes).items()} if attributes != "{}" else {}


def _tag(name: str, text: str) -> int:
    """64 bits for an attribute and its value; two in 2**64 look alike, so rows that it finds are looked at."""
    digest = hashlib.blake2b(f"{name}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _tags(row: Row) -> set[int]:
    return {_tag(name, text) for name, text in attribute_texts(row.attributes).items()}


def _sum(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


@contextlib.contextmanager
def _noticing() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)  # none: what was read is no UTF-8
        is_broken = isinstance(error, sqlite3.OperationalError) if code is None else code & 0xFF in _BROKEN
        if is_broken or isinstance(error, sqlite3.InternalError):
            raise DamagedCatalogue(str(error)) from error
        raise
    except (ValueError, TypeError, KeyError, OverflowError) as error:  # a text that is no text, a number that is one
        raise DamagedCatalogue(str(error)) from error


@dataclass
class Catalogue:
    """An open catalogue. For one thread; open another elsewhere. Every method may raise DamagedCatalogue."""

    connection: sqlite3.Connection
    kinds: dict[int, tuple[str, str]] = field(default_factory=dict)

    # Opening ------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str, storage_id: str) -> Catalogue:
        """A new, empty one at `path`, not durable before `seal`; ":memory:" for one that nobody else sees."""
        connection = _connect(f"file:{quote(path)}?mode=rwc" if path != ":memory:" else path)
        connection.execute("pragma journal_mode = off")
        connection.execute("pragma synchronous = off")
        connection.execute("pragma cache_size = -65536")
        connection.executescript(_TABLES)
        meta = [("format", str(FORMAT)), ("storage_id", storage_id)]
        connection.executemany("insert into meta values (?, ?)", meta)
        connection.execute("begin")
        return cls(connection)

    def seal(self) -> None:
        """End the making of a new one: its indexes, and the mode in which others read it. Its file is not synced."""
        with _noticing():
            self.connection.executescript(_INDEXES)
            self.connection.execute("pragma journal_mode = wal")

    @classmethod
    def open(cls, path: str, storage_id: str) -> Catalogue | None:
        """The one at `path`; None where there is none.

        Raises:
            DamagedCatalogue: it is damaged, of another storage, or of another version.
            sqlite3.Error: it can't be opened, on a read-only file system say.
        """
        try:
            with _noticing():
                file = inode(path)
                connection = _connect(f"file:{quote(path)}?mode=rw")
                catalogue = cls(connection)
                try:
                    connection.execute("pragma synchronous = full")
                    meta = dict(connection.execute("select name, value from meta").fetchall())
                    if meta != {"format": str(FORMAT), "storage_id": storage_id}:
                        raise DamagedCatalogue(f"{path} is of another version or storage")
                    connection.execute("begin")  # all that is asked from here on is of one moment
                    catalogue.read_kinds()
                    if inode(path) != file:  # SQLite may have read the old file with the log of the new one
                        raise DamagedCatalogue(f"{path} was replaced while it was opened")
                except BaseException:
                    connection.close()
                    raise
                return catalogue
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_CANTOPEN:
                return None
            raise

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self.connection.close()

    def read_kinds(self) -> None:
        rows = self.connection.execute("select id, workflow, status, sum from kinds").fetchall()
        for *kind, check in rows:
            if check != _sum(*kind):
                raise DamagedCatalogue(f"the row of kind {kind[0]} fails its check")
        self.kinds = {number: (workflow, status) for number, workflow, status, _ in rows}

    # Asking -------------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, int]:
        """Checkpoint files of runs that it holds, by path."""
        with _noticing():
            return dict(self.connection.execute("select path, id from parts").fetchall())

    def damaged(self) -> dict[str, str]:
        with _noticing():
            found = {}
            for run_id, message, check in self.connection.execute("select * from damaged order by run_id"):
                if check != _sum(run_id, message):
                    raise DamagedCatalogue(f"the row of damaged run {run_id!r} fails its check")
                found[run_id] = message
            return found

    def live(self) -> dict[str, LiveRow]:
        with _noticing():
            found = {}
            for run_id, created, workflow, attributes, status, stamp, check in self.connection.execute(
                "select run_id, created, workflow, attributes, status, stamp, sum from live"
            ):
                if check != _sum(run_id, created, workflow, attributes, status, stamp):
                    raise DamagedCatalogue(f"the row of unfinished run {run_id!r} fails its check")
                found[run_id] = LiveRow(Row(run_id, created, workflow, status, attributes), stamp)
            return found

    def live_in_parts(self) -> set[str]:
        """Ids that stand as unfinished and that a checkpoint holds."""
        with _noticing():
            # A cross join keeps the order: a look at each unfinished run, not at each of millions that ended.
            sql = "select l.run_id from live l cross join runs r on r.run_id = l.run_id where r.part is not null"
            return {run_id for (run_id,) in self.connection.execute(sql)}

    def run(self, run_id: str) -> Row | None:
        """An ended run."""
        with _noticing():
            found = self.connection.execute(
                "select run_id, kind, created, attributes, part, sum from runs where run_id = ?", (run_id,)
            ).fetchone()
            return None if found is None else self._row(found)

    def in_journals(self) -> list[str]:
        """Ids of the ended runs that no checkpoint holds, sorted."""
        with _noticing():
            rows = self.connection.execute("select run_id from runs where part is null order by run_id").fetchall()
            return [run_id for (run_id,) in rows]

    def runs_of(self, part: int) -> int:
        """How many runs it has of a checkpoint file."""
        with _noticing():
            return int(self.connection.execute("select count(*) from runs where part = ?", (part,)).fetchone()[0])

    def newest(self, query: Query) -> Iterator[Row]:
        """Ended runs that `query` takes, newest first, read as they are asked for."""
        with _noticing():
            kinds = [number for number, kind in self.kinds.items() if query.takes_kind(*kind)]
            lead, others = self._leading_tags(query)
            ranges = [self._range(query, kind, tag, others) for kind in kinds for tag in lead]
            last = None
            for key in heapq.merge(*ranges, reverse=True):
                if key != last:  # two values of one attribute, as text and as number say, may be one run's
                    if last is not None and key > last:
                        raise DamagedCatalogue(f"the index has {key} after {last}")
                    last = key
                    row = self.run(key[1])
                    if row is None or row.key != key:
                        raise DamagedCatalogue(f"the index has {key}, which is no run's")
                    if query.takes(row):
                        yield row

    def _leading_tags(self, query: Query) -> tuple[Sequence[int | None], list[list[int]]]:
        """The tags to go along, and those to look for beside them: of each attribute that has to be there."""
        wanted = [
            [_tag(name, text) for text in sorted(texts)] for name, texts in query.attributes if ABSENT not in texts
        ]
        if not wanted:
            return [None], []
        if len(wanted) > 1:
            count = "select count(*) from (select 1 from tags where tag = ? limit ?)"
            sizes = [
                sum(self.connection.execute(count, (tag, _PROBE)).fetchone()[0] for tag in tags) for tags in wanted
            ]
            wanted.insert(0, wanted.pop(sizes.index(min(sizes))))
        return wanted[0], wanted[1:]

    def _range(self, query: Query, kind: int, tag: int | None, others: list[list[int]]) -> Iterator[tuple[int, str]]:
        sql, values = ("select created, run_id from runs t where kind = ?", [kind])
        if tag is not None:
            sql, values = ("select created, run_id from tags t where tag = ? and kind = ?", [tag, kind])
        if query.since is not None:
            sql, values = f"{sql} and created >= ?", [*values, query.since]
        if query.before is not None:
            sql, values = f"{sql} and (created, run_id) < (?, ?)", [*values, *query.before]  # type: ignore[list-item]
        for tags in others:
            marks = ", ".join("?" for _ in tags)
            sql += (
                f" and exists (select 1 from tags o where o.tag in ({marks}) and o.kind = t.kind"
                " and o.created = t.created and o.run_id = t.run_id)"
            )
            values = [*values, *tags]
        return self.connection.execute(f"{sql} order by created desc, run_id desc", values)

    def _row(self, found: tuple[str, int, int, str, int | None, int]) -> Row:
        run_id, kind, created, attributes, part, check = found
        if kind not in self.kinds:
            raise DamagedCatalogue(f"the row of run {run_id!r} names no kind")
        row = Row(run_id, created, *self.kinds[kind], attributes, part)
        if check != _sum(*row):
            raise DamagedCatalogue(f"the row of run {run_id!r} fails its check")
        return row

    def block_sums(self, path: str, sha256: str) -> bytes | None:
        """What `put_blocks` was given for the file, if its content has this hash."""
        with _noticing():
            found = self.connection.execute("select sha256, sums, sum from blocks where path = ?", (path,)).fetchone()
            if found is None or found[0] != sha256:
                return None
            if found[2] != _sum(path, sha256, zlib.crc32(found[1])):
                raise DamagedCatalogue(f"the block sums of {path!r} fail their check")
            return bytes(found[1])

    def damage(self) -> list[str]:
        """What SQLite's own full check, and each row's, find: everything is read."""
        with _noticing():
            found = [text for (text,) in self.connection.execute("pragma integrity_check") if text != "ok"]
            tags = 0
            for values in self.connection.execute("select run_id, kind, created, attributes, part, sum from runs"):
                row = self._row(values)
                mine = _tags(row)
                tags += len(mine)
                for tag in mine:
                    key = (tag, values[1], row.created, row.run_id)
                    sql = "select 1 from tags where tag = ? and kind = ? and created = ? and run_id = ?"
                    if self.connection.execute(sql, key).fetchone() is None:
                        found.append(f"run {row.run_id!r} can't be found by one of its attributes")
            if tags != self.connection.execute("select count(*) from tags").fetchone()[0]:
                found.append("attributes find runs that have none of them")
            self.live()
            self.damaged()
            for path, sha256 in self.connection.execute("select path, sha256 from blocks").fetchall():
                self.block_sums(path, sha256)
            return found

    # Filling ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """One commit, durable at its end; nothing of it where anything raises."""
        with _noticing():
            if self.connection.in_transaction:
                self.connection.execute("commit")
            self.connection.execute("begin immediate")
            try:
                self.read_kinds()
                yield
                self.connection.execute("commit")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self.connection.execute("rollback")
                self.read_kinds()
                raise

    def put(self, rows: Iterable[Row]) -> None:
        """Have these ended runs stand as they are given."""
        for row in rows:
            before = self.run(row.run_id)
            if before != row:
                if before is not None and before._replace(part=row.part) == row:
                    self.connection.execute(
                        "update runs set part = ?, sum = ? where run_id = ?", (row.part, _sum(*row), row.run_id)
                    )
                    continue
                if before is not None:
                    self._remove(before)
                self.add([row])

    def add(self, rows: Iterable[Row]) -> None:
        """As `put`, of runs that it surely does not hold."""
        runs, tags = [], []
        for row in rows:
            kind = self._kind(row.workflow, row.status)
            runs.append((row.run_id, kind, row.created, row.attributes, row.part, _sum(*row)))
            tags += [(tag, kind, row.created, row.run_id) for tag in _tags(row)]
        self.connection.executemany("insert into runs values (?, ?, ?, ?, ?, ?)", runs)
        self.connection.executemany("insert into tags values (?, ?, ?, ?)", tags)

    def forget(self, run_ids: Iterable[str]) -> None:
        """Leave out these runs, whatever they were."""
        for run_id in run_ids:
            row = self.run(run_id)
            if row is not None:
                self._remove(row)
            self.connection.execute("delete from live where run_id = ?", (run_id,))
            self.forget_damaged(run_id)

    def _remove(self, row: Row) -> None:
        kind = self._kind(row.workflow, row.status)
        self.connection.executemany(
            "delete from tags where tag = ? and kind = ? and created = ? and run_id = ?",
            [(tag, kind, row.created, row.run_id) for tag in _tags(row)],
        )
        self.connection.execute("delete from runs where run_id = ?", (row.run_id,))

    def _kind(self, workflow: str, status: str) -> int:
        for number, kind in self.kinds.items():
            if kind == (workflow, status):
                return number
        number = max(self.kinds, default=0) + 1
        values = (number, workflow, status, _sum(number, workflow, status))
        self.connection.execute("insert into kinds values (?, ?, ?, ?)", values)
        self.kinds[number] = (workflow, status)
        return number

    def add_part(self, path: str) -> int:
        return int(self.connection.execute("insert into parts (path) values (?)", (path,)).lastrowid or 0)

    def remove_part(self, number: int) -> list[str]:
        """Forget a checkpoint file; the ids of the runs that it still held."""
        self.connection.execute("delete from parts where id = ?", (number,))
        rows = self.connection.execute("select run_id from runs where part = ?", (number,)).fetchall()
        return [run_id for (run_id,) in rows]

    def put_live(self, rows: Iterable[LiveRow]) -> None:
        values = [(r.run_id, r.created, r.workflow, r.attributes, r.status, stamp) for r, stamp in rows]
        self.connection.executemany(
            "insert or replace into live values (?, ?, ?, ?, ?, ?, ?)", [(*value, _sum(*value)) for value in values]
        )

    def keep_live(self, run_ids: set[str]) -> None:
        """Forget all unfinished runs but these."""
        known = {run_id for (run_id,) in self.connection.execute("select run_id from live")}
        self.connection.executemany("delete from live where run_id = ?", [(run_id,) for run_id in known - run_ids])

    def forget_damaged(self, run_id: str) -> None:
        self.connection.execute("delete from damaged where run_id = ?", (run_id,))

    def put_damaged(self, run_id: str, message: str) -> None:
        values = (run_id, message, _sum(run_id, message))
        self.connection.execute("insert or replace into damaged values (?, ?, ?)", values)

    def put_blocks(self, path: str, sha256: str, sums: bytes) -> None:
        check = _sum(path, sha256, zlib.crc32(sums))
        self.connection.execute("insert or replace into blocks values (?, ?, ?, ?)", (path, sha256, sums, check))

    def keep_blocks(self, paths: Iterable[str]) -> None:
        """Forget the block sums of all other files."""
        known = {path for (path,) in self.connection.execute("select path from blocks")}
        gone = [(path,) for path in known - set(paths)]
        self.connection.executemany("delete from blocks where path = ?", gone)


def inode(path: str) -> int | None:
    """Which file lies at `path` now; None where there is none."""
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None


def _connect(database: str) -> sqlite3.Connection:
    connection = sqlite3.connect(database, uri=True, isolation_level=None, timeout=_BUSY_S, check_same_thread=False)
    connection.execute("pragma cell_size_check = on")
    return connection
