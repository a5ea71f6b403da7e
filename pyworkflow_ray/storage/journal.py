"""A run's append-only journal: taking it over, appending with the fence, folding old epochs.

Called by `storage` (which hands out journals) and by the run actor; calls `epochs` and `record` (pure) and `disk`.
Faults it lives with: a crash between any two calls; another owner doing the same at the same time, even one that was
stopped for hours and goes on; a write or fdatasync that fails, after which the file is abandoned and the next epoch
begun. The protocol, with its proofs in tests/property/test_fence_model.py:

* take over: create the next epoch's file exclusively, with its head (the lease) already in it; sync the directory;
  list it, and give up if anything newer is there; read; fdatasync the epochs that no seal covers; write the seal.
* append: write, fdatasync, list the directory. Acknowledged only if no newer epoch is there.
* nobody writes to, or truncates, another owner's file.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, Literal

from pyworkflow_ray.engine.events import Event, RunCreated, RunFailed
from pyworkflow_ray.errors import CorruptJournalError, FencedError, PyWorkflowError, StorageError
from pyworkflow_ray.failpoints import failpoint
from pyworkflow_ray.storage.disk import Disk
from pyworkflow_ray.storage.epochs import (
    Accepted,
    Base,
    Layout,
    Standing,
    assemble,
    decode_fold,
    encode_fold,
    epoch_name,
    fold_name,
    fold_plan,
    marker_name,
    parse_events,
    read_names,
    standing,
)
from pyworkflow_ray.storage.record import (
    Head,
    Seal,
    chain_start,
    encode_record,
    event_body,
    head_body,
    seal_body,
)

logger = logging.getLogger(__name__)

FOLD_LIMIT: Final = 64
RETIRED: Final = "compacted"  # the lease under which a compaction takes a run that has ended, for good
_READ_TRIES: Final = 100
_LARGE_BYTES: Final = 2**20


@dataclass(slots=True, frozen=True)
class Place:
    """Where one run's journal lies: its directory, a directory for temporary files beside it, and whose it is."""

    disk: Disk
    directory: str
    temporary: str
    storage_id: str
    run_id: str

    def path(self, epoch: int) -> str:
        return f"{self.directory}/{epoch_name(epoch)}"

    def layout(self) -> Layout:
        return read_names(self.disk.listdir(self.directory))


@dataclass(slots=True)
class View:
    """One consistent reading of a run's files."""

    layout: Layout
    files: dict[int, bytes]
    accepted: Accepted
    events: list[Event]
    marker: bytes = b""  # of the epochs in a checkpoint, and those
    base: Base | None = None

    @property
    def retired(self) -> bool:
        """Whether a compaction has taken the run, which has ended: it never goes on."""
        return self.accepted.lease == RETIRED and self.standing.finished

    @property
    def standing(self) -> Standing:
        return standing(zip((epoch for epoch, _ in self.accepted.records), self.events, strict=True))


def disk_error(what: str, path: str, error: OSError, remedy: str = "") -> StorageError:
    """`error` as ours: what was done, where, why, and the way out."""
    text = f"{what} {path} failed: {error.strerror or error}"
    return StorageError(f"{text}. {remedy}" if remedy else text, path=path)


# Reading ----------------------------------------------------------------------------------------------------------


