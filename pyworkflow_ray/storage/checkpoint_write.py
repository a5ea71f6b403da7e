"""Writing checkpoint files: Parquet sorted by run and seq, with hashes of the file and of its row groups.

Called by `compact` and `compact_live`; calls tables, checkpoint_files, checkpoint_manifest. What is written here counts
only once a manifest names it. Faults: a crash or a full disk at any call; what was written is then removed by the next
compaction.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pyworkflow_ray.storage.checkpoint_files import Files
from pyworkflow_ray.storage.checkpoint_ids import IDS, encode_ids
from pyworkflow_ray.storage.checkpoint_manifest import Batch, Group, IdList, ParquetFile
from pyworkflow_ray.storage.tables import TABLES

# 32,768 events take about 1 MB: a run is read with one or two of them, and SQL leaves out those of other ids.
GROUP_ROWS: Final = 32_768
_FREE_TEXT: Final = ("data", "result", "attributes", "error_message", "message")  # no dictionary, no statistics
_ORDER: Final = {
    "runs": ("run_id",),
    "events": ("run_id", "seq"),
    "steps": ("run_id", "number"),
    "attempts": ("run_id",),
}


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as Parquet: zstd, page checksums."""
    texts = [name for name in table.column_names if name not in _FREE_TEXT]
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        write_page_checksum=True,
        row_group_size=GROUP_ROWS,
        use_dictionary=texts,
        write_statistics=texts,
    )
    return sink.getvalue()


def write_parquet(files: Files, name: str, path: str, table: pa.Table) -> ParquetFile:
    """Publish rows, sorted by run, as the file `path`."""
    data = parquet_bytes(table)
    run_ids = table["run_id"]
    first, last = (run_ids[0].as_py(), run_ids[-1].as_py()) if len(table) else ("", "")
    groups, footer = _groups(data, table) if name in ("events", "live") else ((), (0, ""))
    files.publish(path, data)
    sha = hashlib.sha256(data).hexdigest()
    return ParquetFile(name, path, len(data), sha, table.num_rows, first, last, groups, footer)


def _groups(data: bytes, table: pa.Table) -> tuple[tuple[Group, ...], tuple[int, str]]:
    """Where the row groups lie in a file, and their hashes."""
    metadata = pq.read_metadata(pa.BufferReader(data))
    starts = []
    for number in range(metadata.num_row_groups):
        columns = [metadata.row_group(number).column(i) for i in range(metadata.num_columns)]
        starts.append(min(min(filter(None, (c.dictionary_page_offset, c.data_page_offset))) for c in columns))
    end = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    groups, row = [], 0
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], end], strict=True)):
        rows = metadata.row_group(number).num_rows
        part = table["run_id"]
        sha = hashlib.sha256(data[start:stop]).hexdigest()
        groups.append(Group(start, stop - start, sha, rows, part[row].as_py(), part[row + rows - 1].as_py()))
        row += rows
    return tuple(groups), (end, hashlib.sha256(data[end:]).hexdigest())


def write_batch(files: Files, token: str, date: str, tables: Mapping[str, pa.Table]) -> Batch:
    """Publish the tables of some finished runs of one date, sorted here; they count once a manifest names them."""
    runs = tables["runs"]
    ended = pc.min_max(pc.cast(runs["finished_at"], pa.int64())).as_py()
    written = []
    for name in TABLES:
        table = tables[name].combine_chunks()
        order = pc.sort_indices(table.select(_ORDER[name]), sort_keys=[(key, "ascending") for key in _ORDER[name]])
        written.append(write_parquet(files, name, f"date={date}/{name}-{token}.parquet", take(table, order)))
    return Batch(
        token=token,
        date=date,
        runs=runs.num_rows,
        events=tables["events"].num_rows,
        raw=sum(table.nbytes for table in tables.values()),
        oldest=ended["min"] / 1e6,
        newest=ended["max"] / 1e6,
        files=tuple(written),
    )


def take(table: pa.Table, rows: pa.Array) -> pa.Table:
    """These rows, in this order. JSON columns are taken by their storage: Arrow's kernels don't know the type."""
    columns = []
    for column in table.columns:
        if isinstance(column.type, pa.BaseExtensionType):
            plain = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
            taken = plain.take(rows)
            column = pa.chunked_array([column.type.wrap_array(chunk) for chunk in taken.chunks], column.type)
            columns.append(column)
        else:
            columns.append(column.take(rows))
    return pa.Table.from_arrays(columns, schema=table.schema)


def write_ids(files: Files, token: str, entries: Iterable[int]) -> IdList:
    """Publish a list of ids."""
    data = encode_ids(entries)
    path = f"{IDS}/{token}.ids"
    files.publish(path, data)
    return IdList(path, len(data) // 8, hashlib.sha256(data).hexdigest())
