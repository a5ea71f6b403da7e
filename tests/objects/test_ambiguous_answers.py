"""Every ambiguous answer, given by a proxy between us and a real S3 server, to every request that writes.

What is acknowledged is there, what is there was attempted, nobody is fenced by a fault alone; a test counts only if its
fault has struck.
"""

from __future__ import annotations

import pytest

from benchmarks.object_server import Fault, Proxy
from pyworkflow_ray.errors import FencedError, StorageError
from pyworkflow_ray.storage.lease import orphans
from pyworkflow_ray.storage.objects.storage import ObjectStorage
from tests.journals import created, ended, fired, names

FAULTS = ["stored-503", "stored-drop", "409", "412", "503", "late", "delay"]


def fault(what: str, part: str, times: int = 1) -> Fault:
    return Fault(what, part, times=times, after_s=0.05 if what in ("late", "delay") else 0.0)


def struck(proxy: Proxy, what: str, times: int = 1) -> None:
    assert proxy.struck.count[what] == times
    proxy.landed()


@pytest.mark.parametrize("what", FAULTS)
def test_a_run_is_made_once(store: ObjectStorage, proxy: Proxy, what: str) -> None:
    proxy.faults = [fault(what, "/run/0000000000")]
    assert store.create_runs([created("run", store.storage_id)], lease="mine") == [True]
    struck(proxy, what)
    assert store.create_runs([created("run", store.storage_id)], lease="theirs") == [False]
    assert store.owner("run").lease == "mine"


@pytest.mark.parametrize("what", FAULTS)
def test_what_is_appended_is_there_once(store: ObjectStorage, proxy: Proxy, what: str) -> None:
    store.create_run(created("run", store.storage_id))
    journal, _ = store.activate("run", "", first=True)
    journal.append([fired(1)]).result()
    proxy.faults = [fault(what, "/run/0000000003")]
    futures = [journal.append([fired(seq)]) for seq in (2, 3, 4, 5)]
    assert [future.result() for future in futures] == [2, 3, 4, 5]
    struck(proxy, what)
    assert [event.seq for event in store.read_run("run").events] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("what", FAULTS)
def test_a_run_is_taken_over_once(store: ObjectStorage, proxy: Proxy, what: str) -> None:
    store.create_run(created("run", store.storage_id))
    proxy.faults = [fault(what, "/run/0000000001")]
    journal, events = store.activate("run", "b", after=0)
    struck(proxy, what)
    assert (journal.epoch, names(events)) == (1, ["run_created"])
    journal.append([fired(1)]).result()
    with pytest.raises(FencedError):
        store.activate("run", "c", after=0)


def test_a_stale_owner_is_refused_whatever_the_store_answers(store: ObjectStorage, proxy: Proxy) -> None:
    store.create_run(created("run", store.storage_id))
    stale, _ = store.activate("run", "", first=True)
    stale.append([fired(1, "a")]).result()
    taker, _ = store.activate("run", "b")
    proxy.faults = [fault("stored-503", "/run/0000000002")]
    refused = [stale.append([fired(2, "a")]), stale.append([fired(3, "a")])]
    for future in refused:
        assert isinstance(future.exception(), FencedError)
    struck(proxy, "stored-503")
    assert stale.state == "fenced"
    taker.append([fired(2, "b")]).result()
    assert names(store.read_run("run").events) == ["run_created", "timer_fired:a", "timer_fired:b"]


def test_nothing_above_a_slot_of_unknown_fate_is_acknowledged(
    store: ObjectStorage, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "place", lambda run_id, real=store.place: replace_tries(real(run_id)))
    store.create_run(created("run", store.storage_id))
    journal, _ = store.activate("run", "")
    proxy.faults = [fault("503", "/run/0000000017", times=2)]
    lost, above = journal.append([fired(1)]), journal.append([fired(2)])
    assert isinstance(lost.exception(), StorageError)
    assert isinstance(above.exception(), StorageError)
    struck(proxy, "503", 2)
    assert journal.state == "abandoned"
    assert isinstance(journal.append([fired(3)]).exception(), StorageError)
    again, events = store.activate("run", "")
    assert (again.epoch, names(events)) == (2, ["run_created"])


def replace_tries(place: object) -> object:
    import dataclasses

    return dataclasses.replace(place, tries=2)  # type: ignore[type-var]


@pytest.mark.parametrize("what", ["stored-503", "stored-drop", "503", "409"])
def test_an_expired_lease_is_marked_dead_once(
    store: ObjectStorage, proxy: Proxy, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = store.join_lease()
    store.create_run(created("run", store.storage_id), lease=lease.id)
    lease.close()
    monkeypatch.setattr("pyworkflow_ray.storage.objects.leases.EXPIRE_S", -1.0)
    proxy.faults = [fault(what, "/leases/")]
    first = orphans(store, states=store.lease_states(declare=True))
    second = orphans(store, states=store.lease_states(declare=True))
    struck(proxy, what)
    assert [orphan.run_id for orphan in second.runs] == ["run"]
    assert what.startswith("stored") <= bool(first.runs)
    with pytest.raises(FencedError, match="dead"):
        store.join_lease(lease.id)


def test_a_finished_run_leaves_the_index(store: ObjectStorage, proxy: Proxy) -> None:
    store.create_run(created("run", store.storage_id))
    journal, _ = store.activate("run", "", first=True)
    journal.append([ended(1)]).result()
    assert store.unfinished() == ["run"]
    proxy.faults = [Fault("503", "", method="POST"), Fault("503", "", method="DELETE")]
    assert store.unlist_finished("run")
    assert store.unfinished() == []
    assert store.list_run_ids() == store.list_run_ids(True) == ["run"]
    resumed, _ = store.activate("run", "")
    resumed.close()
    assert store.unfinished() == ["run"]
