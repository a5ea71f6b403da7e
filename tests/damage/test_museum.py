"""Every broken build of the museum is found by what tests/damage does to the storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.damage.__main__ import content, places
from benchmarks.damage.damages import State
from benchmarks.damage.harness import Harness, write_state
from benchmarks.damage.ours import Ours
from tests.damage.museum import EXHIBITS, Exhibit, broken
from tests.damage.scenarios import SCENARIOS
from tests.damage.test_io_faults import strike_all
from tests.damage.test_power_loss import lose_power


class Made(Ours):
    """A store that was made before, by an unbroken build."""

    def __init__(self, history: list[State]) -> None:
        self.history = history

    def make(self, root: Path) -> list[State]:
        write_state(self.history[-1], root)
        return self.history


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> list[State]:
    return Ours().make(tmp_path_factory.mktemp("museum") / "store")


def look(exhibit: Exhibit, history: list[State], tmp_path: Path) -> None:
    """An AssertionError where the fault is seen."""
    how, _, rest = exhibit.finder.partition(" ")
    if how == "power":
        lose_power(scenario(rest), step=1)
    elif how in ("fault", "real"):
        name, _, mode = rest.rpartition(" ")
        strike_all(scenario(name), mode, step=1, real=tmp_path if how == "real" else None)
    else:
        kind, _, where = rest.partition(" ")
        harness = Harness(Made(history), tmp_path / "store", thorough=10**9)
        chosen = [*content(harness, 97)] if kind in ("bit", "cut") else [*places(harness, {})]
        harness.run(damage for damage in chosen if damage.kind == kind and damage.file.startswith(where))
        report = harness.report
        bad = ["SILENT", "crash", "hang", "unnamed"] + (["tail"] if kind == "removed" else [])
        assert not any(report.total(outcome) for outcome in bad), report.worst


def scenario(name: str):
    return next(one for one in SCENARIOS if one.name == name)


@pytest.mark.parametrize("exhibit", EXHIBITS[::5], ids=lambda exhibit: exhibit.name)
def test_some_broken_builds_are_found(
    exhibit: Exhibit, history: list[State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, exhibit)
    with pytest.raises((AssertionError, FileNotFoundError)):
        look(exhibit, history, tmp_path)


def test_every_exhibit_can_still_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for exhibit in EXHIBITS:
        with monkeypatch.context() as patch:
            broken(patch, exhibit)


@pytest.mark.slow
@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.name)
def test_each_broken_build_is_found(
    exhibit: Exhibit, history: list[State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, exhibit)
    with pytest.raises((AssertionError, FileNotFoundError)):
        look(exhibit, history, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("finder", sorted({exhibit.finder for exhibit in EXHIBITS}))
def test_what_finds_a_broken_build_finds_nothing_in_ours(finder: str, history: list[State], tmp_path: Path) -> None:
    look(Exhibit("ours", "", "", "", finder), history, tmp_path)
