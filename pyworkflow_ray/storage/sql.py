"""SQL over all runs: DuckDB views of live journals and Parquet together. Called by `pw.sql` and the command line.

Journals reach DuckDB through our own reader, as Arrow; Parquet is read by DuckDB itself, as far as the query needs it,
through `checked_files`, which checks every byte. Which runs lie where `listing` knows, so nothing scans history. The
user's SQL can read nothing else: no other file, no network, no Python variable, no setting. Faults: damaged journals
and Parquet (refused, named), runs that are written, finished or compacted while they are read.

Columns (times are UTC timestamps; spans are seconds; `*_at` is NULL where it has not happened):

runs      run_id, run_uid, generation, workflow, version, status (pending running parked paused completed failed
          cancelled), created_at, started_at, finished_at, attributes (JSON), result (JSON; NULL where the value is
          pickled or large), error_kind, error_type, error_message, steps, retries, recoveries, events (their numbers),
          trace_id
events    run_id, seq, epoch, recorded_at, type, position, safe (older versions may ignore it), data (JSON: all of it)
steps     run_id, position, number (1: scheduled first), step, status (queued running retrying waiting completed failed
          cancelled), attempts (those begun, the lost ones excepted), lost, scheduled_at, started_at, ended_at,
          executor, breaker, result (JSON), error_kind, error_type, error_message, why (no attempt follows)
attempts  run_id, position, step, attempt, epoch, dispatch, status (running failed succeeded lost cancelled),
          started_at, ended_at, kind, error_type, message, delay_s (before the next attempt), delay_reason, cause
          (of a loss), breaker (its state when the attempt began), worker, node. Of a step with more than 1,000
          attempts: the first and the last
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import duckdb
import pyarrow as pa

from pyworkflow_ray.errors import ConfigurationError, CorruptJournalError, StorageError
from pyworkflow_ray.storage.checked_files import CheckedFiles, Held, all_sums, url
from pyworkflow_ray.storage.checkpoint import CheckpointChanged, CompactedRuns, with_retries
from pyworkflow_ray.storage.listing import Stock, read_many, stock
from pyworkflow_ray.storage.stocktaking import keep_blocks, known_blocks
from pyworkflow_ray.storage.storage import Storage
from pyworkflow_ray.storage.tables import SCHEMAS, TABLES, Rows

if TYPE_CHECKING:
    from pyworkflow_ray.storage.checkpoint_manifest import ParquetFile
    from pyworkflow_ray.storage.port import StoragePort

_SETTINGS: Final = (
    "SET TimeZone = 'UTC'",
    "SET temp_directory = ''",
    "SET parquet_metadata_cache = true",  # binding and scanning open each file several times
    "SET python_enable_replacements = false",
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
)
_TYPES: Final = {
    pa.string(): "VARCHAR",
    pa.int32(): "INTEGER",
    pa.float64(): "DOUBLE",
    pa.bool_(): "BOOLEAN",
    pa.timestamp("us", "UTC"): "TIMESTAMPTZ",
    pa.json_(pa.string()): "JSON",
}
# An event that holds a redacted value is there, and what it holds is not shown.
_MASKED: Final = (
    "case when contains(data::varchar, '\"redacted\":true') "
    "then json_object('type', type, 'redacted', true) else data end"
)
_UNNAMED: Final = "the view {0} was not built: let its name stand in the SQL, as in: -- {0}"
_LOCKS: Final = ("SET enable_external_access = false", "SET lock_configuration = true")
_TRIES: Final = 20


def query(storage: StoragePort, sql: str) -> duckdb.DuckDBPyRelation:
    """The answer to one query over the views `runs`, `events`, `steps` and `attempts`, as of now.

    The views are a snapshot made by this call, with every event that was acknowledged before it. Checkpoints are read
    when the relation is: a damaged block that the query comes to is then a `duckdb.Error` that names the file.

    Raises:
        ConfigurationError: the SQL is wrong, or is no single query.
        CorruptJournalError: a journal, manifest or Parquet file is damaged; `.path` names it. Nothing is skipped.
    """
    return _ask(storage, sql)[1]


def _ask(storage: StoragePort, sql: str) -> tuple[CheckedFiles | None, duckdb.DuckDBPyRelation]:
    connection = duckdb.connect(":memory:")
    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1 or statements[0].type not in (
            duckdb.StatementType.SELECT,
            duckdb.StatementType.EXPLAIN,
        ):
            raise ConfigurationError("sql takes one query: SELECT, WITH, DESCRIBE, SUMMARIZE, SHOW or EXPLAIN")
        connection.execute("; ".join(_SETTINGS))
        wanted = _named(sql)
        live, compacted, files = _snapshot(storage, wanted)
        with _naming_damage(files):
            _make_views(connection, wanted, live, compacted, files)
            connection.execute("; ".join(_LOCKS))
            return files, connection.sql(sql)
    except duckdb.CatalogException as error:
        raise ConfigurationError(f"sql: {error}\nThe views are {', '.join(TABLES)}") from None
    except duckdb.Error as error:
        raise ConfigurationError(f"sql: {error}") from None


def rows(storage: StoragePort, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Column names and all rows of a query's answer.

    Raises:
        As `query`; ConfigurationError also where the SQL fails on a row, and CorruptJournalError where a damaged block
        is found while checkpoints are read.
    """
    files, relation = _ask(storage, sql)
    try:
        with _naming_damage(files):
            return list(relation.columns), relation.fetchall()
    except duckdb.Error as error:
        raise ConfigurationError(f"sql: {error}") from None


def _named(sql: str) -> list[str]:
    """The views that need to be built: those whose names stand in the text, or all where it may run text as SQL."""
    text = sql.lower()
    return [name for name in TABLES if name in text or "query" in text]


