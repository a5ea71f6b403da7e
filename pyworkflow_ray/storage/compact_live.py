"""Closed epochs of a run that goes on, as Parquet: written by a compaction, read by whoever reads or resumes the run.

Called by `compact` and, for runs that have a marker, by `journal`; calls journal, checkpoint_write. Rules:

* An epoch is closed for good once a newer one has its seal durable, and no newer one still followed: every later owner
  finds that seal. Its owner may live and append to the newest epoch meanwhile; nobody waits.
* The rows are what the seals accepted, byte for byte. The marker `K.checkpoint` in the run's directory holds the
  sealed part of every epoch up to K and the file's SHA-256; a reader holds both against the seal above.
* Order: the file, the manifest that names it, the marker, and then the journals of these epochs are removed, and older
  markers. A crash leaves what readers ignore; the next compaction removes it.

Faults: a crash between any two calls; the run is taken over, folded, ended or read meanwhile; damaged files.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import os
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pyworkflow_ray.engine.events import RunCreated
from pyworkflow_ray.errors import CorruptJournalError
from pyworkflow_ray.failpoints import failpoint
from pyworkflow_ray.storage.checked import decode_checked, encode_checked
from pyworkflow_ray.storage.checkpoint import event_body_of
from pyworkflow_ray.storage.checkpoint_files import Files
from pyworkflow_ray.storage.checkpoint_manifest import LivePrefix, file_from
from pyworkflow_ray.storage.checkpoint_write import write_parquet
from pyworkflow_ray.storage.epochs import Base, Layout, fold_name, marker_name
from pyworkflow_ray.storage.journal import Place, View, read_view
from pyworkflow_ray.storage.record import Part
from pyworkflow_ray.storage.tables import SCHEMAS, Row, event_row

LIVE: str = "live"


# Reading ----------------------------------------------------------------------------------------------------------


def read_base(place: Place, last: int, marker: bytes) -> Base:
    """The epochs that the marker of `last` stands for.

    Raises:
        CorruptJournalError: marker or file is damaged.
        FileNotFoundError: the marker is gone meanwhile: list the directory again.
    """
    content = read_marker(place, last, marker)
    file = file_from(content["file"])
    path = f"{os.path.dirname(place.temporary)}/checkpoints/{file.path}"
    try:
        data = place.disk.read(path)
    except FileNotFoundError:
        if place.layout().checkpoint != last:
            raise
        raise CorruptJournalError(f"{path} is missing: restore it", path=path) from None
    if len(data) != file.bytes or hashlib.sha256(data).hexdigest() != file.sha256:
        raise CorruptJournalError(
            f"{path} is damaged: its content has another SHA-256 than the marker of run {place.run_id!r} says",
            path=path,
        )
    table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True, partitioning=None)
    rows = table.select(["seq", "epoch", "safe", "data"]).to_pylist()
    records = tuple((row["epoch"], event_body_of(row)) for row in rows)
    return Base(last=last, parts=tuple(Part(**part) for part in content["parts"]), records=records)


def read_marker(place: Place, last: int, data: bytes) -> dict[str, Any]:
    """The content of a marker: run id, `last`, sealed parts, and the file with its hash."""
    name = marker_name(last)
    path = f"{place.directory}/{name}"
    return decode_checked(f"runs/{place.run_id}/{name} of {place.storage_id}", data, path)


# Writing ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Closed:
    """Closed epochs of one run, ready to be written: all up to `last`, with what was sealed of each."""

    place: Place
    view: View
    last: int

    @property
    def rows(self) -> list[Row]:
        """The events as they lie in the records, byte for byte: the seals speak of these bytes."""
        rows = []
        for (epoch, body), event in zip(self.view.accepted.records, self.view.events, strict=True):
            if epoch <= self.last:
                text = body[body.index(b'"event":') + len(b'"event":') : -1].decode()
                rows.append((*event_row(self.place.run_id, event, epoch)[:-1], text))
        return rows


def closed_epochs(place: Place, at_least: int) -> Closed | None:
    """The run's closed epochs, where `at_least` bytes of them lie in journals. None: leave the run alone.

    Raises:
        RunNotFound, CorruptJournalError, StorageError: as `read_view`. OSError: the disk refused.
    """
    view = read_view(place)
    newest = view.layout.newest
    in_journals = sum(len(data) for epoch, data in view.files.items() if epoch < newest)
    if not view.accepted.settled or in_journals < at_least or newest - 1 <= view.layout.checkpoint:
        return None
    # The seal that closes them may lie in the page cache only, or be one that a newer owner has not seen.
    place.disk.sync_old_epoch(place.path(newest))
    again = read_view(place, view)
    if again.layout.newest != newest or not again.accepted.settled or again.accepted.sealed != view.accepted.sealed:
        return None
    return Closed(place, again, newest - 1)


def write_closed(files: Files, token: str, closed: Closed) -> LivePrefix:
    """Publish the rows; they count once a manifest names them and the marker stands."""
    created = closed.view.events[0]
    assert isinstance(created, RunCreated)
    date = dt.datetime.fromtimestamp(created.at, dt.UTC).date().isoformat()
    schema = SCHEMAS["events"]
    columns = zip(*closed.rows, strict=True)
    arrays = [pa.array(column, type=kind) for column, kind in zip(columns, schema.types, strict=True)]
    table = pa.Table.from_arrays(arrays, schema=schema)
    file = write_parquet(files, LIVE, f"date={date}/{LIVE}-{token}.parquet", table)
    return LivePrefix(closed.place.run_id, closed.last, file)


def mark(closed: Closed, prefix: LivePrefix) -> None:
    """Let the checkpoint count, durably, and remove the journals that it stands for."""
    place, name = closed.place, marker_name(closed.last)
    sealed = closed.view.accepted.sealed
    content = {
        "run_id": place.run_id,
        "last": closed.last,
        "parts": [sealed[epoch].model_dump() for epoch in range(closed.last + 1)],
        "file": dataclasses.asdict(prefix.file),
    }
    temporary = f"{place.temporary}/{place.disk.token()}"
    place.disk.write_file(temporary, encode_checked(f"runs/{place.run_id}/{name} of {place.storage_id}", content))
    try:
        failpoint("live.before_link")
        place.disk.link(temporary, f"{place.directory}/{name}")
    finally:
        place.disk.unlink(temporary)
    failpoint("live.before_sync_dir")
    place.disk.sync_dir(place.directory)
    sweep(place, place.layout())


def sweep(place: Place, layout: Layout) -> None:
    """Remove what a marker stands for: epochs, folds and older markers inside its range."""
    if layout.checkpoint < 0:
        return
    names = [f"{epoch}.journal" for epoch in layout.epochs if epoch <= layout.checkpoint]
    names += [fold_name(*fold) for fold in layout.folds if fold[1] <= layout.checkpoint]
    older = [name for name in place.disk.listdir(place.directory) if name.endswith(".checkpoint")]
    names += [name for name in older if name != marker_name(layout.checkpoint)]
    for name in sorted(names):
        failpoint("live.before_unlink")
        place.disk.unlink(f"{place.directory}/{name}")
