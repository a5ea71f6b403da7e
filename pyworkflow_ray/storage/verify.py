"""Reads everything that lies in a storage, and says what is damaged.

Called by `storage verify`; calls every reader of the storage, and objects.verify for what only a bucket has. Rules:

* Whatever any read would refuse is reported; one damage hides no other. What can't be told from a crash (a torn tail,
  files that no manifest names) is no damage.
* Runs go on, end and are compacted meanwhile: what was seen half-way is looked at again before it is reported.

Faults: any damage, and files that vanish under our hands.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pyworkflow_ray.engine.events import Event
from pyworkflow_ray.errors import CorruptJournalError, RunNotFoundError, StorageError
from pyworkflow_ray.storage.catalogue_check import check, lost_runs
from pyworkflow_ray.storage.checked import decode_checked
from pyworkflow_ray.storage.codec import StorageCodec
from pyworkflow_ray.storage.codec_mark import MARK
from pyworkflow_ray.storage.directory import STORAGE_FILE, listing
from pyworkflow_ray.storage.port import StoragePort
from pyworkflow_ray.storage.revealing import refused
from pyworkflow_ray.storage.stocktaking import catalogue_path
from pyworkflow_ray.storage.storage import Storage

if TYPE_CHECKING:
    from pyworkflow_ray.storage.checkpoint import Holder

_LEASE: Final = re.compile(r"([0-9a-f]{32})\.(lease|dead)")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(slots=True, frozen=True)
class Damage:
    """One thing that a read refuses. run_id: None where it is no run's own."""

    run_id: str | None
    path: str
    error: str


@dataclass(slots=True)
class Report:
    """runs: how many were read. torn: runs whose journal ends in a torn tail, which is no damage."""

    runs: int = 0
    torn: list[str] = field(default_factory=list)
    damaged: list[Damage] = field(default_factory=list)
    codec: StorageCodec | None = None

    def add(self, error: Exception, run_id: str | None = None) -> None:
        path = str(getattr(error, "path", "") or "")
        if not any(one.path == path and path and one.error == str(error) for one in self.damaged):
            self.damaged.append(Damage(run_id, path, str(error)))

    def open(self, events: Iterable[Event], run_id: str) -> None:
        """Report what the codec refuses of a run."""
        if self.codec is not None:
            for error in refused(run_id, events, self.codec):
                self.add(error, run_id)


def verify(storage: StoragePort, codec: StorageCodec | None = None) -> Report:
    """Read all of it. Raises nothing that is damage.

    Args:
        codec: Of a storage that is encrypted: its values are opened, too. None: their bytes are read, no more.
    """
    report = Report(codec=codec)
    refs: dict[str, str] = {}
    if not isinstance(storage, Storage):
        from pyworkflow_ray.storage.objects.storage import ObjectStorage
        from pyworkflow_ray.storage.objects.verify import verify_bucket

        assert isinstance(storage, ObjectStorage)
        verify_bucket(storage, report)
        return report
    _small_files(storage, report)
    unfinished = set(storage.unfinished_entries())
    for run_id in storage.run_directories():
        _journal(storage, run_id, unfinished, report, refs)
    read_checkpoints(storage, report, refs)
    _blobs(storage, report, refs)
    _catalogue(storage, report)
    return report


def _small_files(storage: Storage, report: Report) -> None:
    disk, root = storage.disk, storage.root
    names = [(STORAGE_FILE, STORAGE_FILE), (MARK, MARK)]
    names += [(f"leases/{n}", f"leases/{n}") for n in sorted(listing(disk, f"{root}/leases")) if _LEASE.fullmatch(n)]
    for name, place in names:
        path = f"{root}/{name}"
        try:
            decode_checked(place, disk.read(path), path)
        except FileNotFoundError:
            if name == STORAGE_FILE:
                report.add(StorageError(f"{path} is missing: restore it", path=path))
        except OSError as error:
            report.add(StorageError(f"{path} can't be read: {error}", path=path))
        except StorageError as error:
            report.add(error)


def _journal(storage: Storage, run_id: str, unfinished: set[str], report: Report, refs: dict[str, str]) -> None:
    try:
        if storage.is_retired(run_id):
            return  # read with the checkpoints; should only the hash look alike, it is counted there as missing
        history = storage.read_run(run_id)
    except RunNotFoundError:
        return  # undone, or compacted meanwhile
    except (StorageError, ValueError) as error:
        report.runs += 1
        report.add(error, run_id)
        return
    report.runs += 1
    report.torn += [run_id] if history.torn else []
    refs.update((ref, run_id) for ref in refs_of(history.events))
    report.open(history.events, run_id)
    if not history.finished and run_id not in unfinished and run_id not in storage.unfinished_entries():
        path = f"{storage.root}/active"
        report.add(CorruptJournalError(f"run {run_id!r} has not ended, and {path} does not name it", path=path), run_id)


