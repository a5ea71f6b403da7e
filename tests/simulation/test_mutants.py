"""Broken builds of the driver: each must be caught by the simulator within a few hundred seeds."""

from __future__ import annotations

import pytest

from pyworkflow_ray.engine.commands import Append, Dispatch
from pyworkflow_ray.engine.driver import Driver
from pyworkflow_ray.engine.history import History
from pyworkflow_ray.engine.machine import Machine
from pyworkflow_ray.errors import PyWorkflowError
from pyworkflow_ray.testing.simulate import simulate

SEEDS = range(400)


def _caught() -> bool:
    for seed in SEEDS:
        try:
            simulate(seed)
        except (AssertionError, PyWorkflowError, KeyError, ValueError):
            return True
    return False


def _dispatch_before_durable(monkeypatch):
    gate = Driver._gate

    def at_once(self, effect):
        if isinstance(effect, Dispatch):
            self._effects.append(effect)
        else:
            gate(self, effect)

    monkeypatch.setattr(Driver, "_gate", at_once)


def _forget_the_lost_step(monkeypatch):
    monkeypatch.setattr(Driver, "_take_up", lambda self, *args: None)


def _take_a_zombies_word(monkeypatch):
    def anyone(self, position, dispatch):
        return self._history.steps.get(position)

    monkeypatch.setattr(Driver, "_current", anyone)


def _lose_commands_after_a_replay(monkeypatch):
    replay = Machine.replay
    monkeypatch.setattr(
        Machine, "replay", lambda self, script, at: replay(self, script, at)[:0] if script else replay(self, script, at)
    )


def _drop_a_recorded_input(monkeypatch):
    of = History.of.__func__

    def without_the_first_completion(cls, events):
        events = list(events)
        first = next((e for e in events if e.type == "step_completed"), None)
        return of(cls, [e for e in events if e is not first])

    monkeypatch.setattr(History, "of", classmethod(without_the_first_completion))


def _acknowledge_out_of_order(monkeypatch):
    flush = Driver._flush

    def reversed_append(self):
        flush(self)
        self._effects = [Append(e.events[::-1]) if isinstance(e, Append) else e for e in self._effects]

    monkeypatch.setattr(Driver, "_flush", reversed_append)


@pytest.mark.parametrize(
    "mutant",
    [
        _dispatch_before_durable,
        _forget_the_lost_step,
        _take_a_zombies_word,
        _lose_commands_after_a_replay,
        _drop_a_recorded_input,
        _acknowledge_out_of_order,
    ],
    ids=lambda mutant: mutant.__name__.strip("_"),
)
def test_the_simulator_catches_a_broken_driver(mutant, monkeypatch):
    mutant(monkeypatch)
    assert _caught(), f"no seed of {SEEDS} noticed the mutant"
