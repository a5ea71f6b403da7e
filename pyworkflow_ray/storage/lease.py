"""Leases: who may own runs, and proof that nobody does any more.

Called by the runtime (controller, anchors and run actors join the lease of their cluster) and by `recover`; calls
`storage`, `checked`, `disk`. Files in `leases/`: `ID.lease` (locked, shared, by every living holder) and `ID.dead`.
Rules:

* A holder holds a shared flock on its own descriptor, from before the file has its name. Descriptors are close-on-exec
  and closed in forked children: a fork would keep the lock alive after its holder's SIGKILL.
* Whoever gets the exclusive lock has proof that no holder lives. Under it the lease is marked dead, durably, and for
  ever: a holder that comes back makes a new lease.
* The owner of a run is the lease in its newest epoch. Only runs of dead leases (or of none) are taken up.

Faults: SIGKILL at any time (the kernel frees the lock), SIGSTOP (it does not: the holder lives), power loss (all locks
are gone, files stay).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from pyworkflow_ray.errors import CorruptJournalError, FencedError, PyWorkflowError, StorageError
from pyworkflow_ray.ids import new_id
from pyworkflow_ray.storage.checked import decode_checked, encode_checked
from pyworkflow_ray.storage.journal import RETIRED, disk_error
from pyworkflow_ray.storage.port import StoragePort
from pyworkflow_ray.storage.storage import Storage

_NAME: Final = re.compile(r"([0-9a-f]{32})\.(lease|dead)")
_WAIT_S: Final = 30.0  # a taker holds the exclusive lock for one small file's sync
_POLL_S: Final = 0.005

_open_leases: weakref.WeakSet[Lease] = weakref.WeakSet()


class Lease:
    """A shared hold on one lease, for as long as this object is open or its process lives."""

    def __init__(self, lease_id: str, fd: int) -> None:
        self.id: Final = lease_id
        self._fd: int | None = fd
        _open_leases.add(self)

    @classmethod
    def join(cls, storage: Storage, lease_id: str | None = None) -> Lease:
        """Hold a new lease, or with `lease_id` one that others made.

        Raises:
            FencedError: that lease is dead, or gone: make a new one.
            StorageError: the files can't be read or made, or the file system has no locks.
        """
        return _make(storage) if lease_id is None else _join(storage, lease_id)

    def close(self) -> None:
        """Let go. The lease lives on while others hold it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_in_child() -> None:
    for lease in list(_open_leases):
        with contextlib.suppress(OSError):
            lease.close()


os.register_at_fork(after_in_child=_close_in_child)


def _path(storage: Storage, lease_id: str, suffix: str) -> str:
    return f"{storage.root}/leases/{lease_id}.{suffix}"


def _content(storage: Storage, lease_id: str) -> dict[str, object]:
    return {"lease": lease_id, "storage_id": storage.storage_id}


