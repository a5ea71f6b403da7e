"""Every call of the disk failing or the process dying at it, one after another: nothing acknowledged is lost, and once
the fault is lifted everything goes on.

`make test` strikes every thirteenth call on a disk in memory and a few on the real one, `make test-all` each in
memory and every third on the real one. A crash here is an exception after which the dead process's disk does nothing
more; tests/crash kills real processes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pyworkflow_ray.storage.disk import Disk
from pyworkflow_ray.storage.storage import Storage
from tests.damage.power import LoggedDisk
from tests.damage.scenarios import IN_MEMORY, SCENARIOS, Ledger, Scenario, check_storage, clean
from tests.damage.striking import MODES, Crash, Interrupt, StrikingDisk, StrikingMemory


def strike(root: str, scenario: Scenario, disk: StrikingDisk | StrikingMemory, ledger: Ledger, healthy: Disk) -> bool:
    """One scenario with one fault; False where it has no so many calls."""
    storage = Storage.open(root, create=False, disk=healthy)
    open_before = set(os.listdir("/proc/self/fd"))
    error: BaseException | None = None
    try:
        scenario.act(Storage(storage.root, storage.storage_id, disk), ledger)
    except (Exception, Crash, Interrupt) as raised:
        error = raised
    if not disk.struck:
        assert error is None
        return False
    context = f"scenario {scenario.name!r}, {disk.struck}: {error!r}"
    try:
        if not isinstance(error, (Crash, Interrupt)):
            assert clean(error), f"not our error: {error!r}"
            del error
            assert set(os.listdir("/proc/self/fd")) <= open_before, "descriptors are left open"
            if disk.calls[disk.at][0] not in ("unlink", "rmdir"):
                left = healthy_disk(disk, healthy).listdir(f"{root}/tmp")
                assert not left, f"temporary files are left: {left}"
        _check_never_synced_again(disk)
        check_storage(Storage.open(root, create=False, disk=healthy_disk(disk, healthy)), ledger)
    except Exception as broken:
        raise AssertionError(f"{context}: {broken!r}") from broken
    return True


def healthy_disk(disk: StrikingDisk | StrikingMemory, healthy: Disk) -> Disk:
    """What the fault left, on a disk without faults."""
    return LoggedDisk(disk.tree) if isinstance(disk, StrikingMemory) else healthy


def _check_never_synced_again(disk: StrikingDisk | StrikingMemory) -> None:
    name, descriptor = disk.calls[disk.at]
    if name not in ("write", "fdatasync"):
        return
    for later, what in disk.calls[disk.at + 1 :]:
        if (what == descriptor and later == "close") or later in ("write_file", "open_append"):
            return  # from here on the number may be another file's
        assert (later, what) not in (("write", descriptor), ("fdatasync", descriptor)), "used after it failed"


def strike_all(scenario: Scenario, mode: str, step: int, real: Path | None = None) -> int:
    """Strike every `step`-th call, in memory or in a real directory; the number of calls."""
    at = MODES.index(mode) % step
    prepared, before = LoggedDisk(), Ledger()
    if real is None:
        scenario.prepare(Storage.open("/storage", disk=prepared), before)
        for shard in prepared.listdir("/storage/runs"):  # as in a copy that left out empty directories; and quicker
            if not prepared.listdir(f"/storage/runs/{shard}"):
                del prepared.tree.names[f"/storage/runs/{shard}"]
    while True:
        ledger = before.copy()
        if real is None:
            memory = StrikingMemory(prepared.tree)
            memory.strikes(at, mode)
            struck = strike("/storage", scenario, memory, ledger, prepared)
        else:
            root, disk = str(real / str(at)), StrikingDisk()
            scenario.prepare(Storage.open(root), ledger)
            disk.strikes(at, mode)
            struck = strike(root, scenario, disk, ledger, Disk())
            shutil.rmtree(root)  # thousands of directories, else
        if not struck:
            return at
        at += step


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scenario", IN_MEMORY, ids=lambda scenario: scenario.name)
def test_a_fault_at_some_calls_of_the_disk_loses_nothing(scenario: Scenario, mode: str) -> None:
    strike_all(scenario, mode, step=61 if scenario.name == "compact" else 13)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_fault_at_a_few_calls_of_the_real_disk_loses_nothing(tmp_path: Path, scenario: Scenario) -> None:
    strike_all(scenario, "ENOSPC", step=401 if scenario.name == "compact" else 53, real=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scenario", IN_MEMORY, ids=lambda scenario: scenario.name)
def test_a_fault_at_every_call_of_the_disk_loses_nothing(scenario: Scenario, mode: str) -> None:
    assert strike_all(scenario, mode, step=1) > 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_fault_at_every_third_call_of_the_real_disk_loses_nothing(
    tmp_path: Path, scenario: Scenario, mode: str
) -> None:
    assert strike_all(scenario, mode, step=11 if scenario.name == "compact" else 3, real=tmp_path) > 3
