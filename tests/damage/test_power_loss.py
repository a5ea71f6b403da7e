"""A power loss at every moment of making, appending, taking over, resuming, folding, finishing and compacting, with
every subset of what was not yet synced surviving: nothing acknowledged is lost, and every run goes on."""

from __future__ import annotations

import pytest

from pyworkflow_ray.storage.storage import Storage
from tests.damage.power import LoggedDisk, states_after
from tests.damage.scenarios import IN_MEMORY, Ledger, Scenario, check_storage

ROOT = "/storage"


class Noting(Ledger):
    """Remembers after how many operations of the disk each thing was acknowledged."""

    def __init__(self, disk: LoggedDisk) -> None:
        super().__init__()
        self.disk = disk
        self.times: list[tuple[int, dict[str, list[str]], int]] = []

    def has(self, run_id: str, *events: object) -> None:
        super().has(run_id, *events)  # type: ignore[arg-type]
        self.note()

    def note(self) -> None:
        acknowledged = {name: list(events) for name, events in self.acknowledged.items()}
        self.times.append((len(self.disk.log), acknowledged, len(self.blobs)))

    def at(self, moment: int) -> Ledger:
        acknowledged: dict[str, list[str]] = {}
        blobs = 0
        for when, known, stored in self.times:
            if when <= moment:
                acknowledged, blobs = known, stored
        return Ledger(self.attempted, acknowledged, self.blobs[:blobs])


def recorded(scenario: Scenario) -> tuple[Noting, LoggedDisk]:
    first = LoggedDisk()
    storage = Storage.open(ROOT, disk=first)
    before = Ledger()
    scenario.prepare(storage, before)
    disk = LoggedDisk(first.tree)
    ledger = Noting(disk)
    ledger.attempted, ledger.acknowledged = before.attempted, before.acknowledged
    ledger.note()
    scenario.act(Storage(storage.root, storage.storage_id, disk), ledger)
    ledger.note()
    return ledger, disk


def lose_power(scenario: Scenario, step: int) -> int:
    ledger, disk = recorded(scenario)
    seen: set[object] = set()
    for moment in range(len(disk.log) + 1):
        at = ledger.at(moment)
        for number, (lost, tree) in enumerate(states_after(disk.start, disk.log[:moment], seed=moment)):
            if number % step:
                continue
            key = (frozenset((name, tree.contents.get(file or -1)) for name, file in tree.names.items()), repr(at))
            if key in seen:
                continue
            seen.add(key)
            try:
                check_storage(Storage.open(ROOT, create=False, disk=LoggedDisk(tree)), at)
            except Exception as broken:
                done = disk.log[moment - 1] if moment else None
                raise AssertionError(
                    f"{scenario.name}, power lost after {moment} ({done}), {lost}: {broken!r}"
                ) from broken
    return len(seen)


@pytest.mark.parametrize("scenario", IN_MEMORY, ids=lambda scenario: scenario.name)
def test_what_a_power_loss_may_leave_of_some_moments_loses_nothing(scenario: Scenario) -> None:
    lose_power(scenario, step=31 if scenario.name == "compact" else 13)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", IN_MEMORY, ids=lambda scenario: scenario.name)
def test_what_a_power_loss_may_leave_of_any_moment_loses_nothing(scenario: Scenario) -> None:
    assert lose_power(scenario, step=1) > 5
