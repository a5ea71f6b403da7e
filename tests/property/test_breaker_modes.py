"""Every mode of the breaker, all of them mixed, against a history of what happened (`breaker_history`)."""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from pyworkflow_ray.resilience.breaker import Breaker, BreakerEvent, BreakerSettings

sys.path.insert(0, str(Path(__file__).resolve().parent))
from breaker_history import History

LEASE = 10.0
HOW = ["failure", "success", "failure", "answered", "release"]
RATES = st.sampled_from([None, None, 0.25, 0.5, 1.0])
RULES: dict[str, st.SearchStrategy[Any]] = {
    "failure_threshold": st.integers(1, 4),
    "recovery_timeout": st.sampled_from([0.0, 1.0, 5.0, 30.0]),
    "failure_rate": RATES,
    "slow_call_rate": RATES,
    "minimum_calls": st.integers(1, 5),
    "window": st.sampled_from([2, 5, 10, 8.0, 60.0]),
    "min_nodes": st.sampled_from([1, 1, 1, 2, 3]),
    "half_open_max_calls": st.integers(1, 3),
    "success_threshold": st.integers(1, 3),
    "max_recovery_timeout": st.sampled_from([None, None, 40.0]),
    "recovery_backoff": st.sampled_from([1.0, 2.0, 3.0]),
    "ramp": st.sampled_from([None, None, 20.0]),
}
CHANGED = [name for name in RULES if not name.endswith("_rate")]


@dataclass
class Call:
    number: int
    generation: int
    permit: int | None


