"""Fifty processes around one breaker on a bad network, each run decided by its seed; and broken builds it catches."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.errors import PyWorkflowError
from pyworkflow_ray.resilience.breaker import Breaker
from pyworkflow_ray.resilience.breaker_table import Guard
from pyworkflow_ray.resilience.mirror import Mirror, _known
from pyworkflow_ray.resilience.truth import Truth

sys.path.insert(0, str(Path(__file__).resolve().parent))
from breaker_cluster import simulate


def runs(seeds: range) -> Counter[str]:
    struck: Counter[str] = Counter()
    for seed in seeds:
        struck += simulate(seed).struck
    return struck


def test_fifty_processes_on_a_bad_network_keep_every_invariant() -> None:
    struck = runs(range(3, 5))
    assert min(struck["lost"], struck["repeated"], struck["delayed"], struck["sent again"]) > 50, struck
    assert min(struck["half_open > open"], struck["half_open > closed"]) > 0, struck


@pytest.mark.slow
def test_many_seeds_and_every_fault_strikes() -> None:
    struck = runs(range(100))
    assert min(struck["lost"], struck["repeated"], struck["delayed"], struck["sent again"]) > 5_000, struck
    assert min(struck["killed with a permit"], struck["restart"], struck["half_open > closed"]) > 100, struck


def _wrapped(target: Any, name: str, make: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(target, name, make(getattr(target, name)))


def _forgets(handle: Any) -> Any:
    def handles(self: Truth, message: Any, now: float) -> Any:
        self._replies.clear()
        return handle(self, message, now)

    return handles


def _forgets_the_overtaken(handle: Any) -> Any:
    def handles(self: Truth, message: Any, now: float) -> Any:
        if message.process in self._replies and self._replies[message.process][0] > message.seq:
            del self._replies[message.process]
        return handle(self, message, now)

    return handles


def _any_view(learn: Any) -> Any:
    def learns(self: Mirror, view: Any, now: float) -> bool:
        self.known = _known(view, True, now, self.node)
        return True

    return learns


def _late_counts(ended: Any) -> Any:
    def ends(self: Breaker, event: Any, now: float, *, generation: int, **more: Any) -> Any:
        return ended(self, event, now, generation=max(generation, self.generation), **more)

    return ends


def _one_permit_more(holds: Any) -> Any:
    def more(self: Breaker, guard: Guard, *rest: Any) -> bool:
        if guard is Guard.PERMIT_FREE:
            return len(self.permits) <= self.settings.half_open_max_calls
        return bool(holds(self, guard, *rest))

    return more


def _sends_again_without_reports(next_message: Any) -> Any:
    def sends(self: Mirror) -> Any:
        again = self._under_way is not None
        message = next_message(self)
        return replace(message, reports=()) if again and message is not None else message

    return sends


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a repeated message counts again": _wrapped(Truth, "handle", _forgets),
    "an overtaken message counts": _wrapped(Truth, "handle", _forgets_the_overtaken),
    "a mirror believes any view": _wrapped(Mirror, "learn", _any_view),
    "late results count": _wrapped(Breaker, "ended", _late_counts),
    "one permit more": _wrapped(Breaker, "_holds", _one_permit_more),
    "renewals are ignored": _wrapped(Truth, "_renew", lambda original: lambda self, *args: None),
    "leases never end": _wrapped(Breaker, "settle", lambda original: lambda self, now: None),
    "what is sent again says less": _wrapped(Mirror, "next_message", _sends_again_without_reports),
    "min_nodes is ignored": lambda patch: patch.setattr(Breaker, "bad_nodes", property(lambda self: set("abcdef"))),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_protocol_is_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[mutant](monkeypatch)
    for seed in range(40):
        try:
            simulate(seed)
        except (AssertionError, PyWorkflowError, KeyError):
            return
    raise AssertionError("not caught within 40 seeds")
