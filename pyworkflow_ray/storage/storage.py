"""A storage directory: what lies where, who may open it, runs made, listed, read and handed to their owners.

Called by api, runtime and CLI, in any process and without a lock; calls `journal`, `index`, `checked`, `disk`. Faults:
a crash between any two calls, other processes doing the same, a full disk, damaged and foreign files. Layout:

    storage.json                     storage id and format version
    active/RUN@EPOCH                 the index of unfinished runs: empty files, see `index`
    ended/RUN@EPOCH                  runs that ended and are not in the catalogue yet, see `listing`
    catalogue/                       what listings look into; derived, made anew where it is missing or damaged
    runs/HH/RUN/EPOCH.journal        a directory a run, until it is compacted (HH: two digits of the id's SHA-256)
    blobs/HH/SHA256                  content-addressed bytes: code snapshots, large payloads
    leases/                          see `lease`
    checkpoints/                     compacted runs, see `checkpoint`
    tmp/                             files and directories that have no name yet

A run's directory appears at once with its whole first file (rename of a directory), so of several makers one wins, and
creation can't race with a run that finishes, for finishing moves nothing. Ids of compacted runs: see `checkpoint_ids`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pyworkflow_ray.engine.events import Event, RunCreated
from pyworkflow_ray.errors import (
    ConfigurationError,
    CorruptJournalError,
    RunExistsError,
    RunNotFoundError,
    StorageError,
)
from pyworkflow_ray.failpoints import failpoint
from pyworkflow_ray.ids import check_run_id
from pyworkflow_ray.storage.blobs import Blobs
from pyworkflow_ray.storage.checked import decode_checked
from pyworkflow_ray.storage.checkpoint_files import DiskFiles
from pyworkflow_ray.storage.checkpoint_ids import Checkpoints
from pyworkflow_ray.storage.directory import (
    DIRECTORIES,
    STORAGE_FILE,
    directory_of,
    ensure_directory,
    listing,
    make_storage,
    refuse_headless,
)
from pyworkflow_ray.storage.disk import DISK, Disk
from pyworkflow_ray.storage.epochs import epoch_name
from pyworkflow_ray.storage.index import ActiveIndex
from pyworkflow_ray.storage.journal import (
    FOLD_LIMIT,
    Journal,
    Place,
    View,
    continue_first,
    disk_error,
    first_file,
    fold,
    read_view,
    take_over,
)
from pyworkflow_ray.storage.mounts import network_file_system
from pyworkflow_ray.storage.record import FORMAT_VERSION, chain_start, decode_records, parse_head

if TYPE_CHECKING:
    from pyworkflow_ray.storage.lease import Lease, LeaseStates

logger = logging.getLogger(__name__)

_HEAD_BYTES: Final = 4096  # more than any head takes
_INDEX_TRIES: Final = 100


@dataclass(slots=True, frozen=True)
class Owner:
    """Whose a run is: the newest epoch, and the lease in its file ("": nobody's)."""

    epoch: int
    lease: str


@dataclass(slots=True)
class RunHistory:
    """A run as its journal holds it now.

    torn: the tail of the newest file was cut off by a crash, or is being written at this moment; `detail` says where.
    finished: it has ended, and was not resumed after it.
    settled: the newest epoch has its seal. While it has none (a take-over is under way, or died) the last events may be
        a stale owner's that the seal will leave out: whoever must be certain, of a result say, reads again.
    """

    run_id: str
    events: list[Event]
    epochs: list[int] = field(repr=False)  # the epoch of each event
    epoch: int
    lease: str
    torn: bool
    detail: str
    finished: bool
    settled: bool


class Storage:
    """An open storage directory. Cheap to open, holds no descriptor and no lock, safe to use from any thread.

    Attributes:
        root: absolute path. storage_id: 32 hexadecimal digits, for the life of the directory. checkpoints: which runs
            are compacted.
    """

    at_once: Final = 1  # runs that are worth reading at the same time

    def __init__(self, root: str, storage_id: str, disk: Disk = DISK, fold_limit: int = FOLD_LIMIT) -> None:
        self.root: Final = root
        self.storage_id: Final = storage_id
        self.disk: Final = disk
        self._fold_limit = fold_limit
        self.index: Final = ActiveIndex(disk, f"{root}/active", f"{root}/ended")
        self.blobs: Final = Blobs(disk, root)
        self.checkpoints: Final = Checkpoints(DiskFiles(disk, f"{root}/checkpoints", f"{root}/tmp"), storage_id)
        self._compacted: object = None  # a CompactedRuns, once one is needed

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, create: bool = True, disk: Disk = DISK) -> Storage:
        """Open the storage at `path` (`~` is expanded), making it where it is missing and `create` is true.

        Raises:
            ConfigurationError: `path` is a URL, is on a network file system, is no directory, or holds other files.
            StorageError: it can't be read or made, or a newer version made it.
            CorruptJournalError: `storage.json` is damaged, or missing from a directory that holds runs.
        """
        root = directory_of(path)
        if "\0" in root:
            raise ConfigurationError(f"storage={root!r} is no path")
        kind = network_file_system(root)
        if kind is not None:
            raise ConfigurationError(
                f"storage={root!r} is on a network file system ({kind}), which is not available in this version: "
                "its caches break the fence between two owners. Use a directory on a local disk"
            )
        try:
            content = cls._read_or_make(root, create, disk)
        except OSError as error:
            remedy = "Choose a directory that can be written: --storage, PYWORKFLOW_STORAGE"
            raise disk_error("opening storage", root, error, remedy) from error
        version = content.get("format")
        if version != FORMAT_VERSION:
            raise StorageError(
                f"storage {root} has format {version!r}, this version reads {FORMAT_VERSION}: upgrade pyworkflow-ray",
                path=f"{root}/{STORAGE_FILE}",
            )
        return cls(root, str(content["storage_id"]), disk)

    @staticmethod
    def _read_or_make(root: str, create: bool, disk: Disk) -> dict[str, object]:
        path = f"{root}/{STORAGE_FILE}"
        if not disk.exists(path):
            if not create:
                refuse_headless(root, disk)
                raise StorageError(f"there is no storage at {root}", path=root)
            make_storage(root, disk)
        try:
            return decode_checked(STORAGE_FILE, disk.read(path), path)
        except FileNotFoundError:
            raise StorageError(f"there is no storage at {root}", path=root) from None

    def ensure_directories(self) -> None:
        """Make what a copy of the storage may have lost: directories that were empty."""
        for name in DIRECTORIES:
            ensure_directory(self.disk, f"{self.root}/{name}")

    # Making runs

    def create_run(self, event: RunCreated, *, lease: str = "") -> None:
        """Make one run; it exists, durably, when this returns.

        `lease` owns it: only `activate(run_id, lease, first=True)` continues its first epoch.

        Raises:
            RunExistsError: the id is taken, durably; nothing was written.
            ConfigurationError: the id is no run id; nothing was written.
            StorageError: the disk refused; whether the run exists is unknown, creating it again tells.
        """
        if not self.create_runs([event], lease=lease)[0]:
            raise RunExistsError(f"run {event.run_id!r} exists in {self.root}", run_id=event.run_id)

    def create_runs(self, events: Sequence[RunCreated], *, lease: str = "") -> list[bool]:
        """Make many runs with shared syncs: for each, whether it was made (False: the id is taken, durably).

        All are checked before any is written. Raises as `create_run`, but for RunExistsError.
        """
        for event in events:
            check_run_id(event.run_id)
            if event.storage_id != self.storage_id or event.seq != 0:
                raise ConfigurationError(
                    f"run {event.run_id!r}: run_created has storage id {event.storage_id!r} and seq {event.seq}, "
                    f"needs {self.storage_id!r} and 0"
                )
        fresh: dict[str, bytes] = {}
        chosen = [False] * len(events)
        try:
            for number, event in enumerate(events):
                taken = event.run_id in fresh or self.disk.exists(self.directory(event.run_id))
                if not taken and not self._is_compacted(event.run_id):
                    fresh[event.run_id] = first_file(self.storage_id, event, lease)
                    chosen[number] = True
            self.ensure_directories()
            made = self._publish(fresh)
            # Again: a compaction may have removed the directory between our first look and our rename.
            beside = {run_id for run_id in made if self._is_compacted(run_id)}
            for run_id in beside:
                self._discard(self.directory(run_id))
                self.index.remove(run_id, 0)
            made -= beside
            # A taken id is an answer too: what its maker has not synced yet must not vanish after we gave it.
            for shard in sorted({os.path.dirname(self.directory(event.run_id)) for event in events}):
                self.disk.sync_dir(shard)
            if len(made) < len(events):
                self.disk.sync_dir(f"{self.root}/active")
        except OSError as error:
            raise disk_error("creating runs in", self.root, error, "Nothing was acknowledged; try again") from error
        for run_id in fresh.keys() - made:  # our entry may have come after the winner's run had ended
            with contextlib.suppress(StorageError, RunNotFoundError):  # or it was compacted meanwhile
                self.unlist_finished(run_id)
        return [chosen[number] and event.run_id in made for number, event in enumerate(events)]

    def _publish(self, files: dict[str, bytes]) -> set[str]:
        """Give each run its directory, unless somebody else was faster; which ones are ours. Names are not synced."""
        disk = self.disk
        temporary = {run_id: f"{self.root}/tmp/{disk.token()}" for run_id in files}
        try:
            for run_id, data in files.items():
                self.index.add(run_id, 0)
                disk.mkdir(temporary[run_id])
                disk.write_file(f"{temporary[run_id]}/{epoch_name(0)}", data, sync=False)
                ensure_directory(disk, os.path.dirname(self.directory(run_id)))
            failpoint("create.before_sync")
            # One after another once all are written: the first sync does most of the work for the others.
            for run_id in files:
                disk.sync_file(f"{temporary[run_id]}/{epoch_name(0)}")
                disk.sync_dir(temporary[run_id])
            # The index entry is durable before the run can be seen: a run that exists is never left out of recovery.
            if files:
                disk.sync_dir(f"{self.root}/active")
            failpoint("create.before_rename")
            made = set()
            for run_id in files:
                with contextlib.suppress(FileExistsError):
                    disk.rename(temporary[run_id], self.directory(run_id))
                    made.add(run_id)
            failpoint("create.before_sync_dir")
            for run_id in made:
                del temporary[run_id]
            return made
        finally:
            for path in temporary.values():
                self._discard(path)

    def _discard(self, path: str) -> None:
        with contextlib.suppress(OSError):
            self.disk.unlink(f"{path}/{epoch_name(0)}")
            self.disk.rmdir(path)

    # Reading runs

    def read_run(self, run_id: str) -> RunHistory:
        """The run's history: from any process, at any time, without a lock; of a retired run from its checkpoint.

        Raises:
            RunNotFoundError: no such run here.
            CorruptJournalError: a file of it is damaged; `.path` names its directory.
            StorageError: it can't be read, or a newer version wrote it.
        """
        found = self._read_compacted(run_id)
        if found is not None:
            return found
        try:
            view = self._indexed_view(run_id)
        except (RunNotFoundError, CorruptJournalError):
            found = self._read_compacted(run_id)  # it was compacted meanwhile, and its files removed one by one
            if found is not None:
                return found
            raise
        accepted = view.accepted
        if accepted.torn:
            logger.info("run %s: a torn tail is ignored, %s", run_id, accepted.torn)
        return RunHistory(
            run_id=run_id,
            events=view.events,
            epochs=[epoch for epoch, _ in accepted.records],
            epoch=accepted.newest,
            lease=accepted.lease,
            torn=bool(accepted.torn),
            detail=accepted.torn,
            finished=view.standing.finished,
            settled=accepted.settled,
        )

    def is_retired(self, run_id: str) -> bool:
        """Whether the run's journal has made way for a checkpoint. What is left of it no longer counts.

        Told from 48 bits of the id's hash: False is certain.
        """
        return bool(self.checkpoints.dates(check_run_id(run_id)))

    def _is_compacted(self, run_id: str) -> bool:
        return self._read_compacted(run_id) is not None

    def _read_compacted(self, run_id: str) -> RunHistory | None:
        if not self.is_retired(run_id):
            return None
        from pyworkflow_ray.storage.checkpoint import CheckpointChanged, CompactedRuns  # loads pyarrow: seldom needed

        while True:
            if not isinstance(self._compacted, CompactedRuns) or not self._compacted.current():
                self._compacted = CompactedRuns(self)
            try:
                return self._compacted.read(run_id)
            except RunNotFoundError:
                return None  # two ids look alike, or retention took it
            except CheckpointChanged:
                self._compacted = None

    def _view(self, run_id: str) -> View:
        with self._finding(run_id) as place:
            return read_view(place)

    def _indexed_view(self, run_id: str) -> View:
        """The run's view, which the index must agree with: so the loss of a whole end of its history is noticed.

        An entry is never missing for an unfinished run, and there is one of epoch N only once that epoch has its file.
        """
        view = self._view(run_id)
        for _ in range(_INDEX_TRIES):
            stands, newest = view.standing, view.accepted.newest
            try:
                listed = stands.finished or self.index.has(run_id, stands.since_epoch)
                if listed and not self.index.has(run_id, newest + 1):
                    return view
            except OSError as error:
                raise disk_error("looking into", f"{self.root}/active", error) from error
            again = self._view(run_id)  # it may have ended, or been resumed, between the two looks
            if again.files == view.files:
                break
            view = again
        entry = f"{self.root}/active/{run_id}@{newest + 1 if listed else stands.since_epoch}"
        what = "is there, and no file of that epoch" if listed else "is missing, as of a run that ended"
        path = self.place(run_id).path(newest)
        raise CorruptJournalError(
            f"{path}: the end of run {run_id!r} is lost, or its entry in the index: its history stops at event "
            f"{view.accepted.last_seq}, but {entry} {what}. Restore the run's directory, or the entry",
            path=path,
        )

    @contextlib.contextmanager
    def _finding(self, run_id: str) -> Iterator[Place]:
        """The run's place; RunNotFoundError where there is no run."""
        place = self.place(run_id)
        try:
            yield place
        except FileNotFoundError:
            raise RunNotFoundError(f"no run {run_id!r} in {self.root}", run_id=run_id) from None

    def owner(self, run_id: str) -> Owner:
        """Who holds the run, from the head of its newest file alone."""
        with contextlib.suppress(RunNotFoundError), self._finding(run_id) as place:
            with contextlib.suppress(OSError):  # what can't be read here is read, or named, below
                newest = -1 if self.is_retired(run_id) else place.layout().newest
                data = self.disk.read(place.path(newest), _HEAD_BYTES)
                bodies = decode_records(data, chain_start(self.storage_id, run_id, newest)).bodies
                head = parse_head(bodies[0]) if bodies else None
                if head is not None and (head.run_id, head.epoch) == (run_id, newest):
                    return Owner(newest, head.lease)
        history = self.read_run(run_id)  # says what is wrong, or finds what moved meanwhile
        return Owner(history.epoch, history.lease)

    def list_run_ids(self, finished: bool | None = None) -> list[str]:
        """Ids of all runs, or only of finished or unfinished ones, sorted. Opens no run: damage hides nothing.

        A run that ended in a crash just before it left the index still counts as unfinished.
        """
        if finished is False:
            return self.unfinished()
        ids = set(self.run_directories())
        if finished is True:
            ids -= set(self.unfinished())
        return sorted(ids.union(self._compacted_ids()))

    def run_directories(self) -> list[str]:
        """Ids of the runs that have a directory here, sorted: all but the compacted ones, and what is left of those."""
        try:
            shards = listing(self.disk, f"{self.root}/runs")
            names = {name for shard in shards for name in listing(self.disk, f"{self.root}/runs/{shard}")}
        except OSError as error:
            raise disk_error("listing", self.root, error) from error
        return sorted(filter(_is_run_id, names))

    def _compacted_ids(self) -> Iterable[str]:
        if not self.checkpoints.manifest().batches:
            return ()
        from pyworkflow_ray.storage.checkpoint import with_compacted

        return with_compacted(self, lambda compacted: compacted.ids()).keys()

    def unfinished(self) -> list[str]:
        """Ids of the runs in the index that exist, sorted."""
        try:
            exist = [run_id for run_id in self.index.run_ids() if self.disk.exists(self.directory(run_id))]
            return sorted(run_id for run_id in exist if not self._is_compacted(run_id))
        except OSError as error:
            raise disk_error("listing", self.root, error) from error

    def unfinished_entries(self) -> set[str]:
        """Ids that the index names, whether they exist or not."""
        return self.index.run_ids()

    # Owning runs

    def activate(
        self, run_id: str, lease: str, *, first: bool = False, after: int | None = None
    ) -> tuple[Journal, list[Event]]:
        """Become the owner of a run: its journal, open for appending, and its accepted history.

        Args:
            lease: id of the caller's lease; it stands in the new epoch's file.
            first: continue epoch 0, which `create_run` made for this lease. Its maker hands it out once; whoever does
                not know whether that has happened leaves this false.
            after: begin exactly the epoch after this one, as `orphans` saw it: of several takers one wins.

        Raises:
            FencedError: another owner was faster; the run is not ours.
            RunNotFoundError, CorruptJournalError, StorageError: as `read_run`. Damage is found before anything is
                written.
        """
        entries: set[int] = {0}

        def on_finish(epoch: int) -> None:
            self._unlist(run_id, {entry for entry in entries if entry <= epoch})

        if not first and self._is_compacted(run_id):
            raise RunNotFoundError(f"run {run_id!r} has ended and was compacted: it can't go on", run_id=run_id)
        with self._finding(run_id) as place:
            if first:
                return continue_first(place, lease, on_finish)
            try:
                ensure_directory(self.disk, place.temporary)
            except OSError as error:
                raise disk_error("making", place.temporary, error) from error
            journal, view = take_over(place, lease, on_finish, after=after)
        try:
            stands = view.standing
            entries.add(stands.since_epoch)
            if stands.finished:  # it is resumed: unfinished again before its first new event can be acknowledged
                self.index.add(run_id, journal.epoch)
                self.disk.sync_dir(f"{self.root}/active")
                entries.add(journal.epoch)
        except OSError as error:
            journal.close()
            raise disk_error("listing the run in", f"{self.root}/active", error) from error
        fold(place, view, journal.epoch, self._fold_limit)
        return journal, view.events

    def unlist_finished(self, run_id: str) -> bool:
        """Take a run that has ended out of the index, as `Journal.finish` does; False where it has not ended."""
        try:
            view = self._view(run_id)
        except RunNotFoundError:
            compacted = self._read_compacted(run_id)  # it ended and moved since the caller met it
            if compacted is None:
                raise
            self._unlist(run_id, self.index.entries(run_id, compacted.epoch))
            return True
        if view.standing.finished:
            self._unlist(run_id, {0, view.standing.since_epoch, *self.index.entries(run_id, view.accepted.newest)})
        return view.standing.finished

    def _unlist(self, run_id: str, entries: Iterable[int]) -> None:
        try:
            for entry in sorted(entries):
                self.index.remove(run_id, entry)
        except OSError as error:
            raise disk_error("unlisting the run in", f"{self.root}/active", error) from error

    def retire_run(self, run_id: str) -> None:
        """Remove what is left here of a run that the checkpoints hold durably; in any order, for it does not count.

        Raises:
            StorageError: no checkpoint holds the run, or the disk refused.
        """
        directory = self.directory(run_id)
        if not self._is_compacted(run_id):
            raise StorageError(f"no checkpoint holds run {run_id!r}: its journal can't be retired", path=directory)
        self.remove_directory(run_id)

    def remove_directory(self, run_id: str) -> None:
        """Remove a run's directory, whose content no longer counts. Not durable by itself."""
        directory = self.directory(run_id)
        try:
            failpoint("retire.before_unlink")
            for name in listing(self.disk, directory):
                self.disk.unlink(f"{directory}/{name}")
                failpoint("retire.after_unlink")
            with contextlib.suppress(FileNotFoundError):
                self.disk.rmdir(directory)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # somebody makes a run beside it: whoever looks again finds it
                raise disk_error("retiring", directory, error) from error

    # Leases: see `lease`, which knows how to hold one

    def join_lease(self, lease_id: str | None = None) -> Lease:
        """Hold a new lease, or with `lease_id` one that others made; raises as `Lease.join`."""
        from pyworkflow_ray.storage.lease import Lease

        return Lease.join(self, lease_id)

    def lease_states(self, *, declare: bool) -> LeaseStates:
        """How the leases of the storage stand; see `lease.lease_states`."""
        from pyworkflow_ray.storage.lease import lease_states

        return lease_states(self, declare=declare)

    def is_held(self, lease_id: str) -> bool | None:
        """Whether a living process holds the lease; None where that can't be told."""
        from pyworkflow_ray.storage.lease import is_held

        return is_held(self, lease_id)

    def lost_lease(self, lease_id: str, states: LeaseStates) -> str:
        """Why nobody can tell whether the lease's holders live; "" where one can."""
        from pyworkflow_ray.storage.lease import lost_lease

        return lost_lease(self, lease_id, states)

    # Blobs

    def put_blob(self, data: bytes) -> str:
        """Store bytes durably under their SHA-256, which is returned; storing them again costs a look."""
        return self.blobs.put(data)

    def get_blob(self, digest: str) -> bytes:
        """The bytes stored under `digest`.

        Raises:
            CorruptJournalError: what lies there has another hash.
            StorageError: nothing lies there, or it can't be read.
        """
        return self.blobs.get(digest)

    def put_blob_parts(self, parts: Sequence[memoryview]) -> str:
        """As `put_blob`, of parts laid out as `blobs.layout` says; nothing is copied in this process."""
        return self.blobs.put_parts(parts)

    def open_blob(self, digest: str) -> memoryview:
        """As `get_blob`; a large blob is mapped, not read."""
        return self.blobs.open(digest)

    def keep_blob(self, digest: str) -> bool:
        """Whether the blob is there, asked before a record names it; looked at once an hour."""
        return self.blobs.keep(digest)

    # Paths

    def directory(self, run_id: str) -> str:
        """Where the run's files lie."""
        check_run_id(run_id)
        return f"{self.root}/runs/{hashlib.sha256(run_id.encode()).hexdigest()[:2]}/{run_id}"

    def place(self, run_id: str) -> Place:
        """Where the run's journal lies."""
        return Place(self.disk, self.directory(run_id), f"{self.root}/tmp", self.storage_id, run_id)


def _is_run_id(name: str) -> bool:
    try:
        check_run_id(name)
    except ConfigurationError:
        return False
    return True