class EveryMode(RuleBasedStateMachine):
    calls = Bundle("calls")

    @initialize(rules=st.fixed_dictionaries(RULES))
    def begin(self, rules: dict[str, Any]) -> None:
        self.now, self.number = 0.0, 0
        self.breaker = Breaker(BreakerSettings(slow_call_duration=1.0, **rules), lease_s=LEASE)
        self.history = History(rules, LEASE)
        self.version = -1
        self.permits: set[int] = set()

    @rule(seconds=st.sampled_from([0.25, 1.0, 2.0, 4.0, 9.75, 10.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def the_open_time_ends(self) -> None:
        phase = self.history.at(self.now)
        if phase.kind == "open":
            self.now = max(self.now, phase.since + phase.open_s)

    @rule(how=st.sampled_from(HOW), slow=st.booleans(), times=st.integers(1, 5))
    def calls_one_after_another(self, how: str, slow: bool, times: int) -> None:
        for _ in range(times):
            self.end(self.ask(), how, slow)
            self.they_agree()

    @rule(target=calls)
    def ask(self) -> Call | None:
        self.number += 1
        expected = self.history.ask(self.number, self.now)
        answer = self.breaker.ask(self.now)
        if expected == "ramp":
            assert answer.permit is None
            assert answer.admitted or 0 < (answer.retry_after_s or 0) <= 1
        else:
            assert (answer.admitted, answer.permit is not None) == (expected != "refused", expected == "probe")
        if not answer.admitted:
            return None
        assert answer.generation is not None
        if answer.permit is not None:
            assert answer.permit not in self.permits  # none is given out twice
            self.permits.add(answer.permit)
        return Call(self.number, answer.generation, answer.permit)

    @rule()
    def a_ramp_lets_one_through_a_second_at_least(self) -> None:
        if self.history.at(self.now).ramp_from is not None:
            while self.breaker.ask(self.now).admitted and self.history.at(self.now).ramp_from is not None:
                pass
            self.now += 1.0 + 1e-9
            assert self.breaker.ask(self.now).admitted

    @rule(call=consumes(calls), how=st.sampled_from(HOW), slow=st.booleans())
    def end(self, call: Call | None, how: str, slow: bool) -> None:
        if call is None:
            return
        node = "abc"[call.number % 3]
        self.history.at(self.now)
        late = call.generation < len(self.history.phases) - 1
        counted = self.breaker.ended(
            BreakerEvent(how), self.now, generation=call.generation, permit=call.permit, slow=slow, node=node
        )
        assert counted != late
        self.history.end(call.number, call.generation, how, slow, node, self.now)

    @rule(call=calls)
    def renew(self, call: Call | None) -> None:
        if call is not None and call.permit is not None:
            lives = self.history.renew(call.number, call.generation, self.now)
            assert self.breaker.renew(call.permit, self.now) == lives

    @rule(kind=st.sampled_from(["forced_open", "forced_closed", "closed"]))
    def force(self, kind: str) -> None:
        event = {"closed": "reset", "forced_open": "force_open", "forced_closed": "force_closed"}[kind]
        self.breaker.force(BreakerEvent(event), self.now)
        self.history.force(kind, self.now)

    @rule(changes=st.fixed_dictionaries({}, optional={name: RULES[name] for name in CHANGED}))
    def configure(self, changes: dict[str, Any]) -> None:
        self.breaker.configure(changes, self.now)
        self.history.configure(changes, self.now)

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "breaker"):
            return
        phase, view = self.history.at(self.now), self.breaker.view(self.now)
        assert view.state == phase.kind
        assert view.generation == len(self.history.phases) - 1
        assert len(view.permits) == len(phase.probes)
        assert view.version >= self.version  # it never goes back
        self.version = view.version
        if phase.kind == "open":
            assert view.open_for_s == pytest.approx(max(0.0, phase.since + phase.open_s - self.now))
        if phase.ramp_from is None:
            assert view.ramp is None
        else:
            assert view.ramp == pytest.approx(self.history.share(self.now))
        if self.history.windowed and phase.kind == "closed":
            assert view.calls == len(self.history.in_window(self.now))


TestEveryMode = EveryMode.TestCase
TestEveryMode.settings = hypothesis_settings(max_examples=40, stateful_step_count=50, deadline=None)


# The same by the thousand: a random walk gets into every corner, and its seed repeats it ------------------------------

CHOICES: dict[str, list[Any]] = {
    "failure_threshold": [1, 2, 4],
    "recovery_timeout": [0.0, 1.0, 5.0, 30.0],
    "failure_rate": [None, None, 0.25, 0.5, 1.0],
    "slow_call_rate": [None, None, 0.25, 0.5, 1.0],
    "minimum_calls": [1, 2, 5],
    "window": [2, 5, 10, 8.0, 60.0],
    "min_nodes": [1, 1, 1, 2, 3],
    "half_open_max_calls": [1, 2, 3],
    "success_threshold": [1, 2, 3],
    "max_recovery_timeout": [None, None, 40.0],
    "recovery_backoff": [1.0, 2.0, 3.0],
    "ramp": [None, None, 20.0],
}


def walk(seed: int, steps: int = 80) -> Counter[str]:
    """One random history; the states that it came through."""
    rng = random.Random(seed)
    walker: Any = EveryMode()
    walker.begin({name: rng.choice(values) for name, values in CHOICES.items()})
    running: list[Call] = []
    health, seen = rng.random(), Counter[str]()
    for _ in range(steps):
        step = rng.random()
        if step < 0.25:
            call = walker.ask()
            running += [call] if call is not None else []
        elif step < 0.5 and running:
            call = running.pop(rng.randrange(len(running)))
            how = rng.choice(["answered", "release"]) if rng.random() < 0.2 else None
            walker.end(call, how or ("success" if rng.random() < health else "failure"), rng.random() < 0.2)
        elif step < 0.65:
            how = "success" if rng.random() < health else "failure"
            walker.calls_one_after_another(how, rng.random() < 0.1, rng.randint(1, 4))
        elif step < 0.75:
            walker.time_passes(rng.choice([0.25, 1.0, 2.0, 4.0, 9.75, 10.0, 31.0]))
        elif step < 0.85:
            walker.the_open_time_ends()
        elif step < 0.92 and running:
            walker.renew(rng.choice([call for call in running if call.permit is not None] or running))
        elif step < 0.95:
            health = rng.choice([0.0, 0.5, 1.0])
        elif step < 0.97:
            walker.a_ramp_lets_one_through_a_second_at_least()
        elif step < 0.985:
            names = rng.sample(CHANGED, rng.randint(1, 3))
            walker.configure({name: rng.choice(CHOICES[name]) for name in names})
        elif step < 0.99:
            walker.force(rng.choice(["forced_open", "forced_closed", "closed"]))
        walker.they_agree()
        seen[walker.breaker.state.value] += 1
        seen["ramp"] += walker.breaker.ramp is not None
    return seen


def test_random_histories_agree_and_come_through_every_state() -> None:
    first = int(os.environ.get("BREAKER_SEED", "0"))
    seen: Counter[str] = Counter()
    for seed in range(first, first + 200):
        try:
            seen += walk(seed)
        except Exception as error:
            error.add_note(f"again: BREAKER_SEED={seed} python -m pytest {__file__} -k random_histories")
            raise
    assert min(seen[kind] for kind in "closed open half_open forced_open forced_closed ramp".split()) > 100, seen
