"""Checkpoints in a bucket: the four calls of `checkpoint_files`, and what is known of the manifest for some minutes.

Made by `storage`; called by the `checkpoint*` and `compact*` modules in threads that may wait; calls the bucket. Rules:

* A manifest is created exclusively, and counts only if no higher number is there after it: of two compactors that go on
  from N the slower may find N+1 free again, for N+2 has taken its place.
* Every other file has a name that nobody else uses, so writing it again does no harm.

Faults: those of `bucket`, which come out as OSError: what was written by a call that failed counts only if it is there.
"""

from __future__ import annotations

import threading
from collections.abc import Coroutine, Sequence
from typing import Any, Final, TypeVar

from pyworkflow_ray.errors import StorageError
from pyworkflow_ray.failpoints import failpoint
from pyworkflow_ray.storage.checkpoint_ids import Checkpoints, days_of
from pyworkflow_ray.storage.checkpoint_manifest import MANIFESTS
from pyworkflow_ray.storage.objects import trust
from pyworkflow_ray.storage.objects.bucket import Bucket, BucketError
from pyworkflow_ray.storage.objects.commit import create_once
from pyworkflow_ray.storage.objects.loop import current_loop

T = TypeVar("T")

CHECKPOINTS: Final = "checkpoints/"


class ObjectFiles:
    """`checkpoint_files.Files` in a bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket: Final = bucket

    def path(self, name: str) -> str:
        return f"{self.bucket.url}/{CHECKPOINTS}{name}".rstrip("/")

    def list(self, directory: str = "") -> list[str]:
        return self._wait(self.bucket.names(f"{CHECKPOINTS}{directory}/" if directory else CHECKPOINTS))

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        return self._wait(self._read(f"{CHECKPOINTS}{name}", start, length))

    async def _read(self, key: str, start: int, length: int | None) -> bytes:
        if length is not None:
            part = await self.bucket.get_part(key, start, length) if length else b""
        else:
            found = await self.bucket.get(key)
            part = None if found is None else found.data[start:]
        if part is None:
            raise FileNotFoundError(2, "no such object", f"{self.bucket.url}/{key}")
        return part

    def publish(self, name: str, data: bytes) -> None:
        failpoint("checkpoint.before_put")
        self._wait(self._publish(name, data))

    async def _publish(self, name: str, data: bytes) -> None:
        key = f"{CHECKPOINTS}{name}"
        directory, _, number = name.partition("/")
        if directory != MANIFESTS:
            await self.bucket.put(key, data)
            return
        mine = number.removesuffix(".json")
        is_mine = await create_once(self.bucket, key, data)
        others = [one.removesuffix(".json") for one in await self.bucket.names(f"{CHECKPOINTS}{MANIFESTS}/")]
        if not is_mine or any(int(one) > int(mine) for one in others if one.isdigit()):
            raise FileExistsError(17, "somebody else's manifest took its place", self.path(name))

    def remove(self, name: str) -> None:
        self._wait(self.bucket.delete(f"{CHECKPOINTS}{name}"))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return current_loop().run(work)
        except BucketError as error:
            raise OSError(5, str(error), self.bucket.url) from error
        except StorageError as error:  # of a creation whose fate is unknown
            raise OSError(5, str(error), error.path) from error


class ObjectCheckpoints(Checkpoints):
    """As its base; and answers from memory where what was seen a short time ago is enough."""

    def __init__(self, bucket: Bucket, storage_id: str) -> None:
        super().__init__(ObjectFiles(bucket), storage_id)
        self._lately: tuple[trust.Moment, tuple[Sequence[int], ...]] | None = None
        self._looking = threading.Lock()

    def may_hold(self, run_id: str) -> bool:
        """Whether a checkpoint may hold the run, as of a moment that can be trusted: slots that were there then are
        there now. False is certain in that sense; raises as `dates`."""
        with self._looking:
            known = self._lately
            if known is None or not trust.is_trusted(known[0]):
                began = trust.now()
                known = self._lately = (began, self._current())
        return bool(days_of(known[1], run_id))
