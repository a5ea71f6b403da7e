"""One SQL answer over journals and Parquet, and nothing else within the query's reach."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from pyworkflow_ray.errors import ConfigurationError, CorruptJournalError
from pyworkflow_ray.storage.compact import compact
from pyworkflow_ray.storage.sql import query, rows
from pyworkflow_ray.storage.storage import Storage
from pyworkflow_ray.storage.tables import SCHEMAS

ALL = {
    "runs": "select * from runs order by run_id",
    "events": "select * from events order by run_id, seq",
    "steps": "select * from steps order by run_id, position",
    "attempts": "select * from attempts order by run_id, position, epoch, dispatch, attempt",
}


def answers(storage: Storage) -> dict[str, list[Any]]:
    return {name: query(storage, sql).fetchall() for name, sql in ALL.items()}


def test_rows_are_the_same_before_and_after_compaction(storage: Storage, make_run: Any) -> None:
    for name in ("a", "b"):
        make_run(name)
    make_run("f", end="failed")
    make_run("r", end="running")
    before = answers(storage)
    assert [len(rows) for rows in before.values()] == [4, 31, 4, 8]
    assert compact(storage).runs == 2
    assert answers(storage) == before


def test_rows_tell_the_run(storage: Storage, make_run: Any) -> None:
    at = 1_790_000_000.0
    make_run("a", at=at)
    (row,) = query(storage, "select * from runs").fetchall()
    run = dict(zip(SCHEMAS["runs"].names, row, strict=True))
    assert (run["run_id"], run["workflow"], run["status"], run["events"]) == ("a", "m:flow", "completed", 8)
    assert (run["steps"], run["retries"], run["recoveries"]) == (1, 1, 1)
    assert run["finished_at"] == dt.datetime.fromtimestamp(at + 7, dt.UTC)
    assert json.loads(run["result"]) == {"paid": True}
    tenant = query(storage, "select attributes->>'tenant' from runs").fetchall()
    assert tenant == [("a\u00e9'\"; drop table runs; --",)]
    attempts = "select attempt, status, error_type, delay_s, worker from attempts order by attempt"
    assert query(storage, attempts).fetchall() == [
        (1, "failed", "ConnectionError", 1.5, "w1"),
        (2, "succeeded", None, None, ""),
    ]
    joined = "select step, s.status, count(e.seq) from steps s join events e using (run_id, position) group by all"
    assert query(storage, joined).fetchall() == [("m:charge", "completed", 4)]


def test_run_in_both_journal_and_parquet_counts_once(
    storage: Storage, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("a")
    before = answers(storage)
    # A crash between manifest and retirement, which tests/crash makes for real.
    monkeypatch.setattr(Storage, "remove_directory", lambda self, run_id: None)
    compact(storage)
    monkeypatch.undo()
    assert storage.run_directories() == ["a"]
    assert answers(storage) == before
    assert compact(storage).retired == 1
    assert answers(storage) == before


def test_empty_storage_has_empty_views(storage: Storage) -> None:
    assert answers(storage) == {"runs": [], "events": [], "steps": [], "attempts": []}
    assert query(storage, "show tables").fetchall() == [("attempts",), ("events",), ("runs",), ("steps",)]


@pytest.mark.parametrize(
    "sql",
    [
        "select count(*) from query_table('ru' || 'ns')",
        "select * from query('select count(*) from ru' || 'ns')",
        "select count(*) from RUNS",
        'select count(*) from main."Runs"',
    ],
)
def test_view_whose_name_is_made_of_pieces_is_whole(storage: Storage, make_run: Any, sql: str) -> None:
    make_run("a")
    make_run("b")
    compact(storage)
    make_run("c")
    assert query(storage, sql).fetchall() == [(3,)]


@pytest.mark.parametrize("where", ["", " where status = 'completed'", " where steps is null and result is null"])
def test_view_that_was_not_built_refuses_to_look_empty(storage: Storage, make_run: Any, where: str) -> None:
    make_run("a")
    plan = "json_serialize_sql('select count(*) from xuns" + where.replace("'", "''") + "')::varchar"
    hidden = f"select * from json_execute_serialized_sql(replace({plan}, 'xuns', 'ru' || 'ns'))"
    with pytest.raises(duckdb.Error, match="the view runs was not built"):
        query(storage, hidden).fetchall()
    assert query(storage, hidden + " -- runs").columns == ["count_star()"]


def test_sql_that_fails_on_a_row_is_refused(storage: Storage, make_run: Any) -> None:
    make_run("a")
    with pytest.raises(ConfigurationError, match="sql: Conversion Error"):
        rows(storage, "select cast(run_id as integer) from runs")


def test_damaged_journal_is_named_and_not_skipped(storage: Storage, make_run: Any) -> None:
    make_run("a")
    make_run("b")
    path = next(Path(storage.root, "runs").rglob("a/0.journal"))
    data = bytearray(path.read_bytes())
    data[50] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptJournalError, match=r"'a'|/a"):
        query(storage, "select count(*) from runs")


@pytest.mark.parametrize(
    "sql",
    [
        "select * from read_text('{path}')",
        "select * from read_csv('{path}')",
        "select * from read_blob('{path}')",
        "select * from '{path}'",
        "select * from glob('{path}*')",
        "from read_json('{path}')",
        "from read_parquet('https://example.invalid/x.parquet')",
        "from frame",
        "copy (select 1) to '{path}.csv'",
        "attach '{path}.db'",
        "install httpfs",
        "load httpfs",
        "set enable_external_access = true",
        "create table x as select 1",
        "drop view runs",
        "delete from runs",
        "select 1; select 2",
        "select * from nothing",
        "selec",
        "",
    ],
)
def test_query_reaches_nothing_but_the_views(storage: Storage, tmp_path: Path, sql: str) -> None:
    here = tmp_path / "secret.txt"
    here.write_text("secret")
    frame = pa.table({"secret": [1]})  # DuckDB would find it by its name
    assert duckdb.connect().sql("from frame").fetchall() == frame.num_rows * [(1,)]
    with pytest.raises(ConfigurationError, match=r"^sql"):
        query(storage, sql.format(path=here)).fetchall()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.txt", "storage"]


def test_an_unknown_table_is_told_with_the_views_that_there_are(storage: Storage) -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)nope.*The views are runs, events, steps, attempts$"):
        query(storage, "select * from nope")
