"""Leases: nobody takes a run whose owner may live, whoever is dead stays dead, and one taker wins."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pyworkflow_ray.errors import CorruptJournalError, FencedError
from pyworkflow_ray.storage.lease import Lease, Orphan, dead_leases, lease_states, orphans
from pyworkflow_ray.storage.storage import Storage
from tests.journals import created, ended, fired, make_run


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path / "s")


def lease_file(storage: Storage, lease_id: str, suffix: str = "lease") -> Path:
    return Path(storage.root, "leases", f"{lease_id}.{suffix}")


def test_a_lease_lives_while_anybody_holds_it_and_dies_with_the_last(storage: Storage) -> None:
    controller = Lease.join(storage)
    anchor = Lease.join(storage, controller.id)
    assert dead_leases(storage) == set()
    controller.close()
    assert dead_leases(storage) == set()
    assert not lease_file(storage, anchor.id, "dead").exists()
    anchor.close()
    assert lease_states(storage, declare=False).living == {anchor.id}
    assert dead_leases(storage) == {anchor.id}
    assert dead_leases(storage) == {anchor.id}


def test_who_held_a_dead_lease_must_make_a_new_one(storage: Storage) -> None:
    with Lease.join(storage) as lease:
        pass
    dead_leases(storage)
    with pytest.raises(FencedError, match=f"{lease.id} is dead.*make a new one"):
        Lease.join(storage, lease.id)
    with pytest.raises(FencedError, match="does not exist"):
        Lease.join(storage, "0" * 32)
    with pytest.raises(FencedError, match="does not exist"):
        Lease.join(storage, "../../etc/passwd")
    assert Lease.join(storage).id != lease.id


def test_a_lease_can_be_joined_again_while_it_is_not_declared_dead(storage: Storage) -> None:
    """A restarted controller goes on with the lease of its cluster."""
    lease = Lease.join(storage)
    lease.close()
    again = Lease.join(storage, lease.id)
    assert again.id == lease.id
    assert dead_leases(storage) == set()
    again.close()


def test_a_forked_child_does_not_keep_a_lease_alive(storage: Storage) -> None:
    lease = Lease.join(storage)
    read_end, write_end = os.pipe()
    born, tell_born = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell_born, b"x")
        os.close(write_end)
        os.read(read_end, 1)  # lives until the parent lets it go
        os._exit(0)
    try:
        os.close(read_end)
        os.read(born, 1)
        assert dead_leases(storage) == set()  # the child's end did not free the parent's lock
        lease.close()
        assert dead_leases(storage) == {lease.id}
    finally:
        for fd in (write_end, born, tell_born):
            os.close(fd)
        os.waitpid(child, 0)


def test_descriptors_of_leases_are_not_inherited(storage: Storage) -> None:
    with Lease.join(storage) as lease:
        assert lease._fd is not None
        assert not os.get_inheritable(lease._fd)


@pytest.mark.parametrize("suffix", ["lease", "dead"])
def test_every_flipped_bit_of_a_lease_or_its_mark_is_refused(storage: Storage, suffix: str) -> None:
    lease = Lease.join(storage)
    lease.close()
    if suffix == "dead":
        dead_leases(storage)
    make_run(storage, lease=lease.id)
    path = lease_file(storage, lease.id, suffix)
    data = path.read_bytes()
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        states = lease_states(storage, declare=True)
        assert (states.dead, set(states.damaged)) == (set(), {lease.id}), f"bit {bit}"
        # Nothing proves that the owner is gone: its runs are left alone.
        found = orphans(storage, states=states)
        assert (found.runs, set(found.damaged)) == ([], {"run"})
        if suffix == "lease":
            with pytest.raises(CorruptJournalError):
                Lease.join(storage, lease.id)


def test_a_mark_of_another_lease_counts_for_nothing(storage: Storage) -> None:
    first, second = Lease.join(storage), Lease.join(storage)
    first.close()
    dead_leases(storage)
    lease_file(storage, second.id, "dead").write_bytes(lease_file(storage, first.id, "dead").read_bytes())
    states = lease_states(storage, declare=True)
    assert (states.dead, set(states.damaged)) == ({first.id}, {second.id})
    second.close()


def test_only_runs_that_nobody_holds_are_orphans(storage: Storage) -> None:
    living, dead = Lease.join(storage), Lease.join(storage)
    make_run(storage, "living", lease=living.id)
    make_run(storage, "dead", lease=dead.id, events=2)
    make_run(storage, "nobody")
    make_run(storage, "unknown", lease="f" * 32)
    make_run(storage, "damaged", lease=dead.id)
    make_run(storage, "ended", lease=dead.id)
    journal, _ = storage.activate("ended", dead.id)
    journal.append([ended(1)]).result()
    journal.close()
    path = next(Path(storage.root, "runs").glob("*/damaged/0.journal"))
    path.write_bytes(path.read_bytes()[:-9] + b"damaged!\n")
    dead.close()
    found = orphans(storage)
    assert found.runs == [Orphan("dead", 0, dead.id), Orphan("nobody", 0, "")]
    assert found.held == {"living": living.id}
    assert sorted(found.damaged) == ["damaged", "unknown"]
    assert f"{'f' * 32}.lease is missing" in found.damaged["unknown"]
    assert "ended" not in storage.unfinished()
    living.close()


def test_the_owner_of_a_run_is_the_lease_of_its_newest_epoch(storage: Storage) -> None:
    first, second = Lease.join(storage), Lease.join(storage)
    make_run(storage, lease=first.id)
    storage.activate("run", second.id)[0].close()
    first.close()
    assert orphans(storage).held == {"run": second.id}
    second.close()
    assert orphans(storage).runs == [Orphan("run", 1, second.id)]


def test_of_two_recoveries_one_wins_each_run(storage: Storage) -> None:
    for number in range(5):
        make_run(storage, f"r{number}", lease=(dead := Lease.join(storage)).id)
        dead.close()
    first, second = Lease.join(storage), Lease.join(storage)
    seen_by_first, seen_by_second = orphans(storage).runs, orphans(storage).runs
    assert seen_by_first == seen_by_second
    won = []
    for orphan in seen_by_first[:3]:
        storage.activate(orphan.run_id, first.id, after=orphan.epoch)[0].close()
    for orphan in seen_by_second:
        try:
            storage.activate(orphan.run_id, second.id, after=orphan.epoch)[0].close()
            won.append(orphan.run_id)
        except FencedError:
            pass
    assert won == ["r3", "r4"]
    assert {run_id: storage.owner(run_id).lease for run_id in storage.unfinished()} == {
        "r0": first.id, "r1": first.id, "r2": first.id, "r3": second.id, "r4": second.id,
    }  # fmt: skip
    assert orphans(storage).runs == []
    first.close()
    second.close()


def test_a_run_is_owned_from_its_creation_on(storage: Storage) -> None:
    with Lease.join(storage) as lease:
        storage.create_run(created("run", storage.storage_id), lease=lease.id)
        assert orphans(storage).held == {"run": lease.id}
        journal, _ = storage.activate("run", lease.id, first=True)
        assert journal.append([fired(1)]).result() == 1


def test_a_lease_that_another_process_is_declaring_dead_is_found_dead(tmp_path: Path) -> None:
    """A look at the very moment of another's look must not take the dead for living."""
    storage = Storage.open(tmp_path)
    dead = Lease.join(storage)
    lease_id = dead.id
    dead.close()
    for _ in range(20):
        with ThreadPoolExecutor(4) as pool:
            seen = list(pool.map(lambda _: dead_leases(Storage.open(tmp_path)), range(4)))
        assert all(lease_id in leases for leases in seen)
        (tmp_path / "leases" / f"{lease_id}.dead").unlink()


def test_a_copy_that_lost_its_empty_directories_is_recovered(storage: Storage) -> None:
    lease = Lease.join(storage)
    make_run(storage, lease=lease.id)
    lease.close()
    Path(storage.root, "tmp").rmdir()
    assert [orphan.run_id for orphan in orphans(storage).runs] == ["run"]
