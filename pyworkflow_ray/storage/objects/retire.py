"""Removing the slots of runs that a checkpoint holds: late, once that is proved, and slot 0 first.

Called by `compact`; calls the bucket and `storage.checkpoint`. What is going stands in lists below `retiring/`:

    retiring/TOKEN.json      runs that a manifest held when this was written, with what their histories come to
    retiring/TOKEN.done      none of their slots is left

Rules:

* A list is written after the manifest that holds its runs. `GRACE_S` later by the store's clock each run is read from
  its checkpoint, and only if that is what was written the run's slots go: slot 0, and then the others.
* A list that is done stays for another `GRACE_S`, and no run on a list is forgotten by retention: whoever is slow with
  its removal would remove another run of that id. He looks every `TRUSTED_S` whether the list is done.

Faults: a crash between any two requests (the next compaction goes on), several compactions at once (each does what is
left), a damaged checkpoint (nothing is removed, and it is reported).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from pydantic_core import to_json

from pyworkflow_ray.engine.events import Event
from pyworkflow_ray.errors import RunNotFoundError, StorageError
from pyworkflow_ray.storage.checked import decode_checked, encode_checked
from pyworkflow_ray.storage.checkpoint import CheckpointChanged, CompactedRuns
from pyworkflow_ray.storage.objects import trust
from pyworkflow_ray.storage.objects.bucket import Bucket, gather_all
from pyworkflow_ray.storage.objects.leases import store_time
from pyworkflow_ray.storage.objects.slots import run_prefix, slot_key

RETIRING: Final = "retiring/"
_NAME: Final = re.compile(re.escape(RETIRING) + r"([0-9a-f]{32})\.(json|done)")
AT_ONCE: Final = 32  # runs


@dataclass(slots=True, frozen=True)
class Going:
    """A run whose slots go: how many events it has, and the SHA-256 of them."""

    run_id: str
    events: int
    sha256: str


@dataclass(slots=True)
class Lists:
    """What lies below `retiring`. now: by the store's clock, before it was looked at; 0 where that was not asked."""

    now: float
    seen: trust.Moment
    runs: dict[str, list[Going]] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)
    done: dict[str, float] = field(default_factory=dict)

    @property
    def held(self) -> set[str]:
        """Runs on any list."""
        return {going.run_id for runs in self.runs.values() for going in runs}


def going(run_id: str, events: Sequence[Event], epochs: Sequence[int]) -> Going:
    """What a history comes to."""
    digest = hashlib.sha256()
    for event, epoch in zip(events, epochs, strict=True):
        digest.update(b"%d %s\n" % (epoch, to_json(event)))
    return Going(run_id, len(events), digest.hexdigest())


async def note(bucket: Bucket, storage_id: str, runs: Iterable[Going]) -> None:
    """Write a list."""
    name = f"{RETIRING}{bucket.token()}.json"
    content = {"storage_id": storage_id, "runs": [[one.run_id, one.events, one.sha256] for one in runs]}
    await bucket.put(name, encode_checked(name, content))


async def read_lists_now(bucket: Bucket) -> Lists:
    """As `read_lists`, with the time by the store's clock, which only an object that is written tells."""
    return await read_lists(bucket, await store_time(bucket))


async def read_lists(bucket: Bucket, now: float = 0.0) -> Lists:
    """All lists. Writes nothing.

    Raises:
        BucketError: the store can't be read. CorruptJournalError: a list is damaged.
    """
    lists = Lists(now, trust.now())
    named = [(entry, _NAME.fullmatch(entry.key)) for entry in await bucket.listing(RETIRING)]
    for entry, match in named:
        if match is not None and match[2] == "done":
            lists.done[match[1]] = entry.modified_at
        elif match is not None:
            lists.since[match[1]] = entry.modified_at
    tokens = sorted(lists.since)
    found = await bucket.get_many([f"{RETIRING}{token}.json" for token in tokens])
    for token, one in zip(tokens, found, strict=True):
        if one is not None:
            name = f"{RETIRING}{token}.json"
            content = decode_checked(name, one.data, f"{bucket.url}/{name}")
            lists.runs[token] = [Going(*row) for row in content["runs"]]
    return lists


class Retirement:
    """One compaction's removals. damaged: runs that were left alone, with the error."""

    def __init__(self, bucket: Bucket, compacted: CompactedRuns, lists: Lists, grace_s: float) -> None:
        self.removed = 0
        self.waiting = 0
        self.damaged: list[tuple[str, str]] = []
        self._bucket = bucket
        self._compacted = compacted
        self._lists = lists
        self._grace_s = grace_s
        self._seen = lists.seen

    def proved(self, token: str) -> list[str]:
        """The runs on a list whose checkpoint is what was written; the damaged are reported. Reads the checkpoints."""
        ids = []
        for one in self._lists.runs[token]:
            try:
                history = self._compacted.read(one.run_id)
            except CheckpointChanged:
                break  # another compaction is at work, and nothing is damaged: the next one does the rest
            except (RunNotFoundError, StorageError) as error:
                self.damaged.append((one.run_id, str(error)))
                continue
            if going(one.run_id, history.events, history.epochs) == one:
                ids.append(one.run_id)
            else:
                text = f"the checkpoint of run {one.run_id!r} does not hold what was moved: its slots were left alone"
                self.damaged.append((one.run_id, text))
        return ids

    def due(self) -> list[str]:
        """Lists whose slots may go now; the runs on the others that are not done wait."""
        due = []
        for token, since in sorted(self._lists.since.items()):
            if token in self._lists.done or token not in self._lists.runs:
                continue
            if self._lists.now - since >= self._grace_s:
                due.append(token)
            else:
                self.waiting += len(self._lists.runs[token])
        return due

    async def remove(self, token: str, run_ids: Sequence[str]) -> None:
        """Remove the slots of proved runs, and say so once nothing of the list is left."""
        for start in range(0, len(run_ids), AT_ONCE):
            if not trust.is_trusted(self._seen) and not await self._is_still_due(token):
                return
            await gather_all(self._remove(run_id) for run_id in run_ids[start : start + AT_ONCE])
        self.removed += len(run_ids)
        if len(run_ids) == len(self._lists.runs[token]):
            await self._bucket.put(f"{RETIRING}{token}.done", b"")

    async def _is_still_due(self, token: str) -> bool:
        seen = trust.now()
        there = await self._bucket.modified_at(f"{RETIRING}{token}.json") is not None
        if not there or await self._bucket.modified_at(f"{RETIRING}{token}.done") is not None:
            return False
        self._seen = seen
        return True

    async def _remove(self, run_id: str) -> None:
        first = slot_key(run_id, 0)
        keys = [entry.key for entry in await self._bucket.listing(run_prefix(run_id))]
        if keys:
            await self._bucket.delete(first)
            await self._bucket.delete_many([key for key in keys if key != first])
        await self._bucket.delete_many([entry.key for entry in await self._bucket.listing(f"active/{run_id}/")])

    async def tidy(self) -> None:
        """Remove lists that have been done for long enough: first the list, for what is done must not look undone."""
        for token, at in sorted(self._lists.done.items()):
            if self._lists.now - at >= self._grace_s:
                await self._bucket.delete(f"{RETIRING}{token}.json")
                await self._bucket.delete(f"{RETIRING}{token}.done")
