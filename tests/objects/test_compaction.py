"""Compaction in a bucket: a fault and a death at each of its requests, two of them at once, and stale owners.

A real S3 server of ours in this process answers; each point counts only if the fault struck there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from obstore.store import LocalStore

from benchmarks.object_server import TinyS3, environment
from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.errors import FencedError, RunNotFoundError, StorageError
from pyworkflow_ray.storage.checkpoint import CompactedRuns
from pyworkflow_ray.storage.compact import Rules, compact
from pyworkflow_ray.storage.objects import retire, trust
from pyworkflow_ray.storage.objects import storage as storages
from pyworkflow_ray.storage.objects.bucket import ObstoreBucket
from pyworkflow_ray.storage.objects.slots import run_prefix, slot_key
from pyworkflow_ray.storage.objects.storage import ObjectStorage
from pyworkflow_ray.storage.verify import verify
from tests.journals import created, fired
from tests.objects.compacting import (
    FORGOTTEN,
    NOW,
    URL,
    Crash,
    Objects,
    Striking,
    Written,
    answer_lost,
    check,
    check_nothing_left_over,
    crash_after,
    crash_before,
    everything,
    quick,
    refused,
    run_compaction,
    write_run,
)


@pytest.fixture(scope="module")
def server() -> Iterator[TinyS3]:
    server = TinyS3()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def connected(server: TinyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(server.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storages, "_buckets", {})
    quick(monkeypatch)


@pytest.fixture(scope="module")
def template(server: TinyS3) -> tuple[Objects, Written]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(server.url).items():
            patch.setenv(name, value)
        patch.setattr(storages, "_buckets", {})
        server.objects.clear()
        written = everything(ObjectStorage.open(URL))
        return dict(server.objects), written


@pytest.fixture
def whole(server: TinyS3, template: tuple[Objects, Written]) -> Written:
    """The server holds what the template holds."""
    restore(server, template[0])
    return template[1]


@pytest.fixture
def empty(server: TinyS3) -> ObjectStorage:
    server.objects.clear()
    return ObjectStorage.open(URL)


def restore(server: TinyS3, objects: Objects) -> None:
    server.objects.clear()
    server.objects.update(objects)


def striking(at: int, make: Callable[[Striking], Any]) -> tuple[ObjectStorage, Striking]:
    """The storage through a bucket of its own, which is struck at its request `at` from now on."""
    bucket = Striking.open(URL)
    bucket.arm(-1, refused(bucket))
    storage = ObjectStorage.over(bucket, create=False)
    return storage, bucket.arm(at, make(bucket))


SAMPLED = [pytest.param(2, id="sampled"), pytest.param(0, id="each", marks=pytest.mark.slow)]


def points(server: TinyS3, objects: Objects, few: int) -> list[int]:
    """`few` of the requests of a compaction, or all of them where it is 0."""
    restore(server, objects)
    storage, bucket = striking(-1, refused)
    run_compaction(storage)
    assert bucket.requests > 60
    return list(range(0, bucket.requests, bucket.requests // few + 1 if few else 1))


def test_what_a_compaction_does(server: TinyS3, whole: Written) -> None:
    done = run_compaction(ObjectStorage.open(URL))
    assert (done.runs, done.dropped, done.waiting, done.damaged) == (2, 2, 0, [])
    assert done.merged >= 2
    check(URL, whole)
    assert run_compaction(ObjectStorage.open(URL)).runs == 0
    check(URL, whole)
    check_nothing_left_over(server)


def strike_everywhere(
    server: TinyS3, template: tuple[Objects, Written], make: Callable[[Striking], Any], chosen: list[int]
) -> None:
    objects, written = template
    for at in chosen:
        restore(server, objects)
        storage, bucket = striking(at, make)
        try:
            run_compaction(storage)
        except (Crash, StorageError):
            pass
        try:
            assert bucket.struck
            check(URL, written, FORGOTTEN)
            for _ in range(3):  # what was begun, lists that are done, and those of what was left over
                assert run_compaction(ObjectStorage.open(URL)).damaged == []
            check(URL, written)
            check_nothing_left_over(server)
        except BaseException as error:
            error.add_note(f"struck at request {at}")
            raise


@pytest.mark.parametrize("few", SAMPLED)
@pytest.mark.parametrize("make", [crash_before, crash_after, answer_lost, refused])
def test_a_fault_loses_and_doubles_nothing(
    server: TinyS3, template: tuple[Objects, Written], make: Any, few: int
) -> None:
    strike_everywhere(server, template, make, points(server, template[0], few))


@pytest.mark.parametrize("few", SAMPLED)
def test_two_compactions_at_once_lose_and_double_nothing(
    server: TinyS3, template: tuple[Objects, Written], few: int
) -> None:
    def whole_other(_: Striking) -> Callable[[Callable[[], Any]], Any]:
        def strike(request: Callable[[], Any]) -> Any:
            run_compaction(ObjectStorage.open(URL))
            return request()

        return strike

    strike_everywhere(server, template, whole_other, points(server, template[0], few))


@pytest.mark.parametrize("few", SAMPLED)
def test_a_run_that_is_resumed_meanwhile_goes_on_or_is_told_that_it_can_not(
    server: TinyS3, template: tuple[Objects, Written], few: int
) -> None:
    objects, written = template
    outcomes = set()
    for at in points(server, objects, few and few + 3):
        restore(server, objects)
        resumed: list[Any] = []

        def resume(_: Striking, resumed: list[Any] = resumed) -> Callable[[Callable[[], Any]], Any]:
            def strike(request: Callable[[], Any]) -> Any:
                try:
                    journal, events = ObjectStorage.open(URL).activate("fails", "")
                    goes_on = ev.RunActivated(seq=len(events), at=NOW, epoch=journal.epoch, cause="resume")
                    resumed.append(journal.append([goes_on]).result())
                except (FencedError, RunNotFoundError) as error:
                    resumed.append(error)
                return request()

            return strike

        storage, _ = striking(at, resume)
        try:
            run_compaction(storage)
        except StorageError:
            pass
        goes_on = isinstance(resumed[0], int)
        outcomes.add(goes_on)
        found = ObjectStorage.open(URL).read_run("fails")
        assert (len(found.events), found.finished) == (len(written["fails"]) + goes_on, not goes_on), at
        assert verify(ObjectStorage.open(URL)).damaged == []
    assert outcomes == {True, False}


# Owners, takers and makers that stood still ---------------------------------------------------------------------------


def end(storage: ObjectStorage, run_id: str) -> None:
    """Another owner takes the run and ends it; it is compacted, and its slots are removed."""
    journal, events = storage.activate(run_id, "")
    journal.append([ev.RunCompleted(seq=len(events), at=1.0, result=ev.Payload(enc="json", data=1))]).result()
    storage.unlist_finished(run_id)
    assert run_compaction(storage, Rules()).runs == 1
    assert storage.wait(storage.bucket.listing(run_prefix(run_id))) == []


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """More time has passed than may be trusted."""
    monkeypatch.setattr(trust, "TRUSTED_S", -1.0)


def test_a_stale_owner_is_fenced_though_all_slots_are_gone(
    empty: ObjectStorage, server: TinyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty.create_run(created("run", empty.storage_id))
    stale, _ = empty.activate("run", "", first=True)
    stale.append([fired(1)]).result()
    end(empty, "run")
    later(monkeypatch)
    assert isinstance(stale.append([fired(2)]).exception(), FencedError)
    assert stale.state == "fenced"
    assert not [key for key in server.objects if "/runs/" in key]


def test_a_stale_owner_whose_write_was_on_its_way_is_fenced(
    empty: ObjectStorage, server: TinyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slots go between his look and his write: what he wrote does not count, and he removes it."""
    empty.create_run(created("run", empty.storage_id))
    storage, bucket = striking(-1, refused)
    stale, _ = storage.activate("run", "", first=True)
    stale.append([fired(1)]).result()
    later(monkeypatch)

    def strike(request: Callable[[], Any]) -> Any:
        monkeypatch.setattr(trust, "TRUSTED_S", 300.0)
        end(ObjectStorage.open(URL), "run")
        later(monkeypatch)
        return request()

    bucket.arm(1, strike)  # 0 is his look
    assert isinstance(stale.append([fired(2)]).exception(), FencedError)
    assert bucket.struck
    history = ObjectStorage.open(URL).read_run("run")
    assert (history.finished, len(history.events)) == (True, 3)


