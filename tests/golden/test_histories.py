"""Storages that earlier versions wrote are read event by event, for ever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pyworkflow_ray.storage.storage import Storage

HERE = Path(__file__).parent
RELEASES = sorted(path.parent for path in HERE.glob("*/expected.json"))


TYPES_OF_0_1_0 = """
run_created run_activated run_cancel_requested run_parked run_paused run_completed run_failed run_cancelled
step_scheduled step_dispatched step_started attempt_failed step_handed_back step_lost step_completed step_failed
step_cancelled timer_started timer_fired timer_cancelled
"""


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_a_recorded_storage_is_read_as_it_was_written(release: Path) -> None:
    storage = Storage.open(release / "storage", create=False)
    expected = json.loads((release / "expected.json").read_text(encoding="utf-8"))
    assert storage.list_run_ids() == sorted(expected)
    for run_id, recorded in expected.items():
        history = storage.read_run(run_id)
        assert (history.epoch, history.epochs, history.lease) == (
            recorded["epoch"],
            recorded["epochs"],
            recorded["lease"],
        )
        assert (history.torn, history.finished) == (recorded["torn"], recorded["finished"])
        for event, then in zip(history.events, recorded["events"], strict=True):
            now = event.model_dump(mode="json")
            assert {name: now[name] for name in then} == then  # later versions may know more fields


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_a_recorded_run_is_taken_up_where_it_stopped(release: Path, tmp_path: Path) -> None:
    shutil.copytree(release / "storage", tmp_path / "s")
    storage = Storage.open(tmp_path / "s")
    for run_id in storage.unfinished():
        before = storage.read_run(run_id)
        journal, events = storage.activate(run_id, "now")
        assert (events, journal.epoch) == (before.events, before.epoch + 1)
        journal.close()


def test_the_first_recorded_history_has_every_event_type_of_its_time() -> None:
    recorded = json.loads((HERE / "0.1.0" / "expected.json").read_text(encoding="utf-8"))
    found = {event["type"] for run in recorded.values() for event in run["events"]}
    assert found == set(TYPES_OF_0_1_0.split())
    assert any((HERE / "0.1.0" / "storage" / "runs").glob("*/order-3/*-*.journal"))
