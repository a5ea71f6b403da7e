"""A warm process and a folder that is edited: what has changed is loaded anew, what has not stays."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyworkflow_ray.execution import code, freshness
from pyworkflow_ray.execution.definitions import registered
from pyworkflow_ray.execution.freshness import Freshness


class Folder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._age = 0

    def write(self, name: str, text: str) -> None:
        """Another content, and a time of its own: an edit, long after the import."""
        file = self.path / name
        file.write_text(text)
        self._age += 1
        os.utime(file, (1_700_000_000 + self._age,) * 2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(freshness, "LOOK_S", 0.0)
    before = set(sys.modules)
    yield Folder(tmp_path)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


class Watched(Freshness):
    """Of the test's folder only: the test's own modules are not to be forgotten."""

    def __init__(self, folder: Folder) -> None:
        super().__init__()
        self._root = str(folder.path)

    def _users(self) -> Iterator[tuple[str, str]]:
        return ((name, path) for name, path in super()._users() if path.startswith(self._root))


FLOW = """
import pyworkflow_ray as pw
import prices

@pw.step
def one() -> int:
    return prices.FACTOR

@pw.workflow(name={name!r})
async def flow() -> int:
    return await one()
"""


def test_a_changed_file_has_all_modules_of_the_folder_imported_anew(folder: Folder) -> None:
    folder.write("prices.py", "FACTOR = 1")
    folder.write("orders.py", FLOW.format(name="orders"))
    watched = Watched(folder)
    old = importlib.import_module("orders")
    watched.note()
    assert watched.refresh() == []
    assert importlib.import_module("orders") is old
    folder.write("prices.py", "FACTOR = 2222")
    assert watched.refresh() == ["prices"]
    new = importlib.import_module("orders")
    assert new is not old
    assert new.prices.FACTOR == 2222
    assert watched.refresh() == []


def test_a_moved_workflow_is_no_second_one(folder: Folder) -> None:
    folder.write("prices.py", "FACTOR = 1")
    folder.write("orders.py", FLOW.format(name="moving"))
    watched = Watched(folder)
    importlib.import_module("orders")
    watched.note()
    folder.write("orders.py", "")
    folder.write("shop_orders.py", FLOW.format(name="moving"))
    assert watched.refresh() == ["orders"]
    importlib.import_module("shop_orders")
    assert [d.module for d in registered("workflow") if d.name == "moving"] == ["shop_orders"]


def test_what_is_gone_stays_as_it_was_loaded(folder: Folder) -> None:
    folder.write("prices.py", "FACTOR = 1")
    watched = Watched(folder)
    old = importlib.import_module("prices")
    watched.note()
    (folder.path / "prices.py").unlink()
    assert watched.refresh() == []
    assert sys.modules["prices"] is old


def test_an_edit_between_import_and_note_is_not_missed(folder: Folder) -> None:
    watched = Watched(folder)
    (folder.path / "prices.py").write_text("FACTOR = 1")  # as young as the process
    importlib.import_module("prices")
    (folder.path / "prices.py").write_text("FACTOR = 22")
    watched.note()
    assert watched.refresh() == ["prices"]
    assert importlib.import_module("prices").FACTOR == 22


def test_compiled_packages_stay(folder: Folder) -> None:
    folder.write("prices.py", "FACTOR = 1")
    (folder.path / "fast").mkdir()
    folder.write("fast/__init__.py", "")
    watched = Watched(folder)
    importlib.import_module("prices")
    fast = importlib.import_module("fast")
    compiled = type(sys)("fast.core")
    compiled.__file__ = str(folder.path / "fast" / "core.so")
    sys.modules["fast.core"] = compiled
    watched.note()
    folder.write("prices.py", "FACTOR = 22")
    folder.write("fast/__init__.py", "changed = 1")
    assert watched.refresh() == ["prices"]
    assert sys.modules["fast"] is fast
    assert "prices" not in sys.modules


def test_code_by_value_is_loaded_anew_with_them() -> None:
    code._snapshots.put("ref", object())
    code.forget(set())
    assert code._snapshots.get("ref") is None
