"""Damage of every kind of object in a bucket: what is read afterwards is what was written, or is refused by name.

A storage with runs in slots (one that goes on, two epochs), runs in checkpoints, a spilled value, a lease, a codec's
absence, and slots that are going. Each object is flipped, cut, removed and exchanged for another; then everything is
read. `make test` takes some of the places, `make test-all` every byte and one bit in seven.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.object_server import BUCKET, TinyS3, environment
from pyworkflow_ray.engine.events import RunCompleted
from pyworkflow_ray.errors import PyWorkflowError
from pyworkflow_ray.storage.catalogue import Query
from pyworkflow_ray.storage.codec import StorageCodec
from pyworkflow_ray.storage.compact import Rules
from pyworkflow_ray.storage.listing import page
from pyworkflow_ray.storage.objects import bucket as buckets
from pyworkflow_ray.storage.objects import storage as storages
from pyworkflow_ray.storage.objects.compact import compact_bucket
from pyworkflow_ray.storage.objects.slots import run_prefix
from pyworkflow_ray.storage.objects.storage import ObjectStorage
from pyworkflow_ray.storage.sql import rows
from pyworkflow_ray.storage.verify import verify
from tests.journals import created, fired

URL = f"s3://{BUCKET}/damaged"
Objects = dict[str, tuple[bytes, float]]
SECOND_OWNER = 18  # his first slot: the claim at 2 passed over 16
RUNS = ("moved", "ended", "lives")


@pytest.fixture(scope="module")
def server() -> Iterator[TinyS3]:
    server = TinyS3()
    yield server
    server.close()


@pytest.fixture
def whole(server: TinyS3, monkeypatch: pytest.MonkeyPatch) -> Objects:
    for name, value in environment(server.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storages, "_buckets", {})
    monkeypatch.setattr(buckets, "_FIRST_PAUSE_S", 0.0001)
    server.objects.clear()
    storage = ObjectStorage.open(URL)
    write(storage, "moved")
    assert compact_bucket(storage, Rules(), now=1e9, grace_s=0.0).runs == 1
    write(storage, "ended")
    write(storage, "lives", ends=False)
    storage.join_lease().close()
    return dict(server.objects)


def write(storage: ObjectStorage, run_id: str, *, ends: bool = True) -> None:
    result = StorageCodec(storage).encode(run_id * 40_000)
    assert result.ref is not None
    storage.create_run(created(run_id, storage.storage_id))
    for number in range(2):
        journal, events = storage.activate(run_id, "", first=number == 0)
        journal.append([fired(len(events))]).result()
        if ends and number:
            journal.append([RunCompleted(seq=len(events) + 1, at=2.0, result=result)]).result()
    storage.unlist_finished(run_id)


def answers(storage: ObjectStorage) -> dict[str, Callable[[], Any]]:
    """All that can be asked."""

    def result(run_id: str) -> Any:
        end = storage.read_run(run_id).events[-1]
        return StorageCodec(storage).decode(end.result) if isinstance(end, RunCompleted) else None

    found: dict[str, Callable[[], Any]] = {
        "events": lambda: rows(storage, "select run_id, seq, data from events order by 1, 2")[1],
        "runs": lambda: rows(storage, "select run_id, status, events from runs order by 1")[1],
        "page": lambda: [(row.run_id, row.status) for row in told(page(storage, Query()))],
        "ids": storage.list_run_ids,
    }
    for run_id in RUNS:
        found[f"run {run_id}"] = lambda run_id=run_id: storage.read_run(run_id).events
        found[f"result {run_id}"] = lambda run_id=run_id: result(run_id)
        found[f"owner {run_id}"] = lambda run_id=run_id: storage.owner(run_id)
    return found


def told(given: Any) -> Any:
    """A list that names damage is no silent one."""
    if given.damaged:
        raise PyWorkflowError(str(given.damaged))
    return given.rows


def ask(server: TinyS3) -> dict[str, Any]:
    try:
        storage = ObjectStorage.open(URL, create=False)
    except PyWorkflowError as error:
        return {"open": error}
    found: dict[str, Any] = {}
    for name, answer in answers(storage).items():
        try:
            found[name] = answer()
        except PyWorkflowError as error:
            found[name] = error
    return found


def counted(key: str) -> bool:
    """Objects that hold something: the index, the clock and the probes are empty, or asked for their time alone."""
    return not any(part in key for part in ("/active/", "/clock", "/probe/", ".done"))


def damages(objects: Objects, every: bool) -> Iterator[tuple[str, str, Objects]]:
    """(what, key, the objects with that damage)."""
    rng = random.Random(7)
    for key in sorted(filter(counted, objects)):
        data, at = objects[key]
        places = range(len(data)) if every and len(data) < 4_000 else sorted(rng.sample(range(len(data)), 2))
        for place in places:
            flipped = bytearray(data)
            flipped[place] ^= 1 << rng.randrange(8)
            yield f"bit at {place}", key, {**objects, key: (bytes(flipped), at)}
        for length in range(0, len(data), 40) if every and len(data) < 4_000 else (0, len(data) // 2, len(data) - 1):
            yield f"cut to {length}", key, {**objects, key: (data[:length], at)}
        yield "removed", key, {other: one for other, one in objects.items() if other != key}
        others = [other for other in objects if other != key and counted(other) and objects[other][0] != data]
        same = [other for other in others if other.rpartition("/")[0] == key.rpartition("/")[0]] or others
        yield "exchanged", key, {**objects, key: objects[rng.choice(same)]}


def last_slots(objects: Objects) -> set[str]:
    """What an owner had in flight last: the loss of one can't be told from a crash, as docs/object-stores.md says."""
    last = set()
    for run_id in RUNS:
        prefix = f"damaged/{run_prefix(run_id)}"
        last.update(key for key in objects if key.startswith(prefix) and int(key[len(prefix) :]) >= SECOND_OWNER)
    return last


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_damage_of_an_object_is_silent(server: TinyS3, whole: Objects, every: bool) -> None:
    right = ask(server)
    assert not [name for name, answer in right.items() if isinstance(answer, Exception)]
    harmless = last_slots(whole)
    count, refused, unseen = 0, 0, []
    for what, key, damaged in itertools.islice(damages(whole, every), 0, None, 1 if every else 4):
        if what == "removed" and key in harmless:
            continue
        server.objects.clear()
        server.objects.update(damaged)
        found, count = ask(server), count + 1
        wrong = [name for name, answer in found.items() if not isinstance(answer, Exception) and answer != right[name]]
        if what == "removed" and "/runs/" in key and set(wrong) <= {"ids"}:
            wrong = []  # a listing of names opens nothing
        assert not wrong, f"{what} of {key}: {wrong} {[found[name] for name in wrong]}"
        refused += any(isinstance(answer, Exception) for answer in found.values())
        if "open" not in found and not verify(ObjectStorage.open(URL, create=False)).damaged:
            unseen.append((what, key))
    assert count > 30
    assert refused > count // 2
    assert [one for one in unseen if one[0] != "removed"] == []
    # What nobody names and nobody misses: a lease that no run has.
    assert {key.split("/")[1] for _, key in unseen} <= {"leases", "retiring"}
