"""The catalogue while processes die at its every step, and while several list, end runs and compact at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.failpoints import EXIT_CODE
from pyworkflow_ray.storage.catalogue import Query
from pyworkflow_ray.storage.catalogue_check import check
from pyworkflow_ray.storage.compact import compact
from pyworkflow_ray.storage.listing import page, scan
from pyworkflow_ray.storage.sql import rows
from pyworkflow_ray.storage.stocktaking import take_in
from pyworkflow_ray.storage.storage import Storage
from tests.journals import created, ended

TAKE_IN = """
import sys
from pyworkflow_ray.storage.stocktaking import rebuild, take_in
from pyworkflow_ray.storage.storage import Storage
storage = Storage.open(sys.argv[1], create=False)
take_in(storage) if sys.argv[2] == "take_in" else rebuild(storage)
"""
# A run is told on stdout once it has ended, durably: from then on every listing has it, and says so.
WRITE = """
import sys
from pyworkflow_ray.storage.compact import compact
from pyworkflow_ray.storage.storage import Storage
from tests.crash.test_catalogue import add
storage = Storage.open(sys.argv[1], create=False)
for number in range(int(sys.argv[2])):
    add(storage, f"run-{number:03d}")
    print(f"run-{number:03d}", flush=True)
    if number % 10 == 9:
        compact(storage)
"""


def add(storage: Storage, run_id: str) -> None:
    storage.create_run(created(run_id, storage.storage_id, attributes={"n": 1}))
    journal, _ = storage.activate(run_id, "", first=True)
    journal.append([ev.RunActivated(seq=1, at=2.0, epoch=0), ended(2)]).result()
    journal.finish()


def start(script: str, *args: str, failpoint: str = "") -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYWORKFLOW_FAILPOINT": failpoint}
    return subprocess.Popen([sys.executable, "-c", script, *args], env=environment, stdout=subprocess.PIPE)


@pytest.mark.parametrize(
    ("what", "point"),
    [
        ("take_in", "catalogue.before_commit:1"),  # of what the checkpoints hold
        ("take_in", "catalogue.before_commit:2"),
        ("take_in", "catalogue.before_forget"),
        ("rebuild", "catalogue.before_replace"),
        ("rebuild", "catalogue.after_unlink:1"),
        ("rebuild", "catalogue.after_unlink:3"),
        ("rebuild", "catalogue.before_rename"),
    ],
)
def test_death_leaves_every_run_listed_once(storage: Storage, what: str, point: str) -> None:
    for run_id in ("a", "b"):
        add(storage, run_id)
    for _ in range(2):
        assert take_in(storage)
    add(storage, "c")
    compact(storage)
    add(storage, "d")
    process = start(TAKE_IN, storage.root, what, failpoint=point)
    process.communicate()
    assert process.returncode == EXIT_CODE, "the fault did not strike"
    assert [row.run_id for row in page(storage, Query()).rows] == ["d", "c", "b", "a"]
    assert rows(storage, "select run_id from runs order by 1")[1] == [("a",), ("b",), ("c",), ("d",)]
    assert take_in(storage)
    assert check(storage) == []
    assert sorted(set(os.listdir(f"{storage.root}/catalogue")) - {"lock"}) == ["runs-1.sqlite"]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path / "storage")


def test_listings_have_every_run_whatever_other_processes_do(storage: Storage) -> None:
    writer = start(WRITE, storage.root, "60")
    taker = start("while True:\n " + TAKE_IN.strip().replace("\n", "\n "), storage.root, "rebuild")
    assert writer.stdout is not None
    told: list[str] = []
    try:
        for line in writer.stdout:
            told.append(line.decode().strip())
            if len(told) % 3 == 0:
                found = page(storage, Query(statuses=frozenset({"completed"}), attributes=(("n", frozenset({"1"})),)))
                assert found.damaged == {}
                names = [row.run_id for row in found.rows]
                assert len(names) == len(set(names))
                assert set(told) <= set(names)
            if len(told) % 7 == 0:
                (answer,) = rows(storage, "select count(*), count(distinct run_id) from runs")[1]
                assert answer[0] == answer[1] >= len(told)
        assert writer.wait() == 0
        assert taker.poll() is None, "it did not go on making the catalogue anew"
    finally:
        for process in (taker, writer):
            process.kill()
            process.communicate()
    assert len(told) == 60
    assert [row.run_id for row in page(storage, Query()).rows] == [row.run_id for row in scan(storage, Query())[0]]
    assert check(storage) == []
