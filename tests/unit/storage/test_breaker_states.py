"""A breaker's kept states: durable, checked, and restored with what is left of the open time."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.resilience.breaker import BreakerEvent, BreakerSettings
from pyworkflow_ray.resilience.mirror import Message, Report
from pyworkflow_ray.resilience.truth import Truth
from pyworkflow_ray.storage.breaker_states import BreakerStates

SETTINGS = BreakerSettings(failure_threshold=1, recovery_timeout=60.0)


def opened_at(now: float) -> Truth:
    truth = Truth(SETTINGS, "lineage")
    truth.handle(Message("p", 1, SETTINGS, reports=(Report(BreakerEvent.FAILURE, 0, error="503"),)), now)
    return truth


@pytest.mark.parametrize(("age_s", "rest"), [(0.0, 60.0), (20.0, 40.0), (1e6, 0.0), (-500.0, 60.0)])
def test_case_11_and_13_an_open_state_comes_back_with_the_rest_of_its_time(
    tmp_path: Path, age_s: float, rest: float
) -> None:
    kept = BreakerStates(str(tmp_path), "payments")
    kept.save([(None, opened_at(5.0).save(5.0)), ("host-7", opened_at(5.0).save(5.0))], at=1000.0)
    loaded = BreakerStates(str(tmp_path), "payments").load()
    assert loaded is not None
    states, saved_at = loaded
    assert ([key for key, _ in states], saved_at) == ([None, "host-7"], 1000.0)
    again = Truth(SETTINGS, "another")
    again.restore(states[0][1], age_s, 77.0)
    view = again.view(77.0)
    assert (view.state, view.generation, view.open_for_s) == ("open", 1, rest)
    assert view.reason == "1 failure, the last: 503"


@pytest.mark.parametrize("force", [BreakerEvent.FORCE_OPEN, BreakerEvent.FORCE_CLOSED])
def test_forced_and_configured_states_come_back(force: BreakerEvent) -> None:
    truth = Truth(SETTINGS, "lineage")
    truth.handle(Message("p", 1, SETTINGS, forces=(force,), configure={"recovery_timeout": 5.0}), 0.0)
    again = Truth(SETTINGS, "another")
    again.restore(truth.save(0.0), 1e9, 0.0)
    assert again.view(0.0).state == truth.view(0.0).state
    assert again.breaker.settings.recovery_timeout == 5.0
    assert again.declared == SETTINGS


def test_what_was_kept_is_replaced_as_a_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    kept = BreakerStates(str(tmp_path), "payments")
    assert kept.load() is None
    for at in range(5):
        kept.save([], at=float(at))
    assert kept.load() == ([], 4.0)
    assert len(list((tmp_path / "breakers").iterdir())) == 1


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    elif how == "torn":
        del data[-7:]
    else:
        data.clear()
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["flipped", "torn", "empty"])
def test_a_damaged_file_is_reported_and_the_breaker_begins_closed(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = BreakerStates(str(tmp_path), "payments")
    kept.save([(None, opened_at(0.0).save(0.0))], at=0.0)
    damaged(Path(kept.path), how)
    with caplog.at_level(logging.ERROR, "pyworkflow_ray.storage"):
        assert kept.load() is None
    assert "payments" in caplog.text
    assert kept.path in caplog.text


def test_the_file_of_another_breaker_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = BreakerStates(str(tmp_path), "a"), BreakerStates(str(tmp_path), "b")
    one.save([], at=0.0)
    Path(one.path).rename(other.path)
    assert other.load() is None


@pytest.mark.parametrize("saved", [{}, {"state": "ajar"}, {**opened_at(0.0).save(0.0), "version": "x"}])
def test_a_state_that_save_does_not_give_is_an_error(saved: dict[str, Any]) -> None:
    with pytest.raises((KeyError, ValueError, TypeError)):
        Truth(SETTINGS, "lineage").restore(saved, 0.0, 0.0)
