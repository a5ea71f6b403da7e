"""Schedules of crashes and losses with every value encrypted: each is read at the place where it was written."""

from __future__ import annotations

from collections import Counter

import pytest

from pyworkflow_ray.crypto import AesGcm
from pyworkflow_ray.testing.simulate import simulate
from pyworkflow_ray.testing.simulator import Simulator

SCHEDULES = 60


def test_encrypted_schedules_end_as_those_in_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    clear = [[event.type for event in simulate(seed)[0].events] for seed in range(SCHEDULES)]
    monkeypatch.setattr(Simulator, "hook", AesGcm({"k": bytes(32)}))
    struck: Counter[str] = Counter()
    for seed in range(SCHEDULES):
        simulation, _ = simulate(seed)
        assert [event.type for event in simulation.events] == clear[seed], f"seed {seed}"
        assert all(event.result.enc == "custom" for event in simulation.events if event.type == "step_completed")
        struck += simulation.struck
    assert struck["crash"] > 30
