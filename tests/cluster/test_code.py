"""Whose code a run executes: two folders, two packages, a folder that is edited, a cluster that is gone.

The modules of all have one name, and say which they are. The oracle is what the steps wrote and what the runs gave.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Head, drive, head, kill, lines, until

from pyworkflow_ray.engine.events import RunActivated, RunPaused
from pyworkflow_ray.storage.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHOP = """
import os, time
import pyworkflow_ray as pw
import prices

@pw.step
def pack(ledger: str, gate: str) -> str:
    with open(ledger, "a") as file:
        file.write(f"{prices.VERSION} {os.getpid()}\\n")
    while gate and not os.path.exists(gate):
        time.sleep(0.01)
    return prices.VERSION

@pw.step(executor="local")
def price() -> str:
    return prices.VERSION

@pw.workflow
async def order(ledger: str, gate: str) -> list[str]:
    return [await price(), await pack(ledger, gate), await price(), await pack(ledger, "")]
"""
START = "import pyworkflow_ray as pw; import shop; pw.start(shop.order.options(run_id={run!r}), {ledger!r}, {gate!r})"
PACKED = "import ray; ray.init(runtime_env={'working_dir': '.'}, log_to_driver=False); "
RESULT = "import pyworkflow_ray as pw; print(__import__('json').dumps(pw.get_run({run!r}).result(60)))"
RECOVER = "import pyworkflow_ray as pw; print(len(pw.recover()))"
RESUME = """
import json
import pyworkflow_ray as pw

handle = pw.resume({run!r})
try:
    print(json.dumps(handle.result(30)))
except TimeoutError as error:
    raise SystemExit("\\n".join(map(str, [error, *handle.events()[-4:]])))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    with head() as running:
        yield running


def folder(path: Path, version: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / "shop.py").write_text(SHOP)
    (path / "prices.py").write_text(f"VERSION = {version!r}\n")
    return path


def owner(storage: Path, run: str) -> int:
    events = Storage.open(storage).read_run(run).events
    return next(int(e.worker) for e in reversed(events) if isinstance(e, RunActivated))


def paused(storage: Path, run: str) -> RunPaused | None:
    last = Storage.open(storage).read_run(run).events[-1]
    return last if isinstance(last, RunPaused) else None


@pytest.mark.parametrize("how", ["", PACKED], ids=["two folders", "two packages"])
def test_each_run_executes_its_own_code_also_when_recovered(cluster: Head, tmp_path: Path, how: str) -> None:
    storage, gate = tmp_path / "storage", tmp_path / "gate"
    runs = ("first", "second")
    for run in runs:
        text = how + START.format(run=run, ledger=str(tmp_path / f"ledger-{run}"), gate=str(gate))
        drive(folder(tmp_path / run, run), text, address=cluster.address, storage=storage)
    for run in runs:
        until(lambda run=run: lines(tmp_path / f"ledger-{run}"), "its step waits")  # type: ignore[misc]
        if how:
            shutil.rmtree(tmp_path / run)  # what is left is the package
        kill(owner(storage, run))
        until(lambda run=run: len(lines(tmp_path / f"ledger-{run}")) == 2, "it is recovered")  # type: ignore[misc]
    gate.touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for run in runs:
        result = drive(elsewhere, RESULT.format(run=run), address=cluster.address, storage=storage)
        assert json.loads(result) == [run] * 4
        assert {line.split()[0] for line in lines(tmp_path / f"ledger-{run}")} == {run}


def test_an_edited_folder_is_what_it_is_now(cluster: Head, tmp_path: Path) -> None:
    """A run actor and a step worker that have the old code are warm; the next driver's run does not get it."""
    storage, code = tmp_path / "storage", tmp_path / "code"
    for version in ("one", "second", "the third"):
        text = START.format(run=version.replace(" ", "-"), ledger=str(tmp_path / "ledger"), gate="")
        text += "; print(__import__('json').dumps(pw.get_run(pw.list_runs()[0].run_id).result(60)))"
        result = drive(folder(code, version), text, address=cluster.address, storage=storage)
        assert json.loads(result) == [version] * 4


def test_a_module_of_another_driver_is_not_found(cluster: Head, tmp_path: Path) -> None:
    """The controller is the first driver's child; what that driver could import is none of the second's business."""
    storage, first, second = tmp_path / "storage", tmp_path / "first", tmp_path / "second"
    text = START.format(run="first", ledger=str(tmp_path / "ledger"), gate="")
    drive(folder(first, "first"), text, address=cluster.address, storage=storage)
    text = START.format(run="second", ledger=str(tmp_path / "ledger"), gate="")
    text = f"{text}; pw.get_run('second').result(60)"
    drive(folder(second, "second"), text, address=cluster.address, storage=storage)
    (second / "prices.py").unlink()
    (second / "shop.py").unlink()
    ledger, gate = tmp_path / "ledger-3", tmp_path / "gate"
    drive(folder(second, "second"), START.format(run="third", ledger=str(ledger), gate=str(gate)),
          address=cluster.address, storage=storage)  # fmt: skip
    until(lambda: lines(ledger), "its step waits")
    shutil.rmtree(second)
    kill(owner(storage, "third"))
    what = until(lambda: paused(storage, "third"), "it pauses")
    assert what.reason == "environment"
    assert str(second) in what.message
    assert "shop" in what.message
    folder(second, "second")
    gate.touch()
    (tmp_path / "elsewhere").mkdir()
    result = drive(tmp_path / "elsewhere", RESUME.format(run="third"), address=cluster.address, storage=storage)
    assert json.loads(result) == ["second"] * 4


def test_the_package_of_a_cluster_that_is_gone_is_had_by_the_next(tmp_path: Path) -> None:
    storage, ledger, gate = tmp_path / "storage", tmp_path / "ledger", tmp_path / "gate"
    with head() as running:
        text = PACKED + START.format(run="old", ledger=str(ledger), gate=str(gate))
        drive(folder(tmp_path / "code", "old"), text, address=running.address, storage=storage)
        until(lambda: lines(ledger), "its step waits")
        running.kill()
    folder(tmp_path / "code", "new")
    gate.touch()
    blobs = Storage.open(storage).read_run("old").events[0].environment.packages  # type: ignore[union-attr]
    (uri, digest), *more = blobs.items()
    assert more == []
    kept = storage / "blobs" / digest[:2] / digest
    data = kept.read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with head() as running:
        kept.unlink()
        assert drive(elsewhere, RECOVER, address=running.address, storage=storage) == "1"
        what = until(lambda: paused(storage, "old"), "it pauses")
        assert what.reason == "environment"
        assert uri in what.message
        kept.write_bytes(data)
        result = drive(elsewhere, RESUME.format(run="old"), address=running.address, storage=storage)
    assert json.loads(result) == ["old"] * 4