def read_view(place: Place, known: View | None = None) -> View:
    """The run's history as it is now. Takes no lock; `known` saves parsing what has not changed since.

    Raises:
        CorruptJournalError: twice in a row the same files held the same damage (once may be a file seen half-way).
        StorageError: a file can't be read, or was written by a newer version.
    """
    suspect: dict[int, bytes] | None = None
    for _ in range(_READ_TRIES):
        layout = _list(place)
        try:
            files = _read_files(place, layout)
            marker, base = _read_base(place, layout, known)
            # An epoch begun after this second look reads all that we read, so nothing of it can vanish again.
            if _list(place).newest != layout.newest:
                continue
        except FileNotFoundError:
            continue  # folded away between listing and reading: list again
        except OSError as error:
            raise disk_error("reading", place.directory, error) from error
        if known is not None and files == known.files and marker == known.marker:
            return View(layout, files, known.accepted, known.events, marker, base)
        try:
            with _no_collection(sum(map(len, files.values()))):
                before = known.accepted if known is not None else None
                accepted = assemble(files, place.storage_id, place.run_id, base, before)
                events = parse_events(accepted, place.storage_id, place.run_id, known)
            return View(layout, files, accepted, events, marker, base)
        except CorruptJournalError as error:
            if files == suspect:
                path = _damaged_path(place, layout, error.path)
                raise CorruptJournalError(f"{path}: {error}", path=path) from None
            suspect = files
    raise StorageError(f"{place.directory} changed during each of {_READ_TRIES} readings", path=place.directory)


def _list(place: Place) -> Layout:
    """The files; FileNotFoundError where there is no directory of the run."""
    try:
        return place.layout()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise disk_error("reading", place.directory, error) from error


def _damaged_path(place: Place, layout: Layout, name: str) -> str:
    """The file that holds the epoch whose own file would be `name`; the directory where that is not known."""
    if not name:
        return place.directory
    epoch = int(name.partition(".")[0])
    folds = [fold_name(*fold) for fold in layout.outer_folds() if fold[0] <= epoch <= fold[1]]
    return f"{place.directory}/{folds[0] if folds else name}"


def _read_files(place: Place, layout: Layout) -> dict[int, bytes]:
    files: dict[int, bytes] = {}
    for first, last in layout.outer_folds():
        data = place.disk.read(f"{place.directory}/{fold_name(first, last)}")
        try:
            files.update(decode_fold(first, last, data, place.storage_id, place.run_id))
        except CorruptJournalError as error:  # a fold has its name only once it is whole
            path = f"{place.directory}/{fold_name(first, last)}"
            raise CorruptJournalError(f"{path}: {error}", path=path) from None
    for epoch in layout.plain():
        files[epoch] = place.disk.read(place.path(epoch))
    return files


@contextlib.contextmanager
def _no_collection(size: int) -> Iterator[None]:
    """No garbage collection while a long history is decoded: it makes objects by the hundred thousand, none of them
    garbage, and half of the time went into walking them. At the end they join the oldest generation, unwalked."""
    if size < _LARGE_BYTES or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()
        gc.enable()


def _read_base(place: Place, layout: Layout, known: View | None) -> tuple[bytes, Base | None]:
    """The marker of the epochs that lie in a checkpoint, and those."""
    if layout.checkpoint < 0:
        return b"", None
    marker = place.disk.read(f"{place.directory}/{marker_name(layout.checkpoint)}")
    if known is not None and known.marker == marker:
        return marker, known.base
    from pyworkflow_ray.storage.compact_live import read_base  # loads pyarrow, which few runs need

    return marker, read_base(place, layout.checkpoint, marker)


def first_file(storage_id: str, event: RunCreated, lease: str) -> bytes:
    """Content of a new run's epoch 0: head and `run_created`."""
    head = Head(storage_id=storage_id, run_id=event.run_id, epoch=0, lease=lease)
    head_line, chain = encode_record(head_body(head), chain_start(storage_id, event.run_id, 0))
    event_line, _ = encode_record(event_body(event, 0), chain)
    return head_line + event_line


# Owning -----------------------------------------------------------------------------------------------------------


