"""Broken builds of the breaker: each must be caught by the random walks that compare it with a history."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.errors import PyWorkflowError
from pyworkflow_ray.resilience import breaker as machine
from pyworkflow_ray.resilience.breaker import TABLE, Breaker, BreakerEvent, BreakerSettings, BreakerState, Effect, Guard
from pyworkflow_ray.resilience.breaker_ramp import Ramp
from pyworkflow_ray.resilience.breaker_table import Rule
from pyworkflow_ray.resilience.breaker_window import Window

sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_breaker_modes import walk

Patch = Callable[[pytest.MonkeyPatch], None]
SEEDS = range(1_000)


def _wrapped(target: Any, name: str, make: Callable[[Any], Any]) -> Patch:
    return lambda patch: patch.setattr(target, name, make(getattr(target, name)))


def _ruled(state: BreakerState, event: BreakerEvent, *rules: Rule) -> Patch:
    return lambda patch: patch.setitem(TABLE, (state, event), rules)  # type: ignore[arg-type]


def _holding(guard: Guard, holds: Callable[[Breaker], bool]) -> Patch:
    def make(original: Any) -> Any:
        return lambda self, which, *rest: holds(self) if which is guard else original(self, which, *rest)

    return _wrapped(Breaker, "_holds", make)


def _with_settings(**changes: Any) -> Patch:
    def make(original: Any) -> Any:
        def why(self: Breaker, event: BreakerEvent) -> Any:
            mine, self.settings = self.settings, self.settings.with_options(changes)
            try:
                return original(self, event)
            finally:
                self.settings = mine

        return why

    return _wrapped(Breaker, "_why_tripping", make)


def _late_counts(original: Any) -> Any:
    def ended(self: Breaker, event: BreakerEvent, now: float, *, generation: int, **more: Any) -> Any:
        return original(self, event, now, generation=max(generation, self.generation), **more)

    return ended


def _keeps(*names: str) -> Callable[[Any], Any]:
    """What the method changes of these is undone."""

    def make(original: Any) -> Any:
        def changed(self: Any, *args: Any, **more: Any) -> Any:
            before = {name: getattr(self, name) for name in names}
            result = original(self, *args, **more)
            for name, value in before.items():
                setattr(self, name, value)
            return result

        return changed

    return make


def _probes_add_up(original: Any) -> Any:
    """`successes` of the last half-open time are not forgotten."""

    def take_effect(self: Breaker, effect: Effect, was: BreakerState, *rest: Any) -> None:
        original(self, effect, BreakerState.HALF_OPEN if effect is Effect.GRANT else was, *rest)

    return take_effect


C, O, H = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN  # noqa: E741
ALWAYS = Guard.ALWAYS

MUTANTS: dict[str, Patch] = {
    "late results count": _wrapped(Breaker, "ended", _late_counts),
    "one permit more": _holding(Guard.PERMIT_FREE, lambda b: len(b.permits) <= b.settings.half_open_max_calls),
    "one permit only": _holding(Guard.PERMIT_FREE, lambda b: not b.permits),
    "one success closes": _holding(Guard.ENOUGH, lambda b: True),
    "one success too many": _holding(Guard.ENOUGH, lambda b: b.successes >= b.settings.success_threshold),
    "probes at once": _holding(Guard.RECOVERY_OVER, lambda b: True),
    "never probes": _holding(Guard.RECOVERY_OVER, lambda b: False),
    "leases never end": _wrapped(Breaker, "settle", lambda original: lambda self, now: None),
    "leases are not renewed": _wrapped(Breaker, "renew", lambda original: lambda self, n, now: n in self.permits),
    "minimum_calls is ignored": _with_settings(minimum_calls=1),
    "the threshold is five": _with_settings(failure_threshold=5),
    "slow rates are ignored": _with_settings(slow_call_rate=None),
    "above the rate only": _wrapped(
        Window, "rates", lambda original: lambda self: tuple(rate - 1e-9 for rate in original(self))
    ),
    "min_nodes is ignored": lambda patch: patch.setattr(Breaker, "bad_nodes", property(lambda self: set("abcdef"))),
    "slow calls do not count": _wrapped(Breaker, "_judged", lambda original: lambda self, event, slow: event),
    "a window of time forgets nothing": _wrapped(Window, "expire", lambda original: lambda self, now: None),
    "open time does not grow": _wrapped(BreakerSettings, "open_time", lambda original: lambda s, n: original(s, 0)),
    "open time is not limited": _wrapped(
        BreakerSettings, "open_time", lambda original: lambda s, n: s.recovery_timeout * s.recovery_backoff**n
    ),
    "closing keeps the open time": _wrapped(Breaker, "_begin_anew", _keeps("failed_probes")),
    "closing keeps the failures": _wrapped(Breaker, "_begin_anew", _keeps("failures")),
    "the last probes' successes count": _wrapped(Breaker, "_take_effect", _probes_add_up),
    "configure leaves the open time": _wrapped(Breaker, "configure", _keeps("open_until")),
    "configure keeps the window": lambda patch: patch.setattr(Breaker, "_fit_window", lambda self, was: None),
    "a ramp is not halved": lambda patch: patch.setattr(Ramp, "failed", lambda self, now: None),
    "a ramp starves": lambda patch: patch.setattr(Ramp, "full", lambda self, now: True),
    "a ramp says it is over late": lambda patch: patch.setattr(Ramp, "over", property(lambda self: False)),
    "a failed probe is forgotten": _ruled(H, BreakerEvent.FAILURE, Rule(ALWAYS, Effect.RETURN, H)),
    "a lost probe is forgotten": _ruled(H, BreakerEvent.EXPIRE, Rule(ALWAYS, Effect.RETURN, H)),
    "a released probe closes": _ruled(H, BreakerEvent.RELEASE, Rule(ALWAYS, Effect.CLOSE, C)),
    "an answered probe reopens": _ruled(H, BreakerEvent.ANSWERED, Rule(ALWAYS, Effect.TRIP, O)),
    "success is not judged": _ruled(C, BreakerEvent.SUCCESS, Rule(ALWAYS, Effect.PASS, C)),
    "success does not reset": _ruled(C, BreakerEvent.SUCCESS, Rule(ALWAYS, Effect.NOTHING, C)),
    "forced open lets through": _ruled(
        BreakerState.FORCED_OPEN, BreakerEvent.ASK, Rule(ALWAYS, Effect.ADMIT, BreakerState.FORCED_OPEN)
    ),
    "forced open is reset by force": _ruled(
        BreakerState.FORCED_OPEN, BreakerEvent.RESET, Rule(ALWAYS, Effect.CLEAR, O)
    ),
}


def _caught() -> bool:
    for seed in SEEDS:
        try:
            walk(seed)
        except (AssertionError, PyWorkflowError, KeyError, StopIteration):
            return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_breaker_is_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[mutant](monkeypatch)
    assert _caught()


def test_the_mutants_break_what_runs() -> None:
    assert machine.TABLE is TABLE