@contextlib.contextmanager
def _naming_damage(files: CheckedFiles | None) -> Iterator[None]:
    """What our files refused, as it was; DuckDB makes a text of it."""
    try:
        yield
    except duckdb.Error:
        if files is not None and files.errors:
            raise files.errors[0] from None
        raise


def prepare(storage: Storage) -> None:
    """Compute the block sums of checkpoint files that have none yet, so that the first query need not.

    The compactor's process does. Raises: as `query`, where a file is damaged.
    """
    found = stock(storage)
    if found.compacted is not None:
        with contextlib.suppress(CheckpointChanged), _missing(found.compacted):
            _sums(storage, found.compacted, found.compacted.files)


# The views --------------------------------------------------------------------------------------------------------


def _make_views(
    connection: duckdb.DuckDBPyConnection,
    wanted: list[str],
    live: Rows,
    compacted: CompactedRuns | None,
    files: CheckedFiles | None,
) -> None:
    """Create the four views. Those not in `wanted` have their columns, and refuse to be read: DuckDB has functions that
    make a name of pieces, and what was not built must not look empty."""
    if files is not None and compacted is not None:
        connection.register_filesystem(files)
        allowed = [url(file) for file in compacted.files if file.table in wanted]
        connection.execute("SET allowed_paths = ?", [allowed])
    statements = ["create schema journals"]
    for name in TABLES:
        columns = SCHEMAS[name]
        if name not in wanted:
            no = f"error('{_UNNAMED.format(name)}')"
            given = ", ".join(f"{no}::{_TYPES[field.type]} as {field.name}" for field in columns)
            statements.append(f"create view {name} as select {given} where {no}::boolean")
            continue
        paths = [url(f) for f in compacted.files if f.table == name] if files is not None and compacted else []
        source = []
        if paths:
            given = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
            source = [f"select {', '.join(columns.names)} from read_parquet([{given}], hive_partitioning = false)"]
        if live.rows.get(name) or not source:
            types = ", ".join(f"{field.name} {_TYPES[field.type]}" for field in columns)
            statements.append(f"create table journals.{name} ({types})")
            source.append(f"select * from journals.{name}")
        shown = f"select * replace ({_MASKED} as data) from " if name == "events" else "from "
        statements.append(f"create view {name} as {shown}({' union all '.join(source)})")
    connection.execute("; ".join(statements))
    for name in (name for name in wanted if live.rows.get(name)):
        connection.register("gathered", live.table(name))
        connection.execute(f"insert into journals.{name} from gathered")
        connection.unregister("gathered")


def _snapshot(storage: StoragePort, wanted: list[str]) -> tuple[Rows, CompactedRuns | None, CheckedFiles | None]:
    """The rows of runs in journals, and the files of the others."""
    if not wanted:
        return Rows([]), None, None
    if not isinstance(storage, Storage):
        return with_retries(lambda: _snapshot_of_bucket(storage, wanted))
    for left in range(_TRIES, 0, -1):
        found: Stock = stock(storage)
        rows = _gather(storage, sorted({*found.journals, *found.damaged}), wanted)
        if found.compacted is None:
            return rows, None, None
        compacted = found.compacted
        try:
            of = [file for file in compacted.files if file.table in wanted]
            with _missing(compacted):
                sums = _sums(storage, compacted, of)
                return rows, compacted, CheckedFiles().serve([(compacted.path(file), file) for file in of], sums)
        except CheckpointChanged:
            if left == 1:
                raise
    raise AssertionError("not reached")


def _snapshot_of_bucket(
    storage: StoragePort, wanted: list[str]
) -> tuple[Rows, CompactedRuns | None, CheckedFiles | None]:
    """Of a bucket: the files that the query names are fetched whole, many at a time, and held while it is answered."""
    found = storage.run_directories()  # before the manifest, so that a run that moves meanwhile is met
    compacted = CompactedRuns(storage)
    if not compacted.files:
        return _gather(storage, found, wanted), None, None
    held = compacted.ids().keys()
    of = [file for file in compacted.files if file.table in wanted]
    with ThreadPoolExecutor(storage.at_once, "fetching") as pool:
        content = list(pool.map(compacted.content, of))
    files = {url(file): Held(compacted.path(file), data) for file, data in zip(of, content, strict=True)}
    rows = _gather(storage, [run_id for run_id in found if run_id not in held], wanted)
    return rows, compacted, CheckedFiles().hold(files)


def _gather(storage: StoragePort, run_ids: list[str], wanted: list[str]) -> Rows:
    rows = Rows(wanted)
    for _, history in read_many(storage, run_ids):  # without those that never came to be, or were forgotten meanwhile
        if isinstance(history, StorageError):
            raise history
        rows.add(history)
    return rows


def _sums(storage: Storage, compacted: CompactedRuns, files: list[ParquetFile]) -> dict[str, bytes]:
    """The block sums of these files: those that the catalogue has, else computed and kept there."""
    sums = known_blocks(storage, files)
    missing = [(compacted.path(file), file) for file in files if file.path not in sums]
    if missing:
        fresh = all_sums(missing)
        keep_blocks(storage, [(file, fresh[file.path]) for _, file in missing])
        sums |= fresh
    return sums


@contextlib.contextmanager
def _missing(compacted: CompactedRuns) -> Iterator[None]:
    """A file that can't be opened was replaced by a compaction, or is damage."""
    try:
        yield
    except FileNotFoundError as error:
        path = str(error.filename)
        if not compacted.current():
            raise CheckpointChanged(f"{path} was replaced meanwhile", path=path) from None
        raise CorruptJournalError(f"{path} is missing: restore it", path=path) from None
    except OSError as error:
        raise StorageError(f"{error.filename} can't be read: {error}", path=str(error.filename)) from error
