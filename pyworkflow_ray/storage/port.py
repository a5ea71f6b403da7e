"""What runtime, api and command line use of a storage, whatever it is: a directory or a bucket.

`open_storage` is how everybody opens one: a path is `storage.Storage`, a URL is `objects.storage.ObjectStorage` (and
only then is anything of it imported). What these protocols do not have, a caller may not use; compaction, SQL, listings
and `verify` reach below the port, and know of both.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, cast

from pyworkflow_ray.engine.events import Event, RunCreated
from pyworkflow_ray.storage.directory import is_url

if TYPE_CHECKING:
    from pyworkflow_ray.storage.checkpoint_ids import Checkpoints
    from pyworkflow_ray.storage.lease import LeaseStates
    from pyworkflow_ray.storage.storage import Owner, RunHistory


class JournalPort(Protocol):
    """One epoch of one run, open for appending by its owner. `storage.journal.Journal` says what each part means."""

    @property
    def epoch(self) -> int: ...

    @property
    def lease(self) -> str: ...

    @property
    def state(self) -> str: ...

    def append(self, events: Sequence[Event]) -> Future[int]: ...

    def close(self) -> None: ...

    def finish(self) -> None: ...


class LeasePort(Protocol):
    """A hold on a lease."""

    @property
    def id(self) -> str: ...

    def close(self) -> None: ...


class StoragePort(Protocol):
    """An open storage; `storage.storage.Storage` says what each method means.

    root: path or URL. at_once: runs that are worth reading at the same time.
    """

    @property
    def root(self) -> str: ...

    @property
    def storage_id(self) -> str: ...

    @property
    def at_once(self) -> int: ...

    @property
    def checkpoints(self) -> Checkpoints: ...

    def create_runs(self, events: Sequence[RunCreated], *, lease: str = "") -> list[bool]: ...

    def read_run(self, run_id: str) -> RunHistory: ...

    def is_retired(self, run_id: str) -> bool: ...

    def owner(self, run_id: str) -> Owner: ...

    def list_run_ids(self, finished: bool | None = None) -> list[str]: ...

    def run_directories(self) -> list[str]: ...

    def unfinished(self) -> list[str]: ...

    def activate(
        self, run_id: str, lease: str, *, first: bool = False, after: int | None = None
    ) -> tuple[JournalPort, list[Event]]: ...

    def unlist_finished(self, run_id: str) -> bool: ...

    def join_lease(self, lease_id: str | None = None) -> LeasePort: ...

    def lease_states(self, *, declare: bool) -> LeaseStates: ...

    def is_held(self, lease_id: str) -> bool | None: ...

    def lost_lease(self, lease_id: str, states: LeaseStates) -> str: ...

    def put_blob(self, data: bytes) -> str: ...

    def get_blob(self, digest: str) -> bytes: ...


def open_storage(storage: str | os.PathLike[str], *, create: bool = True) -> StoragePort:
    """The storage at a path, or at a URL of an object store; made where it is missing and `create` is true.

    Raises:
        ConfigurationError: there can't be a storage there.
        StorageError: it can't be read or made.
        CorruptJournalError: it is damaged.
    """
    if is_url(storage):
        from pyworkflow_ray.storage.objects.storage import ObjectStorage

        return cast(StoragePort, ObjectStorage.open(str(storage), create=create))
    from pyworkflow_ray.storage.storage import Storage

    return Storage.open(storage, create=create)


def breaker_states(root: str, name: str) -> Any:
    """The kept states of a circuit breaker in the storage at `root`."""
    if is_url(root):
        from pyworkflow_ray.storage.objects.breakers import ObjectBreakerStates

        return ObjectBreakerStates(root, name)
    from pyworkflow_ray.storage.breaker_states import BreakerStates

    return BreakerStates(root, name)