class Journal:
    """One epoch of one run, open for appending by its owner. Used from one thread.

    Attributes:
        epoch, lease, run_id: whose journal this is.
        last_seq: seq of the last acknowledged event.
        state: "open"; "fenced" (another owner took over); "abandoned" (a write or sync failed: begin the next epoch
            with `Storage.activate`); "closed".
    """

    def __init__(
        self, place: Place, epoch: int, lease: str, fd: int, chain: int, last_seq: int, on_finish: Callable[[int], None]
    ) -> None:
        self.epoch: Final = epoch
        self.lease: Final = lease
        self.run_id: Final = place.run_id
        self.last_seq = last_seq
        self.state: Literal["open", "fenced", "abandoned", "closed"] = "open"
        self._place = place
        self._fd = fd
        self._chain = chain
        self._on_finish = on_finish
        self._harmless: list[str] = []  # the last listing of the directory: nothing in it overtakes this epoch

    def append(self, events: Sequence[Event]) -> Future[int]:
        """Write `events` as one commit; the future holds the durable seq, or why there is none.

        It is already done when it is returned: on a local disk waiting costs less than a thread. A commit is not
        atomic: after a crash any prefix of it may be there.

        The future's exception is PayloadError or ValueError (an event can't be written, or is out of order: nothing was
        written and the journal stays open), FencedError, or StorageError (abandoned, nothing was acknowledged).
        """
        future: Future[int] = Future()
        try:
            future.set_result(self._append(events))
        except (PyWorkflowError, ValueError) as error:
            future.set_exception(error)
        return future

    def _append(self, events: Sequence[Event]) -> int:
        if self.state != "open":
            raise self._refusal()
        lines, chain, seq = [], self._chain, self.last_seq
        for event in events:
            seq += 1
            if event.seq != seq:
                raise ValueError(f"run {self.run_id!r}: event {event.type!r} has seq {event.seq}, the next is {seq}")
            line, chain = encode_record(event_body(event, self.epoch), chain)
            lines.append(line)
        if lines:
            self._commit(b"".join(lines))
            self._chain, self.last_seq = chain, seq
        return seq

    def _commit(self, data: bytes) -> None:
        """Durable and still the owner, or an exception and never used again."""
        disk = self._place.disk
        try:
            failpoint("journal.before_write")
            disk.write(self._fd, data)
            failpoint("journal.before_sync")
            disk.fdatasync(self._fd)
            failpoint("journal.before_fence")
            names = disk.listdir(self._place.directory)
        except OSError as error:
            self._drop("abandoned")
            raise disk_error(
                "appending to",
                self._place.path(self.epoch),
                error,
                "Nothing of this commit was acknowledged; the run goes on in a new epoch once writes succeed",
            ) from error
        except BaseException:  # an interrupt: what the file holds is not known, and the next record would not follow it
            self._drop("abandoned")
            raise
        if names != self._harmless:  # a listing that was looked at before needs no second look
            if read_names(names).overtakes(self.epoch):
                self._drop("fenced")
                raise self._refusal()
            self._harmless = names
        failpoint("journal.before_ack")

    def _refusal(self) -> StorageError:
        path = self._place.path(self.epoch)
        if self.state == "fenced":
            return FencedError(
                f"run {self.run_id!r}: epoch {self.epoch} is over, another owner has begun a newer one; "
                "what was appended is not acknowledged and this owner must stop",
                path=path,
            )
        return StorageError(f"run {self.run_id!r}: the journal of epoch {self.epoch} is {self.state}", path=path)

    def _drop(self, state: Literal["fenced", "abandoned", "closed"]) -> None:
        if self.state == "open":
            self.state = state
            try:
                self._place.disk.close(self._fd)
            except OSError:
                pass  # what counts was synced, and checked, before

    def close(self) -> None:
        """Stop appending; the run stays as it is."""
        self._drop("closed")

    def finish(self) -> None:
        """Close the journal of a run that has ended and take the run out of the unfinished ones. Idempotent.

        Call it once the terminal event is acknowledged. A crash before it leaves a finished run among the unfinished;
        whoever finds it there (`orphans`) does this.
        """
        self._drop("closed")
        self._on_finish(self.epoch)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def continue_first(place: Place, lease: str, on_finish: Callable[[int], None]) -> tuple[Journal, list[Event]]:
    """Epoch 0 for the one run actor it is handed to; see `Storage.activate`."""
    try:
        fd = place.disk.open_append(place.path(0))
    except FileNotFoundError:
        read_view(place)  # says what is there instead
        raise _handed_out(place) from None
    except OSError as error:
        raise disk_error("opening", place.path(0), error) from error
    try:
        if not place.disk.try_lock(fd):
            raise FencedError(f"run {place.run_id!r}: epoch 0 is being written by another owner", path=place.path(0))
        view = read_view(place)  # under the lock: another owner may have written and gone
        if view.layout.newest > 0 or len(view.events) != 1 or view.accepted.torn:
            raise _handed_out(place)
        found = view.accepted.lease
        if found != lease:
            raise FencedError(
                f"run {place.run_id!r}: epoch 0 belongs to lease {found!r}, not {lease!r}", path=place.path(0)
            )
        return Journal(place, 0, lease, fd, view.accepted.chain, 0, on_finish), view.events
    except BaseException:
        place.disk.close(fd)
        raise


