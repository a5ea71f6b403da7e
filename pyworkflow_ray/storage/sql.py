"""SQL over all runs: DuckDB views of live journals and Parquet together. Called by `pw.sql` and the command line.

Journals reach DuckDB through our own reader, as Arrow; Parquet through `checkpoint`, which checks every hash. The
user's SQL can read nothing else: no file, no network, no Python variable, no setting. Faults: damaged journals and
Parquet (refused, named), runs that are written, finished or compacted while they are read.

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

from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pyworkflow_ray.errors import ConfigurationError, CorruptJournalError, RunNotFoundError
from pyworkflow_ray.storage.checkpoint import CompactedRuns
from pyworkflow_ray.storage.tables import SCHEMAS, TABLES, Rows

if TYPE_CHECKING:
    from pyworkflow_ray.storage.storage import Storage

_LOCKS = (
    "SET TimeZone = 'UTC'",
    "SET temp_directory = ''",
    "SET python_enable_replacements = false",
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
    "SET enable_external_access = false",
    "SET lock_configuration = true",
)


def query(storage: Storage, sql: str) -> duckdb.DuckDBPyRelation:
    """The answer to one query over the views `runs`, `events`, `steps` and `attempts`, as of now.

    The views are a snapshot made by this call, with every event that was acknowledged before it.

    Raises:
        ConfigurationError: the SQL is wrong, or is no single query.
        CorruptJournalError: a journal, manifest or Parquet file is damaged; `.path` names it. Nothing is skipped.
    """
    connection = duckdb.connect(":memory:")
    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1 or statements[0].type not in (
            duckdb.StatementType.SELECT,
            duckdb.StatementType.EXPLAIN,
        ):
            raise ConfigurationError("sql takes one query: SELECT, WITH, DESCRIBE, SUMMARIZE, SHOW or EXPLAIN")
        # A name can't be used without standing in the text: what is not named need not be built.
        wanted = [name for name in TABLES if name in sql.lower()]
        for name, table in snapshot(storage, wanted).items():
            connection.register(name, table)
        for setting in _LOCKS:
            connection.execute(setting)
        return connection.sql(sql)
    except duckdb.Error as error:
        raise ConfigurationError(f"sql: {error}") from None


def snapshot(storage: Storage, wanted: list[str]) -> dict[str, pa.Table]:
    """The tables as Arrow; those not in `wanted` are empty.

    Raises:
        CorruptJournalError: something is damaged, or a retired run is in no checkpoint.
    """
    tables = {name: SCHEMAS[name].empty_table() for name in TABLES}
    if not wanted:
        return tables
    run_ids = storage.list_run_ids()
    rows, live = Rows(wanted), set()
    for run_id in run_ids:
        if not storage.is_retired(run_id):
            try:
                history = storage.read_run(run_id)
            except RunNotFoundError:
                continue  # never came to be, or was retired meanwhile
            rows.add(history)
            live.add(run_id)
    # The manifests after the journals: a run retired meanwhile is in one of them.
    compacted = CompactedRuns(storage)
    known = compacted.ids()
    for run_id in run_ids:
        if run_id not in live and run_id not in known and storage.is_retired(run_id):
            path = f"{storage.root}/checkpoints/manifests"
            raise CorruptJournalError(f"run {run_id!r} was compacted, and no manifest in {path} holds it", path=path)
    both = pa.array(sorted(live & known.keys()), pa.string())  # their journals count
    for name in wanted:
        parts = [rows.table(name)]
        for file in compacted.files:
            if file.table == name:
                table = compacted.table(file)
                parts.append(table.filter(pc.invert(pc.is_in(table["run_id"], both))) if len(both) else table)
        tables[name] = pa.concat_tables(parts)
    return tables
