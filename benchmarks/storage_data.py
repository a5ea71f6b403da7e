"""Large storages in a minute: batches of finished runs written by the compactor's own writers, unfinished runs made one
by one. Called by the benchmarks of listing and SQL.

A template of 1,000 different runs is told event by event, as the engine records them; a batch holds it ten times under
other ids and times. What no benchmark looks at is not renamed: the times inside an event's JSON.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import random
from collections.abc import Iterator
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.storage.checkpoint_ids import id_entry
from pyworkflow_ray.storage.checkpoint_manifest import Batch, Manifest, publish_manifest
from pyworkflow_ray.storage.checkpoint_write import write_batch, write_ids
from pyworkflow_ray.storage.storage import Storage
from pyworkflow_ray.storage.tables import TABLES, Rows

TEMPLATE_RUNS: Final = 1_000
COPIES: Final = 10  # of the template in a batch: 10,000 runs, 100,000 events, near the size that is merged no more
BEGIN: Final = dt.datetime(2026, 9, 1, tzinfo=dt.UTC)
BATCHES_A_DAY: Final = 4
WORKFLOWS: Final = ("shop:checkout", "shop:refund", "mail:newsletter", "data:nightly")
_CODE: Final = ev.CodeRef(how="import", name="flow", module="shop", qualname="flow")
_ENVIRONMENT: Final = ev.CodeEnvironment(key="0" * 32, python="3.11")


@dataclasses.dataclass(slots=True)
class History:
    """What `Rows.add` takes."""

    run_id: str
    events: list[ev.Event]
    epochs: list[int]


def created(storage: Storage, run_id: str, number: int, at: float) -> ev.RunCreated:
    """The first event of a run with three attributes: one of 50 shops, one of 1,000 customers, one flag in 100."""
    return ev.RunCreated(
        seq=0,
        at=at,
        run_id=run_id,
        run_uid=f"{number:032x}",
        storage_id=storage.storage_id,
        workflow=WORKFLOWS[number % len(WORKFLOWS)],
        code=_CODE,
        environment=_ENVIRONMENT,
        args=[ev.Payload(enc="json", data={"order": run_id}, size=30)],
        attributes={"shop": number % 50, "customer": f"c{number * 7919 % 1_000}", "rare": number % 100 == 3},
        trace_id=f"{number:032x}",
    )


def history(storage: Storage, run_id: str, number: int, at: float, rng: random.Random) -> History:
    """A finished run of ten events: two steps, a failed attempt, now and then a failed run."""
    node, worker = f"node-{rng.randrange(8)}", f"{rng.randrange(2**32):08x}"
    error = ev.ErrorInfo(
        kind="transient", type=rng.choice(["ConnectionError", "TimeoutError"]), message=f"no answer from {node}"
    )
    took = rng.random()
    events: list[ev.Event] = [
        created(storage, run_id, number, at),
        ev.RunActivated(at=at, epoch=0, node=node, worker=worker),
        ev.StepScheduled(at=at, position="1", number=1, step="shop:reserve", code=_CODE),
        ev.StepStarted(at=at, position="1", dispatch=1, attempt=1, started_at=at, worker=worker, node=node),
        ev.AttemptFailed(
            at=at + took, position="1", dispatch=1, attempt=1, started_at=at, ended_at=at + took, error=error,
            delay_s=1.0, delay_reason="fixed", worker=worker, node=node,
        ),
        ev.StepCompleted(
            at=at + took + 2, position="1", dispatch=1, attempt=2, started_at=at + took + 1, ended_at=at + took + 2,
            result=ev.Payload(enc="json", data=number, size=4), worker=worker, node=node,
        ),
        ev.StepScheduled(at=at + took + 2, position="2", number=2, step="shop:charge", code=_CODE),
        ev.StepStarted(
            at=at + took + 2, position="2", dispatch=1, attempt=1, started_at=at + took + 2, worker=worker, node=node
        ),
        ev.StepCompleted(
            at=at + took + 3, position="2", dispatch=1, attempt=1, started_at=at + took + 2, ended_at=at + took + 3,
            result=ev.Payload(enc="json", data={"paid": number}, size=12), worker=worker, node=node,
        ),
    ]  # fmt: skip
    if number % 20 == 0:
        events.append(ev.RunCancelled(at=at + 4, reason="enough"))
    else:
        events.append(ev.RunCompleted(at=at + 4, result=ev.Payload(enc="json", data=number, size=4)))
    numbered = [event.model_copy(update={"seq": seq}) for seq, event in enumerate(events)]
    return History(run_id, numbered, [0] * len(numbered))


def add_finished(storage: Storage, runs: int, *, first_batch: int = 0) -> None:
    """Add so many finished, compacted runs (ten events each) in one manifest; a multiple of 1,000 or less than that."""
    files, manifest = storage.checkpoints.files, storage.checkpoints.manifest()
    rows, rng = Rows(), random.Random(1)
    for number in range(min(runs, TEMPLATE_RUNS)):
        at = BEGIN.timestamp() + number * 20
        rows.add(history(storage, f"t-{number:04d}", number, at, rng))
    template = {name: rows.table(name) for name in TABLES}
    batches: list[Batch] = list(manifest.batches)
    entries: list[int] = []
    for number, copies in _batches(runs, first_batch):
        shift = dt.timedelta(days=1) * (number // BATCHES_A_DAY)
        date = (BEGIN + shift).date().isoformat()
        tables = {
            name: pa.concat_tables(
                _copy(template[name], f"b{number:04d}{copy}-", shift, copy) for copy in range(copies)
            )
            for name in TABLES
        }
        token = storage.disk.token()
        batches.append(write_batch(files, token, date, tables))
        entries += [id_entry(run_id, date) for run_id in tables["runs"]["run_id"].to_pylist()]
    if manifest.number < 0:
        publish_manifest(files, storage.storage_id, Manifest(number=0))
    ids = (*manifest.ids, write_ids(files, storage.disk.token(), entries))  # one list, as merging leaves it
    published = dataclasses.replace(manifest, number=max(manifest.number, 0) + 1, batches=tuple(batches), ids=ids)
    publish_manifest(files, storage.storage_id, published)


def _batches(runs: int, first: int) -> Iterator[tuple[int, int]]:
    """(number, copies of the template) of each batch."""
    left = max(1, runs // TEMPLATE_RUNS)
    while left > 0:
        yield first, min(COPIES, left)
        left -= COPIES
        first += 1


def _copy(table: pa.Table, prefix: str, shift: dt.timedelta, copy: int) -> pa.Table:
    """The template's rows under other ids (`prefix` for "t-") and later times."""
    moved = pa.scalar(shift + dt.timedelta(hours=copy), pa.duration("us"))
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name == "run_id":
            column = pc.replace_substring(column, "t-", prefix)
        elif name == "data":
            plain = pa.chunked_array([chunk.storage for chunk in column.chunks], pa.string())
            renamed = pc.replace_substring(plain, '"t-', f'"{prefix}')
            column = pa.chunked_array([column.type.wrap_array(chunk) for chunk in renamed.chunks], column.type)
        elif pa.types.is_timestamp(column.type):
            column = pc.add(column, moved)
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=table.schema)


def add_unfinished(storage: Storage, runs: int, *, lease: str = "", chunk: int = 500) -> None:
    """Make so many runs that have begun and not ended, each in its own journal."""
    at = BEGIN.timestamp() + 40 * 86_400
    for first in range(0, runs, chunk):
        numbers = range(first, min(runs, first + chunk))
        storage.create_runs([created(storage, f"u-{n:06d}", n, at + n) for n in numbers], lease=lease)
        for number in numbers:
            journal, _ = storage.activate(f"u-{number:06d}", lease, first=True)
            journal.append([ev.RunActivated(seq=1, at=at + number, epoch=0, lease=lease)]).result()
            journal.close()