def _handed_out(place: Place) -> FencedError:
    return FencedError(f"run {place.run_id!r}: epoch 0 was handed out before, begin the next one", path=place.path(0))


def take_over(
    place: Place, lease: str, on_finish: Callable[[int], None], *, after: int | None = None
) -> tuple[Journal, View]:
    """Begin the next epoch (or exactly `after` + 1); see `Storage.activate`."""
    before = read_view(place)  # damage is found before anything is written
    if before.retired:
        raise FencedError(
            f"run {place.run_id!r} has ended and was taken for its checkpoint: it can't go on", path=place.directory
        )
    if after is not None and before.layout.newest != after:
        raise FencedError(
            f"run {place.run_id!r}: its newest epoch is {before.layout.newest}, not {after}: another owner has it",
            path=place.directory,
        )
    return _begin(place, lease, on_finish, before)


def _begin(place: Place, lease: str, on_finish: Callable[[int], None], before: View) -> tuple[Journal, View]:
    """Begin the epoch after those that `before` shows."""
    mine = before.layout.newest + 1
    try:
        chain = _claim(place, mine, lease)
        view = _settle_earlier(place, before, mine)
        seal = Seal(parts=[part for part in view.accepted.open_parts if part.epoch != mine])
        line, chain = encode_record(seal_body(seal), chain)
        fd = place.disk.open_append(place.path(mine))
    except OSError as error:
        raise disk_error("beginning", place.path(mine), error, "The run stays as it was; try again") from error
    journal = Journal(place, mine, lease, fd, chain, view.accepted.last_seq, on_finish)
    failpoint("epoch.before_seal")
    journal._commit(line)
    return journal, view


def _claim(place: Place, mine: int, lease: str) -> int:
    """Create the epoch's file with its head; the chain after it. FencedError where somebody else was faster."""
    disk = place.disk
    head = Head(storage_id=place.storage_id, run_id=place.run_id, epoch=mine, lease=lease)
    line, chain = encode_record(head_body(head), chain_start(place.storage_id, place.run_id, mine))
    temporary = f"{place.temporary}/{disk.token()}"
    disk.write_file(temporary, line)
    try:
        failpoint("epoch.before_link")
        disk.link(temporary, place.path(mine))
    except FileExistsError:
        raise _lost(place, mine) from None
    finally:
        disk.unlink(temporary)
    failpoint("epoch.before_sync_dir")
    disk.sync_dir(place.directory)
    if place.layout().newest != mine:
        # A fold or another epoch reaches the number: it was not free. The file stays, for a newer seal may name it;
        # inside a fold's range readers ignore it.
        raise _lost(place, mine)
    return chain


