"""What the tests of compaction in a bucket share: a storage in which there is everything to do, and a bucket that fails
at a request, or lets others act there."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from benchmarks.object_server import BUCKET, TinyS3
from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.storage.catalogue import Query
from pyworkflow_ray.storage.compact import Compaction, Rules
from pyworkflow_ray.storage.listing import page
from pyworkflow_ray.storage.objects import bucket as buckets
from pyworkflow_ray.storage.objects.bucket import BucketError, ObstoreBucket
from pyworkflow_ray.storage.objects.compact import compact_bucket
from pyworkflow_ray.storage.objects.storage import ObjectStorage
from pyworkflow_ray.storage.sql import query
from pyworkflow_ray.storage.verify import verify
from tests.journals import created, fired

URL = f"s3://{BUCKET}/compacted"
DAY_S = 86_400.0
AT = 1_790_000_000.0
NOW = AT + 10 * DAY_S
RULES = Rules(retain_s={"completed": 9.5 * DAY_S}, failed_after_s=1.0)
FORGOTTEN = ("old-1", "old-3")

Written = dict[str, list[ev.Event]]
Objects = dict[str, tuple[bytes, float]]


class Crash(BaseException):
    """The death of a process; no code of ours catches it."""


class Striking(ObstoreBucket):
    """At request `at` something happens, in a thread that may wait; after a crash nothing is done any more."""

    at = -1
    strike: Callable[[Callable[[], Any]], Any]

    def arm(self, at: int, strike: Callable[[Callable[[], Any]], Any]) -> Striking:
        self.at, self.strike = at, strike
        self.requests, self.struck, self.dead = 0, False, False
        return self

    async def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number, self.requests = self.requests, self.requests + 1
        if number != self.at and not self.dead:
            return await super()._call(function, *args, **kwargs)
        return await super()._call(functools.partial(self._struck, function), *args, **kwargs)

    def _struck(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.dead:
            raise Crash
        self.struck = True
        return self.strike(functools.partial(function, *args, **kwargs))


def crash_before(bucket: Striking) -> Callable[[Callable[[], Any]], Any]:
    def strike(_: Callable[[], Any]) -> Any:
        bucket.dead = True
        raise Crash

    return strike


def crash_after(bucket: Striking) -> Callable[[Callable[[], Any]], Any]:
    def strike(request: Callable[[], Any]) -> Any:
        bucket.dead = True
        request()
        raise Crash

    return strike


def answer_lost(_: Striking) -> Callable[[Callable[[], Any]], Any]:
    def strike(request: Callable[[], Any]) -> Any:
        request()
        raise BucketError("no answer")

    return strike


def refused(_: Striking) -> Callable[[Callable[[], Any]], Any]:
    def strike(_: Callable[[], Any]) -> Any:
        raise BucketError("503")

    return strike


def write_run(storage: ObjectStorage, run_id: str, at: float = AT, end: str = "completed", epochs: int = 2) -> None:
    storage.create_run(created(run_id, storage.storage_id, at=at, run_uid=f"uid-{run_id}"))
    seq = 1
    for number in range(epochs):
        journal, _ = storage.activate(run_id, "", first=number == 0)
        part: list[ev.Event] = [ev.RunActivated(seq=seq, at=at, epoch=number, cause="recovery"), fired(seq + 1)]
        if number == epochs - 1 and end == "completed":
            part.append(ev.RunCompleted(seq=seq + 2, at=at + 1, result=ev.Payload(enc="json", data=[1])))
        elif number == epochs - 1 and end == "failed":
            error = ev.ErrorInfo(kind="permanent", type="E", message="m")
            part.append(ev.RunFailed(seq=seq + 2, at=at + 1, error=error))
        for future in [journal.append([event]) for event in part]:
            future.result()
        seq += len(part)
        journal.close()
    storage.unlist_finished(run_id)


def run_compaction(storage: ObjectStorage, rules: Rules = RULES) -> Compaction:
    return compact_bucket(storage, rules, now=NOW, grace_s=0.0)


def everything(storage: ObjectStorage) -> Written:
    """One compaction of this moves, merges, forgets and removes; what is there before, but for what is forgotten.

    Three batches of a cold date are there already, runs that are kept no longer among them; a run is moved whose slots
    are still there; and files that no manifest names.
    """
    for number, name in enumerate(("old-1", "old-2", "old-3")):
        write_run(storage, name, at=AT + number % 2 * DAY_S)
        compact_bucket(storage, Rules(), now=AT, grace_s=0.0)
    compact_bucket(storage, Rules(), now=AT, grace_s=0.0)  # the lists, too
    write_run(storage, "moved", at=AT + DAY_S)
    compact_bucket(storage, Rules(), now=AT, grace_s=1e6)
    write_run(storage, "fails", at=AT + DAY_S, end="failed")
    write_run(storage, "young", at=AT + DAY_S, epochs=1)
    write_run(storage, "lives", end="running", epochs=3)
    storage.checkpoints.files.publish("date=2020-01-01/events-0.parquet", b"of a crash")
    names = ("old-2", "moved", "fails", "young", "lives")
    return {name: storage.read_run(name).events for name in names}


def check(url: str, written: Written, gone: tuple[str, ...] = ()) -> None:
    """Every event once, whoever asks; and no damage. `gone` may be there whole, or not at all."""
    storage = ObjectStorage.open(url, create=False)
    expected = dict(written)
    for run_id in gone:
        if run_id in storage.list_run_ids():
            expected[run_id] = storage.read_run(run_id).events
            assert len(expected[run_id]) == 6
    rows = sorted((run_id, event.seq) for run_id, events in expected.items() for event in events)
    assert query(storage, "select run_id, seq from events order by all").fetchall() == rows
    assert query(storage, "select run_id from runs order by all").fetchall() == [(name,) for name in sorted(expected)]
    for run_id, events in expected.items():
        assert storage.read_run(run_id).events == events
        assert storage.owner(run_id).epoch >= 0
    assert storage.list_run_ids() == sorted(expected)
    assert sorted(row.run_id for row in page(storage, Query()).rows) == sorted(expected)
    assert storage.unfinished() == ["lives"]
    report = verify(storage)
    assert (report.damaged, report.runs) == ([], len(expected))


def check_nothing_left_over(server: TinyS3) -> None:
    """One manifest, what it names, and the slots of the run that goes on."""
    keys = [key.partition("/")[2] for key in server.objects]
    assert {key.split("/")[2] for key in keys if key.startswith("runs/")} == {"lives"}
    assert not [key for key in keys if key.startswith("retiring/")]
    manifests = [key for key in keys if key.startswith("checkpoints/manifests/")]
    assert len(manifests) == 1
    named = json.loads(server.objects["compacted/" + manifests[0]][0].partition(b" ")[2])
    files = {file["path"] for batch in named["batches"] for file in batch["files"]}
    files |= {ids["path"] for ids in named["ids"]}
    assert {key.removeprefix("checkpoints/") for key in keys if key.startswith("checkpoints/")} - files == {
        manifests[0].removeprefix("checkpoints/")
    }


def quick(monkeypatch: Any) -> None:
    """No pauses between tries."""
    monkeypatch.setattr(buckets, "_FIRST_PAUSE_S", 0.0001)

    async def pause(_: Any, seconds: float) -> None:
        del seconds

    monkeypatch.setattr(ObstoreBucket, "pause", pause)