def _make(storage: Storage) -> Lease:
    lease_id = new_id()
    path = _path(storage, lease_id, "lease")
    temporary = f"{storage.root}/tmp/{storage.disk.token()}"
    try:
        storage.ensure_directories()
        storage.disk.write_file(temporary, encode_checked(f"leases/{lease_id}.lease", _content(storage, lease_id)))
        fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        lease = Lease(lease_id, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            try:
                storage.disk.link(temporary, path)
                storage.disk.sync_dir(f"{storage.root}/leases")
            finally:
                storage.disk.unlink(temporary)
        except BaseException:
            lease.close()
            raise
    except OSError as error:
        raise disk_error("making lease", path, error) from error
    return lease


def _join(storage: Storage, lease_id: str) -> Lease:
    path = _path(storage, lease_id, "lease")
    try:
        if _NAME.fullmatch(f"{lease_id}.lease") is None:
            raise FileNotFoundError(path)
        lease = Lease(lease_id, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        raise FencedError(f"lease {lease_id!r} does not exist in {storage.root}: make a new one", path=path) from None
    except OSError as error:
        raise disk_error("opening lease", path, error) from error
    try:
        assert lease._fd is not None
        if not _lock(lease._fd, fcntl.LOCK_SH, wait_s=_WAIT_S):
            raise StorageError(f"{path} was locked exclusively for {_WAIT_S:.0f} s: a recovery is stuck", path=path)
        decode_checked(f"leases/{lease_id}.lease", storage.disk.read(path), path)
        if storage.disk.exists(_path(storage, lease_id, "dead")):
            raise FencedError(f"lease {lease_id} is dead, its runs may be another's: make a new one", path=path)
    except OSError as error:
        lease.close()
        raise disk_error("locking lease", path, error) from error
    except PyWorkflowError:
        lease.close()
        raise
    return lease


def _lock(fd: int, how: int, wait_s: float = 0.0) -> bool:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        else:
            return True


# Death ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class LeaseStates:
    """living: somebody holds it. dead: marked, for ever. damaged: lease id to what is wrong with its files."""

    living: set[str] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)
    damaged: dict[str, str] = field(default_factory=dict)


def is_held(storage: Storage, lease_id: str) -> bool | None:
    """Whether a living process holds the lease; None where that can't be told. Marks nothing.

    Only where the kernel's list shows no holder (it hides those of other containers) is the lock tried, and let go at
    once: taken for that instant it can do no more than make a `recover` at the same moment look again later.
    """
    if not lease_id:
        return None
    if storage.disk.exists(_path(storage, lease_id, "dead")):
        return False
    try:
        fd = os.open(_path(storage, lease_id, "lease"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if f":{os.fstat(fd).st_ino} " in storage.disk.read("/proc/locks").decode():
            return True
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)


def lease_states(storage: Storage, *, declare: bool) -> LeaseStates:
    """How the leases of the storage stand.

    `declare` marks those dead that nobody holds; without it they count as living.

    Raises:
        StorageError: the directory can't be read, or a mark can't be written.
    """
    states = LeaseStates()
    try:
        names = storage.disk.listdir(f"{storage.root}/leases")
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise disk_error("listing", f"{storage.root}/leases", error) from error
    for lease_id in sorted({match[1] for match in map(_NAME.fullmatch, names) if match is not None}):
        try:
            dead = _is_dead(storage, lease_id) or (declare and _declare_dead(storage, lease_id))
        except CorruptJournalError as error:
            states.damaged[lease_id] = str(error)
        except OSError as error:
            raise disk_error("marking lease", _path(storage, lease_id, "dead"), error) from error
        else:
            (states.dead if dead else states.living).add(lease_id)
    return states


def dead_leases(storage: Storage) -> set[str]:
    """Ids of the leases that are marked dead or that nobody holds; the latter are marked, durably, by this call."""
    return lease_states(storage, declare=True).dead


def _is_dead(storage: Storage, lease_id: str) -> bool:
    path = _path(storage, lease_id, "dead")
    try:
        decode_checked(f"leases/{lease_id}.dead", storage.disk.read(path), path)
    except FileNotFoundError:
        return False
    return True


def _declare_dead(storage: Storage, lease_id: str) -> bool:
    path = _path(storage, lease_id, "lease")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not _lock(fd, fcntl.LOCK_EX):
            # Held by its owner, or for a moment by another process that declares it dead: wait for that one to end.
            fcntl.flock(fd, fcntl.LOCK_SH)
            return _is_dead(storage, lease_id)
        decode_checked(f"leases/{lease_id}.lease", storage.disk.read(path), path)
        storage.ensure_directories()  # a copy may have lost the empty ones
        temporary = f"{storage.root}/tmp/{storage.disk.token()}"
        storage.disk.write_file(temporary, encode_checked(f"leases/{lease_id}.dead", _content(storage, lease_id)))
        try:
            storage.disk.link(temporary, _path(storage, lease_id, "dead"))
        except FileExistsError:
            pass  # another taker marked it between our look and our lock
        finally:
            storage.disk.unlink(temporary)
        storage.disk.sync_dir(f"{storage.root}/leases")
        return True
    finally:
        os.close(fd)


# Recovery ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Orphan:
    """An unfinished run that no living owner holds. Take it with `storage.activate(run_id, mine, after=epoch)`."""

    run_id: str
    epoch: int
    lease: str


@dataclass(slots=True)
class Orphans:
    """runs: to be taken. held: run id to the lease that holds it. damaged: run id to what is wrong with it."""

    runs: list[Orphan] = field(default_factory=list)
    held: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)


def orphans(
    storage: StoragePort, *, states: LeaseStates | None = None, run_ids: Iterable[str] | None = None
) -> Orphans:
    """Which unfinished runs nobody holds. Leases without a holder are marked dead first, unless `states` is given.

    A run that is found to have ended (a crash kept it in the index) leaves the index here. A run whose lease is gone or
    damaged is left alone and said to be damaged: nothing proves that its owner is gone.
    """
    states = storage.lease_states(declare=True) if states is None else states
    result = Orphans()

    def look(run_id: str) -> None:
        try:
            owner = storage.owner(run_id)
            if owner.lease not in ("", RETIRED) and owner.lease not in states.dead:
                lost = storage.lost_lease(owner.lease, states)
                if lost:
                    result.damaged[run_id] = lost
                else:
                    result.held[run_id] = owner.lease
            elif not storage.unlist_finished(run_id):
                result.runs.append(Orphan(run_id, owner.epoch, owner.lease))
        except StorageError as error:
            result.damaged[run_id] = str(error)

    run_ids = storage.unfinished() if run_ids is None else run_ids
    if storage.at_once == 1:
        for run_id in run_ids:
            look(run_id)
    else:
        with ThreadPoolExecutor(storage.at_once) as pool:
            list(pool.map(look, run_ids))
        result.runs.sort(key=lambda orphan: orphan.run_id)
    return result


def lost_lease(storage: Storage, lease_id: str, states: LeaseStates) -> str:
    """Why nobody can tell whether the lease's holders live; "" where one can."""
    if lease_id in states.damaged:
        return states.damaged[lease_id]
    path = _path(storage, lease_id, "lease")
    # Not in the listing: made after it, or lost. A lease has its file for as long as a run names it.
    if lease_id in states.living or storage.disk.exists(path):
        return ""
    return f"{path} is missing, so nothing proves that the run's owner is gone: restore it"
