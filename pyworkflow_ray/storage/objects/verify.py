"""Reads everything that lies in a bucket's storage, and says what is damaged; see `storage.verify`, which calls this.

Calls every reader of the bucket, many objects at a time. Faults: any damage, and runs that go on, end, and are moved
and removed meanwhile.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from pyworkflow_ray.errors import CorruptJournalError, RunNotFoundError, StorageError
from pyworkflow_ray.storage.checked import decode_checked
from pyworkflow_ray.storage.codec_mark import MARK
from pyworkflow_ray.storage.listing import read_many
from pyworkflow_ray.storage.objects import retire
from pyworkflow_ray.storage.objects.probe import STORAGE_KEY
from pyworkflow_ray.storage.objects.storage import ObjectStorage

if TYPE_CHECKING:
    from pyworkflow_ray.storage.verify import Report

_AT_ONCE: Final = 32


def verify_bucket(storage: ObjectStorage, report: Report) -> None:
    """Read all of it into `report`.

    Raises:
        StorageError: the store can't be reached.
    """
    from pyworkflow_ray.storage.verify import read_checkpoints

    refs: dict[str, str] = {}
    _small_objects(storage, report)
    _runs(storage, report, refs)
    read_checkpoints(storage, report, refs)
    _blobs(storage, report, refs)


def _small_objects(storage: ObjectStorage, report: Report) -> None:
    bucket = storage.bucket
    listed = [*storage.wait(bucket.listing("leases/")), *storage.wait(bucket.listing("breakers/"))]
    keys = [STORAGE_KEY, MARK, *(entry.key for entry in listed if entry.key.endswith(".json"))]
    for key, data in _content(storage, keys):
        where = f"{storage.root}/{key}"
        try:
            if data is not None:
                decode_checked(key, data, where)
            elif key == STORAGE_KEY:
                report.add(StorageError(f"{where} is missing: restore it", path=where))
        except StorageError as error:
            report.add(error)
    try:
        storage.wait(retire.read_lists(bucket))
    except CorruptJournalError as error:
        report.add(error)


def _runs(storage: ObjectStorage, report: Report, refs: dict[str, str]) -> None:
    """Every run that has slots and is in no checkpoint; those that are there are read there."""
    from pyworkflow_ray.storage.checkpoint import with_compacted
    from pyworkflow_ray.storage.verify import refs_of

    found = storage.run_directories()
    try:
        held = with_compacted(storage, lambda compacted: compacted.ids().keys())
        mine = [run_id for run_id in found if run_id not in held]
    except StorageError:
        mine = found  # which is told where the checkpoints are read
    unfinished = set(storage.unfinished())
    for run_id, history in read_many(storage, mine):
        report.runs += 1
        if isinstance(history, StorageError):
            report.add(history, run_id)
            continue
        refs.update((ref, run_id) for ref in refs_of(history.events))
        report.open(history.events, run_id)
        if not history.finished and run_id not in unfinished and run_id not in storage.unfinished():
            text = f"run {run_id!r} has not ended, and {storage.root}/active does not name it"
            report.add(CorruptJournalError(text, path=f"{storage.root}/active"), run_id)


def _blobs(storage: ObjectStorage, report: Report, refs: dict[str, str]) -> None:
    """Every blob that is there, and every one that a run names."""
    entries = storage.wait(storage.bucket.listing("blobs/"))
    known = set()
    for key, data in _content(storage, [entry.key for entry in entries]):
        digest = key.rpartition("/")[2]
        if data is None:
            continue
        known.add(digest)
        if hashlib.sha256(data).hexdigest() != digest:
            where = f"{storage.root}/{key}"
            text = f"{where} is damaged: its content has another hash than its name"
            report.add(CorruptJournalError(text, path=where), refs.get(digest))
    for digest, run_id in sorted(refs.items()):
        if digest not in known:
            try:
                storage.get_blob(digest)
            except (StorageError, RunNotFoundError) as error:
                report.add(error, run_id)


def _content(storage: ObjectStorage, keys: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
    left = iter(keys)
    while chunk := list(itertools.islice(left, _AT_ONCE)):
        found = storage.wait(storage.bucket.get_many(chunk))
        for key, one in zip(chunk, found, strict=True):
            yield key, None if one is None else one.data