def test_an_epoch_that_was_handed_out_long_ago_is_not_begun(
    empty: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty.create_run(created("run", empty.storage_id))
    late, _ = empty.activate("run", "", first=True)
    end(empty, "run")
    later(monkeypatch)
    assert isinstance(late.append([fired(1)]).exception(), FencedError)


def test_a_taker_that_stood_still_is_fenced(empty: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    empty.create_run(created("run", empty.storage_id))
    storage, bucket = striking(-1, refused)
    later(monkeypatch)

    def strike(request: Callable[[], Any]) -> Any:
        end(ObjectStorage.open(URL), "run")
        return request()

    reading = 2 + 2 * 2  # two looks at the manifest, one at the slots and one slot: then he claims
    bucket.arm(reading, strike)
    with pytest.raises((FencedError, RunNotFoundError)):
        storage.activate("run", "b")
    assert bucket.struck
    assert len(ObjectStorage.open(URL).read_run("run").events) == 2


def test_the_id_of_a_compacted_run_stays_taken(empty: ObjectStorage, server: TinyS3) -> None:
    maker = ObjectStorage.open(URL)
    assert maker.list_run_ids() == []
    write_run(empty, "run")
    run_compaction(empty, Rules())
    assert not [key for key in server.objects if "/runs/" in key]
    for storage in (maker, ObjectStorage.open(URL)):
        assert storage.create_runs([created("run", storage.storage_id, run_uid="another")]) == [False]
        with pytest.raises(RunNotFoundError, match="compacted"):
            storage.activate("run", "")
    assert not [key for key in server.objects if "/runs/" in key or "/active/" in key]
    assert len(empty.read_run("run").events) == 6


def test_what_a_maker_left_beside_a_compacted_run_does_not_count_and_goes(empty: ObjectStorage, server: TinyS3) -> None:
    write_run(empty, "run")
    run_compaction(empty, Rules())
    again = created("run", empty.storage_id, run_uid="another")
    assert empty.wait(empty._create([again], "")) == {"run"}  # and dies before it looks
    assert len(empty.list_run_ids()) == 1
    for _ in range(2):
        assert run_compaction(ObjectStorage.open(URL), Rules()).damaged == []
    assert not [key for key in server.objects if "/runs/" in key or "/active/" in key]
    assert len(ObjectStorage.open(URL).read_run("run").events) == 6


def test_an_id_is_free_again_once_retention_took_its_run(empty: ObjectStorage) -> None:
    write_run(empty, "run")
    rules = Rules(retain_s={"completed": 1.0})
    for _ in range(3):
        done = run_compaction(empty, rules)
    assert empty.list_run_ids() == []
    fresh = ObjectStorage.open(URL)
    fresh.create_run(created("run", empty.storage_id, run_uid="another"))
    assert len(fresh.read_run("run").events) == 1
    assert verify(fresh).damaged == done.damaged == []


# What is slow on purpose ----------------------------------------------------------------------------------------------


def test_slots_stay_for_an_hour_after_their_run_was_moved(empty: ObjectStorage, server: TinyS3) -> None:
    write_run(empty, "run")
    assert compact(empty, now=NOW).waiting == 1
    assert compact(empty, now=NOW).waiting == 1
    assert len([key for key in server.objects if "/runs/" in key]) == 8
    for key, (data, at) in list(server.objects.items()):
        server.objects[key] = data, at - trust.GRACE_S - 2.0
    done = compact(empty, now=NOW)
    assert (done.waiting, done.damaged) == (0, [])
    assert not [key for key in server.objects if "/runs/" in key]
    assert len([key for key in server.objects if "/retiring/" in key]) == 2
    assert compact(empty, now=NOW, dry_run=True).waiting == 0


@pytest.mark.parametrize("table", ["events", "ids/"])
def test_slots_stay_where_the_checkpoint_is_damaged(empty: ObjectStorage, server: TinyS3, table: str) -> None:
    write_run(empty, "run")
    compact(empty, now=NOW)
    key = next(key for key in server.objects if table in key.partition("checkpoints/")[2])
    data, at = server.objects[key]
    server.objects[key] = data[:-30] + bytes([data[-30] ^ 1]) + data[-29:] if len(data) > 30 else b"\1" * len(data), at
    damaged = verify(ObjectStorage.open(URL)).damaged
    assert key.rpartition("/")[2] in damaged[0].path
    if table == "events":
        assert run_compaction(ObjectStorage.open(URL)).damaged
    else:
        with pytest.raises(StorageError, match="is damaged"):
            run_compaction(ObjectStorage.open(URL))
    assert len([key for key in server.objects if "/runs/" in key]) == 8


def test_a_history_that_loses_its_slots_while_it_is_read_is_not_cut_short(whole: Written, server: TinyS3) -> None:
    read = ObjectStorage.open(URL)
    storage, bucket = striking(-1, refused)
    assert len(storage.read_slots("moved").events) == 6

    def strike(request: Callable[[], Any]) -> Any:
        prefix = "compacted/" + run_prefix("moved")
        for key in [key for key in server.objects if key.startswith(prefix) and key != f"{prefix}0000000000"]:
            del server.objects[key]
        server.objects.pop("compacted/" + slot_key("moved", 0), None)
        return request()

    bucket.arm(5, strike)
    assert storage.read_run("moved").events == read.read_run("moved").events == whole["moved"]
    assert bucket.struck


@pytest.mark.parametrize("where", ["runs/", "blobs/", "leases/", "breakers/", "storage.json", "retiring/"])
def test_verify_names_what_is_damaged(empty: ObjectStorage, server: TinyS3, where: str) -> None:
    from pyworkflow_ray.storage.objects.breakers import ObjectBreakerStates

    write_run(empty, "run")
    compact(empty, now=NOW)
    write_run(empty, "other", end="running")
    empty.put_blob(b"x" * 100)
    empty.join_lease().close()
    ObjectBreakerStates(URL, "b").save([], 1.0)
    assert verify(empty).damaged == []
    part = f"{run_prefix('other')}0000000001" if where == "runs/" else where
    key = next(key for key in server.objects if key.startswith(f"compacted/{part}"))
    data, at = server.objects[key]
    server.objects[key] = data[:70] + bytes([data[70] ^ 1]) + data[71:], at
    damaged = verify(empty).damaged
    assert len(damaged) == 1
    assert (damaged[0].run_id, "other" in damaged[0].path) == (("other", True) if where == "runs/" else (None, False))


def test_looking_writes_nothing(empty: ObjectStorage, server: TinyS3) -> None:
    write_run(empty, "moved")
    compact(empty, now=NOW)
    write_run(empty, "run")
    before = dict(server.objects)
    done = compact(ObjectStorage.open(URL, create=False), now=NOW, dry_run=True)
    assert (done.runs, done.waiting) == (1, 1)
    assert verify(ObjectStorage.open(URL, create=False)).damaged == []
    assert server.objects == before


def test_a_dry_run_leaves_alone_what_a_compaction_would_remove(empty: ObjectStorage, server: TinyS3) -> None:
    write_run(empty, "run")
    slots = {key: one for key, one in server.objects.items() if "/runs/" in key}
    for _ in range(3):
        run_compaction(empty, Rules())
    before = server.objects | slots
    restore(server, before)
    assert compact(ObjectStorage.open(URL, create=False), now=NOW, dry_run=True).damaged == []
    assert server.objects == before


def test_a_list_with_a_run_that_no_checkpoint_holds_is_reported_and_stops_nothing(empty: ObjectStorage) -> None:
    write_run(empty, "run")
    empty.wait(retire.note(empty.bucket, empty.storage_id, [retire.Going("nobody", 1, "0" * 64)]))
    done = run_compaction(empty, Rules())
    assert (done.runs, [run_id for run_id, _ in done.damaged]) == (1, ["nobody"])


def test_a_checkpoint_that_another_compaction_replaces_is_not_called_damaged(empty: ObjectStorage) -> None:
    write_run(empty, "run")
    compact(empty, now=NOW)
    lists, before = empty.wait(retire.read_lists_now(empty.bucket)), CompactedRuns(empty)
    write_run(empty, "another")
    assert compact(ObjectStorage.open(URL), now=NOW).merged == 2
    retirement = retire.Retirement(empty.bucket, before, lists, 0.0)
    assert [retirement.proved(token) for token in retirement.due()] == [[]]
    assert retirement.damaged == []


async def test_deleting_many_deletes_the_rest_where_some_are_gone(tmp_path: Path) -> None:
    bucket = ObstoreBucket("file:///here", LocalStore(tmp_path))  # as GCS does, it tells of each that is gone
    keys = [f"runs/{number:02d}" for number in range(40)]
    for key in keys[1:]:
        await bucket.put(key, b"")
    await bucket.delete_many(keys)
    assert await bucket.listing("runs/") == []