def read_checkpoints(storage: Holder, report: Report, refs: dict[str, str]) -> None:
    """Every bit of what the manifest names, every event in it, and the manifest itself."""
    try:
        if storage.checkpoints.manifest().number < 0:
            return
        storage.checkpoints.dates("a")  # reads the lists of ids
    except StorageError as error:
        report.add(error)
        return
    from pyworkflow_ray.storage.checkpoint import CheckpointChanged, with_compacted

    def read(compacted: Any) -> None:
        part = Report(codec=report.codec)
        found_refs: dict[str, str] = {}
        for batch in compacted.manifest.batches:
            _batch(storage, compacted, batch, part, found_refs)
        refs.update(found_refs)
        report.runs += part.runs
        report.damaged += part.damaged

    try:
        with_compacted(storage, read)
    except CheckpointChanged as error:
        report.add(error)


def _batch(storage: Holder, compacted: Any, batch: Any, report: Report, refs: dict[str, str]) -> None:
    """Every bit of a batch's files, every event in them, and that their parts agree."""
    from pyworkflow_ray.storage.checkpoint import CheckpointChanged, event_of

    tables: dict[str, Any] = {}
    for file in batch.files:
        try:
            tables[file.table] = compacted.table(file)
        except CheckpointChanged:
            raise
        except StorageError as error:
            report.add(error)
    report.runs += batch.runs
    if "events" not in tables:
        return
    path = next(compacted.path(file) for file in batch.files if file.table == "events")
    counts: Counter[str] = Counter()
    for chunk in tables["events"].to_batches(max_chunksize=10_000):
        for row in chunk.to_pylist():
            run_id = row["run_id"]
            try:
                event = event_of(row, path)
                if event.seq != counts[run_id]:
                    raise CorruptJournalError(f"{path}: run {run_id!r} has no event {counts[run_id]}", path=path)
                refs.update((ref, run_id) for ref in refs_of([event]))
                report.open([event], run_id)
            except StorageError as error:
                report.add(error, run_id)
            counts[run_id] += 1
    if "runs" in tables:
        stated = dict(zip(tables["runs"]["run_id"].to_pylist(), tables["runs"]["events"].to_pylist(), strict=True))
        for run_id in sorted(stated.keys() | counts.keys()):
            if stated.get(run_id) != counts.get(run_id):
                text = f"{path}: run {run_id!r} has {counts.get(run_id)} events, its row says {stated.get(run_id)}"
                report.add(CorruptJournalError(text, path=path), run_id)
            elif batch.date not in storage.checkpoints.dates(run_id) and compacted.current():
                text = f"run {run_id!r} is compacted, and no list of ids names it"
                report.add(CorruptJournalError(text, path=compacted.path(batch.files[0])), run_id)


def _blobs(storage: Storage, report: Report, refs: dict[str, str]) -> None:
    """Every blob that is there, and every one that a run names."""
    disk, root = storage.disk, f"{storage.root}/blobs"
    known = set()
    for shard in sorted(listing(disk, root)):
        for digest in sorted(filter(_DIGEST.fullmatch, listing(disk, f"{root}/{shard}"))):
            path = f"{root}/{shard}/{digest}"
            known.add(digest)
            try:
                if hashlib.sha256(disk.read(path)).hexdigest() != digest:
                    text = f"{path} is damaged: its content has another hash than its name"
                    report.add(CorruptJournalError(text, path=path), refs.get(digest))
            except FileNotFoundError:
                known.discard(digest)
            except OSError as error:
                report.add(StorageError(f"{path} can't be read: {error}", path=path), refs.get(digest))
    for digest, run_id in sorted(refs.items()):
        if digest not in known:
            try:
                storage.get_blob(digest)
            except StorageError as error:
                report.add(error, run_id)


def _catalogue(storage: Storage, report: Report) -> None:
    """What listings look into, against all that was read. It heals, and a run that it knows and nobody has does not."""
    path = catalogue_path(storage)
    try:
        for text in check(storage):
            report.add(StorageError(f"{path}: {text}. Remove {os.path.dirname(path)}: it is made anew", path=path))
        for run_id in lost_runs(storage):
            where = storage.directory(run_id)
            text = f"run {run_id!r} has ended, and {where} is gone. Restore it, or remove {os.path.dirname(path)}"
            report.add(CorruptJournalError(text, path=where), run_id)
    except StorageError as error:
        report.add(error)  # a checkpoint, which is told already


def refs_of(events: Iterable[Event]) -> set[str]:
    """The spilled payloads and code snapshots that events name."""
    return set(_refs([event.model_dump() for event in events]))


def _refs(value: Any) -> Iterator[str]:
    """Every blob of a payload or code reference, at any depth; user data is not looked into."""
    if isinstance(value, dict):
        ref = value.get("ref")
        if isinstance(ref, str) and ("enc" in value or "how" in value):
            yield ref
        if "enc" in value:
            yield from value.get("blobs", ())
        for name, inner in value.items():
            if name not in ("data", "attributes", "details"):
                yield from _refs(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _refs(inner)