def _settle_earlier(place: Place, before: View, mine: int) -> View:
    """What the epochs before `mine` hold, now that no append to them is acknowledged any more; durable.

    Read first, then synced: a stale owner may write between the two, and what is sealed must be safe. Then compared
    with what the disk gives back: after a failed write-back the page cache shows what the disk does not hold.
    """
    known = before
    for _ in range(_READ_TRIES):
        view = read_view(place, known)
        if view.layout.newest != mine:
            raise _lost(place, mine)
        kept = True
        for part in view.accepted.open_parts:
            if part.epoch != mine:
                failpoint("epoch.before_sync_old")
                try:
                    place.disk.sync_old_epoch(place.path(part.epoch))
                    again = place.disk.read(place.path(part.epoch))
                except FileNotFoundError:
                    raise _lost(place, mine) from None  # only a newer owner folds an epoch away
                kept = kept and again.startswith(view.accepted.prefixes[part.epoch])
        if kept:
            return view
        known = view
    raise StorageError(f"{place.directory}: the disk does not keep what was written", path=place.directory)


def _lost(place: Place, mine: int) -> FencedError:
    return FencedError(f"run {place.run_id!r}: another owner was faster than epoch {mine}", path=place.path(mine))


def make_final(place: Place) -> View | None:
    """Take a run that has ended, so that nobody continues it, and its history as the disk holds it; for a compaction.

    None where it goes on after all. Done again after a crash it goes on where it was.

    Raises:
        FencedError: somebody was faster, to resume it. StorageError, CorruptJournalError: as `read_view`.
        OSError: the disk refused.
    """
    before = read_view(place)
    if not before.standing.finished:
        return None
    mine, is_taken = before.layout.newest, before.accepted.lease == RETIRED
    # One who is about to resume a failed run may hold the newest epoch, and write once more before he looks: what he
    # writes must not count, as it would without a seal. After any other end nobody writes.
    needs_seal = isinstance(before.events[-1], RunFailed)
    if (not before.accepted.settled and (needs_seal or not is_taken)) or (needs_seal and not is_taken):
        journal, view = _begin(place, RETIRED, lambda _: None, before)
        journal.close()
        return view if view.standing.finished else None
    if not is_taken:
        mine += 1
        _claim(place, mine, RETIRED)
    # What the epoch before holds counts by no seal of ours: nobody will write to it, and it is safe.
    view = _settle_earlier(place, before, mine)
    return view if view.standing.finished else None


# Folding ----------------------------------------------------------------------------------------------------------


def fold(place: Place, view: View, mine: int, limit: int = FOLD_LIMIT) -> None:
    """Put closed epochs into folds where there are more than `limit` files of one sort. Called by the owner of `mine`.

    A failure leaves the files as they were (or twice, which readers know) and never fails the activation.
    """
    layout = view.layout
    for first, last in fold_plan(layout, mine, limit):
        prefixes = {epoch: view.accepted.prefixes[epoch] for epoch in range(first, last + 1)}
        temporary = f"{place.temporary}/{place.disk.token()}"
        try:
            place.disk.write_file(temporary, encode_fold(prefixes, place.storage_id, place.run_id))
            try:
                failpoint("fold.before_link")
                place.disk.link(temporary, f"{place.directory}/{fold_name(first, last)}")
            except FileExistsError:
                pass  # an owner before us made it; sealed prefixes are the same for all
            finally:
                place.disk.unlink(temporary)
            place.disk.sync_dir(place.directory)
            failpoint("fold.before_unlink")
            for epoch in sorted(epoch for epoch in layout.epochs if first <= epoch <= last):
                place.disk.unlink(place.path(epoch))
            for inner in sorted(layout.folds):
                if inner != (first, last) and first <= inner[0] and inner[1] <= last:
                    place.disk.unlink(f"{place.directory}/{fold_name(*inner)}")
        except OSError as error:
            logger.warning("run %s: folding epochs %d-%d failed: %s", place.run_id, first, last, error)
            return
        layout = read_names(
            [epoch_name(epoch) for epoch in layout.epochs if not first <= epoch <= last]
            + [fold_name(*other) for other in layout.folds if not (first <= other[0] and other[1] <= last)]
            + [fold_name(first, last)]
            + ([marker_name(layout.checkpoint)] if layout.checkpoint >= 0 else [])
        )
