"""What SQL reads of checkpoints: only what it needs, never a byte that is not as it was written, whatever goes on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import duckdb
import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.errors import ConfigurationError, CorruptJournalError
from pyworkflow_ray.storage import checked_files
from pyworkflow_ray.storage.checked_files import BLOCK
from pyworkflow_ray.storage.compact import Rules, compact
from pyworkflow_ray.storage.sql import prepare, query, rows
from pyworkflow_ray.storage.storage import Storage
from tests.journals import FaultyDisk, created, ended

EVERYTHING = "select run_id, seq, epoch, recorded_at, type, position, safe, data from events order by all"


def add_runs(storage: Storage, first: int, number: int, size: int = 1500) -> None:
    """Finished runs whose events do not compress."""
    rng = random.Random(first)
    events = [
        created(f"run-{n:03d}", storage.storage_id, attributes={"noise": rng.randbytes(size).hex(), "n": n})
        for n in range(first, first + number)
    ]
    storage.create_runs(events)
    for event in events:
        journal, _ = storage.activate(event.run_id, "", first=True)
        journal.append([ev.RunActivated(seq=1, at=2.0, epoch=0), ended(2)]).result()
        journal.finish()


@pytest.fixture
def compacted(storage: Storage) -> Storage:
    add_runs(storage, 0, 60)
    assert compact(storage).runs == 60
    return storage


def file_of(storage: Storage, table: str) -> Path:
    (path,) = Path(storage.root, "checkpoints").rglob(f"{table}-*.parquet")
    return path


def test_a_flipped_bit_in_any_block_is_refused_when_it_is_read(compacted: Storage) -> None:
    before = rows(compacted, EVERYTHING)
    path = file_of(compacted, "events")
    whole = path.read_bytes()
    assert len(whole) > 5 * BLOCK
    rng = random.Random(1)
    for start in range(0, len(whole), BLOCK):
        data = bytearray(whole)
        data[min(len(data) - 1, start + rng.randrange(BLOCK))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(CorruptJournalError, match=path.name) as caught:
            rows(compacted, EVERYTHING)
        assert caught.value.path == str(path)
    path.write_bytes(whole)
    assert rows(compacted, EVERYTHING) == before


def test_damage_is_found_while_a_relation_is_read(compacted: Storage) -> None:
    relation = query(compacted, "select max(length(data)) from events")
    path = file_of(compacted, "events")
    data = bytearray(path.read_bytes())
    data[3 * BLOCK] ^= 8
    path.write_bytes(data)  # the same file: it is written over
    with pytest.raises(duckdb.Error, match=f"{path.name} is damaged"):
        relation.fetchall()


@pytest.mark.parametrize("table", ["runs", "events", "steps", "attempts"])
def test_damage_is_found_before_anything_is_read_of_a_file_met_first(compacted: Storage, table: str) -> None:
    path = file_of(compacted, table)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptJournalError, match=path.name):
        query(compacted, f"select count(*) from {table}")


@pytest.mark.parametrize("change", ["cut", "longer", "gone"])
def test_a_file_of_another_length_or_none_is_refused(compacted: Storage, change: str) -> None:
    rows(compacted, EVERYTHING)
    path = file_of(compacted, "events")
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if change == "cut" else path.read_bytes() + b"PAR1")
    if change == "longer":  # what follows is never looked at
        assert len(rows(compacted, EVERYTHING)[1]) == 180
    else:
        with pytest.raises(CorruptJournalError, match=path.name):
            rows(compacted, EVERYTHING)


def test_only_what_a_query_needs_is_read(compacted: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(compacted)
    read: list[int] = []
    original = checked_files._pread
    monkeypatch.setattr(
        checked_files, "_pread", lambda fd, length, start: read.append(length) or original(fd, length, start)
    )
    whole = file_of(compacted, "events").stat().st_size
    assert rows(compacted, "select type, count(*) from events group by all order by all")[1] == [
        ("run_activated", 60), ("run_completed", 60), ("run_created", 60),
    ]  # fmt: skip
    assert 0 < sum(read) < whole / 2
    narrow = sum(read)
    rows(compacted, EVERYTHING)
    assert sum(read) - narrow > whole / 2


def test_no_journal_is_read_for_compacted_runs(tmp_path: Path) -> None:
    disk = FaultyDisk()
    storage = Storage.open(tmp_path / "counted", disk=disk)
    add_runs(storage, 0, 20, size=10)
    compact(storage)
    add_runs(storage, 20, 1, size=10)
    rows(storage, "select count(*) from runs")
    touched: list[str] = []

    def note(call: str, what: Any) -> None:
        if isinstance(what, str) and what.startswith(f"{storage.root}/runs/"):
            touched.append(what)

    disk.fault = note
    assert rows(storage, "select count(*) from runs")[1] == [(21,)]
    assert touched
    assert all("/run-020" in path for path in touched)


def test_a_compaction_meanwhile_changes_nothing_for_a_relation(storage: Storage) -> None:
    for first in range(0, 50, 10):
        add_runs(storage, first, 10, size=10)
        if first < 40:
            compact(storage, Rules())
    relation = query(storage, EVERYTHING)
    before = {path for path in Path(storage.root, "checkpoints").rglob("*.parquet")}
    compact(storage)
    assert not before <= {path for path in Path(storage.root, "checkpoints").rglob("*.parquet")}
    found = relation.fetchall()
    assert len(found) == 150
    assert found == rows(storage, EVERYTHING)[1]


def test_results_come_as_arrow_pandas_and_polars(compacted: Storage) -> None:
    sql = "select run_id, seq, recorded_at, data from events order by run_id, seq limit 5"
    expected = [row[:2] for row in rows(compacted, sql)[1]]
    table = query(compacted, sql).to_arrow_table()
    assert list(zip(table["run_id"].to_pylist(), table["seq"].to_pylist(), strict=True)) == expected
    frame = query(compacted, sql).df()
    assert list(zip(frame["run_id"], frame["seq"], strict=True)) == expected
    assert str(frame["recorded_at"].dt.tz) == "UTC"
    polars = query(compacted, sql).pl()
    assert list(zip(polars["run_id"], polars["seq"], strict=True)) == expected


@pytest.mark.parametrize(
    "sql",
    [
        "from read_parquet('checkpoint://../storage.json')",
        "from read_parquet('checkpoint://*/*.parquet')",
        "from read_blob('{root}/storage.json')",
        "from read_parquet('{root}/checkpoints/*/*.parquet')",
        "from glob('checkpoint://*')",
        "from glob('{root}/*')",
        "copy (from events) to 'checkpoint://{file}'",
        "copy (from events) to 'checkpoint://new.parquet' (format parquet)",
        "set allowed_paths = ['/etc/passwd']",
        "set allowed_directories = ['/']",
        "pragma enable_external_access",
        "select getenv('HOME') from events",
        "from sqlite_scan('{root}/catalogue/runs-1.sqlite', 'runs')",
        "insert into journals.events from events",
        "update runs set status = 'completed'",
        "with x as (delete from journals.runs returning 1) from x",
        "prepare q as select 1",
        "call pragma_version()",
        "export database '{root}/out'",
        "use journals",
        "create temp table x as from runs",
    ],
)
def test_hostile_sql_reaches_no_other_file(compacted: Storage, sql: str) -> None:
    names = sorted(str(path) for path in Path(compacted.root).rglob("*"))
    given = sql.format(root=compacted.root, file=f"date=1970-01-01/{file_of(compacted, 'events').name}")
    with pytest.raises((ConfigurationError, duckdb.Error)):
        print(query(compacted, given).fetchall())
    assert set(names) <= {str(path) for path in Path(compacted.root).rglob("*")}
    assert not Path(compacted.root, "out").exists()
