"""Health without Ray: what each answer means, and what hangs is left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.errors import StorageError
from pyworkflow_ray.health import _Asked, examine
from pyworkflow_ray.health_checks import (
    RunsSeen,
    Silent,
    anchors_check,
    controller_check,
    pool_check,
    ray_check,
    runs_check,
    storage_check,
    timers_check,
)
from pyworkflow_ray.observability.health import Absent, Check, HealthReport, check_rows
from pyworkflow_ray.runtime.vitals import AnchorVitals, PoolVitals, RayVitals, Vitals
from pyworkflow_ray.storage.disk import Disk
from pyworkflow_ray.storage.probe import Probe, probe_directory
from pyworkflow_ray.storage.storage import Storage

ROOT = Path(__file__).resolve().parents[2]


def vitals(**changes: Any) -> Vitals:
    pool = PoolVitals("k", actors=2, starting=0, busy=2, waiting=0, most=2, failures=0, held=True)
    given: dict[str, Any] = {
        "pid": 7, "lease": "l", "rebuilt": True, "draining": False, "pools": [pool], "states": {"running": 2},
        "timers": 3, "timer_lag_s": 0.0,
    }  # fmt: skip
    return Vitals(**{**given, **changes})


def probe(**changes: Any) -> Probe:
    given: dict[str, Any] = {
        "write_s": 0.001, "sync_s": 0.001, "free_bytes": 10**10, "free_share": 0.5, "free_inodes": 10**6
    }  # fmt: skip
    return Probe(**{**given, **changes})


def test_whatever_is_not_in_order_has_a_remedy() -> None:
    hung, gone = Silent("no answer within 5s", 5.0), ConnectionError("gone")
    checks = [
        *(ray_check(answer, 1.0, None) for answer in (hung, gone, RayVitals("a", 1, {}))),
        *(controller_check(answer, 1.0, "") for answer in (hung, gone, vitals(draining=True), vitals(rebuilt=False))),
        controller_check(hung, 1.0, "restarting"),
        *(anchors_check(answer, 1.0, vitals()) for answer in (gone, AnchorVitals(2, 1, set(), []))),
        anchors_check(AnchorVitals(0, 0, set(), []), 1.0, vitals()),
        pool_check(vitals(), gone, 1.0),
        pool_check(vitals(), ([], ["pid 5 on node x"]), 1.0),
        *(storage_check(answer, 1.0, "/s") for answer in (hung, gone, probe(free_bytes=1), probe(free_inodes=3))),
        storage_check(probe(sync_s=2.0), 1.0, "/s"),
        runs_check(gone, 1.0),
        runs_check(RunsSeen(2, damaged={"a": "torn"}), 1.0),
        timers_check(vitals(timer_lag_s=9.0), RunsSeen()),
        timers_check(vitals(late=[("a", 90.0)]), RunsSeen()),
    ]
    for check in checks:
        assert check.status in ("degraded", "failing"), check
        assert check.remedy, check
        assert check.why, check


@pytest.mark.parametrize(
    ("check", "status"),
    [
        (ray_check(Absent(), 0.1, None), "skipped"),
        (ray_check(RayVitals("a", 1, {"CPU": 2.0}), 0.1, None), "ok"),
        (controller_check(Absent(), 0.1, ""), "skipped"),
        (controller_check(vitals(), 0.1, ""), "ok"),
        (anchors_check(AnchorVitals(2, 2, set(), []), 0.1, vitals()), "failing"),
        (anchors_check(AnchorVitals(0, 0, set(), []), 0.1, Absent()), "skipped"),
        (storage_check(None, 0.1, "/s"), "ok"),
        (storage_check(probe(), 0.1, "/s"), "ok"),
        (timers_check(vitals(timer_lag_s=4.0), RunsSeen()), "ok"),
        (timers_check(vitals(timer_lag_s=61.0), RunsSeen()), "failing"),
        (timers_check(Absent(), RunsSeen()), "ok"),
        (runs_check(RunsSeen(), 0.1), "ok"),
    ],
    ids=lambda value: f"{value.name}: {value.why}" if isinstance(value, Check) else value,
)
def test_verdicts(check: Check, status: str) -> None:
    assert check.status == status


def report(*statuses: str) -> HealthReport:
    checks = [Check.model_validate({"name": f"c{i}", "status": s, "why": "<b>"}) for i, s in enumerate(statuses)]
    return HealthReport.model_validate({"at": "2026-01-01T00:00:00Z", "storage": "/s", "checks": checks})


@pytest.mark.parametrize(
    ("statuses", "status", "true"),
    [
        (["ok", "skipped"], "ok", True),
        (["ok", "degraded"], "degraded", True),
        (["degraded", "failing", "ok"], "failing", False),
        (["skipped"], "ok", True),
    ],
)
def test_a_report_is_as_bad_as_its_worst_check(statuses: list[str], status: str, true: bool) -> None:
    one = report(*statuses)
    assert (one.status, bool(one)) == (status, true)
    assert one.model_dump(mode="json")["status"] == status
    assert one["c0"].name == "c0"
    with pytest.raises(KeyError):
        _ = one["nosuch"]


def test_a_report_in_a_notebook_is_escaped_and_has_what_the_text_has() -> None:
    html, text = report("failing", "ok")._repr_html_(), str(report("failing", "ok"))
    assert "<b>" not in html.replace("<b>✗ failing", "")
    assert "&lt;b&gt;" in html
    assert "<script" not in html
    for row in check_rows(report("failing", "ok")):
        assert row[1] in text


def test_what_hangs_is_left_behind() -> None:
    never = threading.Event()
    began = time.monotonic()
    outcome = _Asked(never.wait, 0.05).outcome()
    assert isinstance(outcome, Silent)
    assert time.monotonic() - began < 5
    never.set()


def test_an_error_of_its_own_is_no_silence() -> None:
    def ask() -> None:
        raise TimeoutError("its own")

    asked = _Asked(ask, 30.0)
    while not asked._answer.done():
        time.sleep(0.001)
    assert str(asked.outcome()) == "its own"


class HangingDisk(Disk):
    """A disk whose sync does not come back until `free` is set."""

    def __init__(self) -> None:
        self.free = threading.Event()

    def fsync(self, fd: int) -> None:
        self.free.wait()


def test_a_disk_that_hangs_costs_its_limit_alone(tmp_path: Path) -> None:
    Storage.open(tmp_path / "s")
    disk = HangingDisk()
    answer = _Asked(lambda: probe_directory(str(tmp_path / "s"), disk), 0.05).outcome()
    assert storage_check(answer, 0.05, "s").status == "failing"
    disk.free.set()


class LyingDisk(Disk):
    def read(self, path: str, limit: int | None = None, start: int = 0) -> bytes:
        return b"something else"


def test_bytes_that_come_back_otherwise_are_noticed(tmp_path: Path) -> None:
    Storage.open(tmp_path / "s")
    with pytest.raises(StorageError, match="other bytes came back"):
        probe_directory(str(tmp_path / "s"), LyingDisk())
    assert not list((tmp_path / "s" / "tmp").iterdir())


def test_the_probe_writes_and_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "s"
    Storage.open(root)
    before = sorted(root.rglob("*"))
    found = probe_directory(str(root))
    assert found.sync_s > 0
    assert found.free_bytes
    assert sorted(root.rglob("*")) == before


def test_a_storage_that_is_not_there_yet_is_no_fault_and_is_not_made(tmp_path: Path) -> None:
    found = examine(tmp_path / "a" / "b", "local", None)
    assert found.status == "ok"
    assert found["storage"].why == "it does not exist yet: the first start makes it"
    assert found["controller"].status == "skipped"
    assert not (tmp_path / "a").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_no_storage_can_be_made_is_failing_whatever_its_mode_says() -> None:

    found = examine(Path("/proc/none/storage"), "local", None)
    assert found["storage"].status == "failing"
    assert "storage='/proc/none/storage' does not exist, and can't be made in /proc: " in found["storage"].why
    assert found["storage"].remedy is not None


def test_a_damaged_storage_is_failing(tmp_path: Path) -> None:
    Storage.open(tmp_path / "s")
    (tmp_path / "s" / "storage.json").write_bytes(b"{}")
    found = examine(tmp_path / "s", "local", None)
    assert found.status == "failing"
    assert "storage.json" in found["storage"].why


NOBODY = 65534
READ_ONLY = """
import os, sys
from pyworkflow_ray import health  # a name of ours, while everything can still be read
from pyworkflow_ray.health import examine
import pyworkflow_ray.storage.probe, pyworkflow_ray.settings, pyworkflow_ray.cli.main
examine(sys.argv[1], "local", None)
if os.geteuid() == 0:
    os.setgid(int(sys.argv[2])), os.setuid(int(sys.argv[2]))
os.chmod(sys.argv[1] + "/tmp", 0o500)
found = examine(sys.argv[1], "local", None)
print(found["storage"].status, found["storage"].why, found["storage"].remedy, sep="|")
"""


def test_a_directory_that_can_not_be_written_is_failing() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # one that another user may enter
        os.chmod(folder, 0o755)
        root = f"{folder}/s"
        Storage.open(root)
        if os.geteuid() == 0:
            for path in (root, *map(str, Path(root).rglob("*"))):
                shutil.chown(path, NOBODY, NOBODY)
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, root, str(NOBODY)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd="/", capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    status, why, remedy = done.stdout.strip().split("|")
    assert status == "failing"
    assert "Permission denied" in why
    assert f"make {root} writable" in remedy
