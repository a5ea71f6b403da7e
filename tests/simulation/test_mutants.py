"""Broken builds of the driver: each must be caught by the simulator within a few hundred seeds."""

from __future__ import annotations

import pytest

from pyworkflow_ray.engine import barrier, known
from pyworkflow_ray.engine.commands import Append, Dispatch
from pyworkflow_ray.engine.driver import Driver
from pyworkflow_ray.engine.history import History, StepState
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


def _repeat_what_is_not_idempotent(monkeypatch):
    lose = Driver._lose

    def as_if_it_were(self, step, *args):
        policy = step.event.policy
        step.event = step.event.model_copy(update={"policy": policy.model_copy(update={"idempotent": True})})
        lose(self, step, *args)

    monkeypatch.setattr(Driver, "_lose", as_if_it_were)


def _let_a_stubborn_body_go_on(monkeypatch):
    monkeypatch.setattr(Driver, "_end_by_force", lambda self, now: setattr(self, "_cancel_deadline", None))


def _resume_without_taking_back_what_followed_the_failure(monkeypatch):
    reset = History._reset

    def keep_the_script(self, positions, now):
        script = list(self.script)
        reset(self, positions, now)
        self.script = [e for e in script if e.type not in ("run_failed", "run_completed", "run_cancelled")]

    monkeypatch.setattr(History, "_reset", keep_the_script)


def _forget_what_came_after_the_failure(monkeypatch):
    reset = History._reset

    def drop(self, positions, now):
        reset(self, positions, now)
        self.deferred = []

    monkeypatch.setattr(History, "_reset", drop)


def _execute_what_is_known_again(monkeypatch):
    monkeypatch.setattr(known, "known_from", lambda taken_back: {})


def _count_the_events_on_after_a_resume(monkeypatch):
    activated = History._activated

    def keep_counting(self, event):
        counted = self.counted
        activated(self, event)
        self.counted = counted

    monkeypatch.setattr(History, "_activated", keep_counting)


def _record_attempts_again_that_were_told_before(monkeypatch):
    monkeypatch.setattr(StepState, "unseen", lambda self, record: record)


def _let_relaxed_steps_pass_everything(monkeypatch):
    monkeypatch.setattr(barrier, "passes", lambda event, history: True)


@pytest.mark.parametrize(
    "mutant",
    [
        _dispatch_before_durable,
        _let_relaxed_steps_pass_everything,
        _forget_the_lost_step,
        _take_a_zombies_word,
        _lose_commands_after_a_replay,
        _drop_a_recorded_input,
        _acknowledge_out_of_order,
        _repeat_what_is_not_idempotent,
        _let_a_stubborn_body_go_on,
        _resume_without_taking_back_what_followed_the_failure,
        _forget_what_came_after_the_failure,
        _count_the_events_on_after_a_resume,
        _execute_what_is_known_again,
        _record_attempts_again_that_were_told_before,
    ],
    ids=lambda mutant: mutant.__name__.strip("_"),
)
def test_the_simulator_catches_a_broken_driver(mutant, monkeypatch):
    mutant(monkeypatch)
    assert _caught(), f"no seed of {SEEDS} noticed the mutant"
