"""Large buffers in Ray's object store, beside their blobs: a step finds what another has made without reading a disk.

Called by the codec of a run actor and of its step hosts (`storage.large`); calls Ray and, from a step host, the run
actor. The run actor keeps the references of the run that it drives and lends them to whoever is to decode the value;
what is not found here is read from its blob, so nothing here raises and nothing depends on it.

Faults: the process that put an object ends, and the object with it (Ray's ownership); the store is full; the node with
the only copy is lost; the run actor dies, and with it all references.
"""

from __future__ import annotations

import logging
import pickle
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import ray

from pyworkflow_ray.runtime.typed_ray import cluster_resources, living_nodes
from pyworkflow_ray.storage.blobs import layout

log = logging.getLogger("pyworkflow_ray.objects")

_LARGEST = 0.4  # of a node's object store: a larger value would push out everything else
_KEPT = 0.5  # of it that one run may hold, the objects used last
_ANSWER_S = 5.0
_GET_S = 60.0  # from another node

Box = list[Any]  # one ObjectRef: inside a list Ray hands on the reference, not the object


class Keeper(Protocol):
    """Who holds the references."""

    def keep(self, digest: str, box: Box, size: int) -> None: ...

    def lend(self, digest: str) -> Box | None: ...


class Kept:
    """The references of one run, in its run actor. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._boxes: OrderedDict[str, tuple[Box, int]] = OrderedDict()
        self._size = 0

    def keep(self, digest: str, box: Box, size: int) -> None:
        room = _store_bytes() * _KEPT
        with self._lock:
            _, before = self._boxes.pop(digest, ([], 0))
            self._boxes[digest] = (box, size)
            self._size += size - before
            while self._size > room and self._boxes:
                _, (_, dropped) = self._boxes.popitem(last=False)
                self._size -= dropped

    def lend(self, digest: str) -> Box | None:
        with self._lock:
            found = self._boxes.get(digest)
            if found is None:
                return None
            self._boxes.move_to_end(digest)
            return found[0]

    def clear(self) -> None:
        with self._lock:
            self._boxes.clear()
            self._size = 0


class _Far:
    """The keeper is the run actor; this process is one of its step hosts."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def keep(self, digest: str, box: Box, size: int) -> None:
        ray.get(self._actor.keep_object.remote(digest, box, size), timeout=_ANSWER_S)

    def lend(self, digest: str) -> Box | None:
        box: Box | None = ray.get(self._actor.lend_object.remote(digest), timeout=_ANSWER_S)
        return box


class SharedObjects:
    """Implements `storage.large.Sharing` for one process. Shares nothing until it knows a keeper."""

    def __init__(self) -> None:
        self._keeper: Keeper | None = None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="objects")

    def keep_here(self) -> Kept:
        """This process is a run actor: it keeps the references itself."""
        self._keeper = kept = Kept()
        return kept

    def keep_in(self, actor: Any) -> None:
        """This process works for that run actor from now on."""
        self._keeper = _Far(actor)

    def begin(self, parts: Sequence[memoryview]) -> _Offer | None:
        size = sum(part.nbytes for part in parts)
        keeper = self._keeper
        if keeper is None or size > _store_bytes() * _LARGEST:
            return None
        buffers = [pickle.PickleBuffer(part) for part in parts]
        return _Offer(keeper, self._threads.submit(ray.put, buffers), size)

    def find(self, digest: str) -> list[tuple[int, memoryview]] | None:
        keeper = self._keeper
        if keeper is None:
            return None
        try:
            box = keeper.lend(digest)
            if box is None:
                return None
            views = [memoryview(part).cast("B").toreadonly() for part in ray.get(box[0], timeout=_GET_S)]
        except Exception as error:
            log.debug("a shared object is lost, its blob is read instead: %s", error)
            return None
        return list(zip(layout([view.nbytes for view in views]), views, strict=True))


class _Offer:
    def __init__(self, keeper: Keeper, putting: Future[Any], size: int) -> None:
        self._keeper = keeper
        self._putting = putting
        self._size = size

    def made(self, digest: str) -> None:
        try:
            self._keeper.keep(digest, [self._putting.result()], self._size)
        except Exception as error:
            log.debug("an object could not be shared: %s", error)

    def drop(self) -> None:
        self._putting.cancel()


_bytes: float | None = None


def _store_bytes() -> float:
    """The size of the object store of one node; 0 where Ray does not say."""
    global _bytes
    if _bytes is None:
        try:
            _bytes = cluster_resources().get("object_store_memory", 0.0) / max(1, len(living_nodes()))
        except Exception as error:
            log.debug("the size of the object store is not known: %s", error)
            return 0.0
    return _bytes
