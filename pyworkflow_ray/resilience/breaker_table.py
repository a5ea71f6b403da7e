"""The circuit breaker's behaviour as data: states, events, and for each pair what happens.

Interpreted by `resilience.breaker`; drawn into docs/breakers.md by `diagram`. Rules:

* for a state and an event the rules are tried in order, the first whose guard holds applies;
* a pair that is not in the table is illegal: it raises, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, StrEnum
from typing import NamedTuple


class BreakerState(StrEnum):
    """State of a circuit breaker; compares equal to its text."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    FORCED_CLOSED = "forced_closed"


class BreakerEvent(StrEnum):
    """What happens to a breaker."""

    ASK = "ask"  # a caller asks to be let through
    SUCCESS = "success"  # a call that had been let through succeeded
    FAILURE = "failure"  # it failed in a way that counts
    ANSWERED = "answered"  # it failed in a way that does not count: the service answered
    RELEASE = "release"  # it was cancelled, or ended in a refusal of ours: it says nothing of the service
    EXPIRE = "expire"  # the lease of a permit ended
    FORCE_OPEN = "force_open"  # a person
    FORCE_CLOSED = "force_closed"
    RESET = "reset"


class Guard(Enum):
    """Each value is how the diagram says it."""

    ALWAYS = ""
    TRIPS = "threshold, rate or slow rate reached"
    RECOVERY_OVER = "recovery timeout over"
    PERMIT_FREE = "a permit is free"
    ENOUGH = "success_threshold reached"
    RAMP_FULL = "ramp admits no more"


class Effect(Enum):
    NOTHING = "nothing"
    ADMIT = "let through"
    REFUSE = "refuse"
    GRANT = "let through with a permit"
    RETURN = "permit back"
    COUNT = "count the failure"
    PASS = "count the success"
    PROVE = "count the probe"
    CLOSE = "begin anew"
    TRIP = "begin the recovery timeout"
    CLEAR = "forget everything"


class Rule(NamedTuple):
    guard: Guard
    effect: Effect
    next: BreakerState


_C, _O, _H = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
_FO, _FC = BreakerState.FORCED_OPEN, BreakerState.FORCED_CLOSED
_E, _G, _X = BreakerEvent, Guard, Effect


def _always(effect: Effect, state: BreakerState) -> tuple[Rule, ...]:
    return (Rule(Guard.ALWAYS, effect, state),)


TABLE: Mapping[tuple[BreakerState, BreakerEvent], tuple[Rule, ...]] = {
    (_C, _E.ASK): (Rule(_G.RAMP_FULL, _X.REFUSE, _C), Rule(_G.ALWAYS, _X.ADMIT, _C)),
    (_C, _E.SUCCESS): (Rule(_G.TRIPS, _X.TRIP, _O), Rule(_G.ALWAYS, _X.PASS, _C)),
    (_C, _E.FAILURE): (Rule(_G.TRIPS, _X.TRIP, _O), Rule(_G.ALWAYS, _X.COUNT, _C)),
    (_C, _E.ANSWERED): _always(_X.NOTHING, _C),
    (_C, _E.RELEASE): _always(_X.NOTHING, _C),
    (_C, _E.FORCE_OPEN): _always(_X.CLEAR, _FO),
    (_C, _E.FORCE_CLOSED): _always(_X.CLEAR, _FC),
    (_C, _E.RESET): _always(_X.CLEAR, _C),
    (_O, _E.ASK): (Rule(_G.RECOVERY_OVER, _X.GRANT, _H), Rule(_G.ALWAYS, _X.REFUSE, _O)),
    (_O, _E.FORCE_OPEN): _always(_X.CLEAR, _FO),
    (_O, _E.FORCE_CLOSED): _always(_X.CLEAR, _FC),
    (_O, _E.RESET): _always(_X.CLEAR, _C),
    (_H, _E.ASK): (Rule(_G.PERMIT_FREE, _X.GRANT, _H), Rule(_G.ALWAYS, _X.REFUSE, _H)),
    (_H, _E.SUCCESS): (Rule(_G.ENOUGH, _X.CLOSE, _C), Rule(_G.ALWAYS, _X.PROVE, _H)),
    (_H, _E.ANSWERED): (Rule(_G.ENOUGH, _X.CLOSE, _C), Rule(_G.ALWAYS, _X.PROVE, _H)),
    (_H, _E.FAILURE): _always(_X.TRIP, _O),
    (_H, _E.RELEASE): _always(_X.RETURN, _H),
    (_H, _E.EXPIRE): _always(_X.TRIP, _O),
    (_H, _E.FORCE_OPEN): _always(_X.CLEAR, _FO),
    (_H, _E.FORCE_CLOSED): _always(_X.CLEAR, _FC),
    (_H, _E.RESET): _always(_X.CLEAR, _C),
    (_FO, _E.ASK): _always(_X.REFUSE, _FO),
    (_FO, _E.FORCE_OPEN): _always(_X.NOTHING, _FO),
    (_FO, _E.FORCE_CLOSED): _always(_X.CLEAR, _FC),
    (_FO, _E.RESET): _always(_X.CLEAR, _C),
    (_FC, _E.ASK): _always(_X.ADMIT, _FC),
    (_FC, _E.SUCCESS): _always(_X.NOTHING, _FC),
    (_FC, _E.FAILURE): _always(_X.NOTHING, _FC),
    (_FC, _E.ANSWERED): _always(_X.NOTHING, _FC),
    (_FC, _E.RELEASE): _always(_X.NOTHING, _FC),
    (_FC, _E.FORCE_OPEN): _always(_X.CLEAR, _FO),
    (_FC, _E.FORCE_CLOSED): _always(_X.NOTHING, _FC),
    (_FC, _E.RESET): _always(_X.CLEAR, _C),
}


def diagram() -> str:
    """The changes of state as a Mermaid state diagram; edges of one pair of states are drawn as one."""
    edges: dict[tuple[BreakerState, BreakerState], list[str]] = {}
    for (state, event), rules in TABLE.items():
        for rule in rules:
            if rule.next is not state:
                says = event.value + (f" [{rule.guard.value}]" if rule.guard.value else "")
                edges.setdefault((state, rule.next), []).append(says)
    lines = ["stateDiagram-v2", f"    [*] --> {BreakerState.CLOSED.value}"]
    lines += [f"    {a.value} --> {b.value}: {' / '.join(says)}" for (a, b), says in edges.items()]
    return "\n".join(lines) + "\n"


def table_text() -> str:
    """The whole table in Markdown."""
    lines = ["| state | event | when | what | next |", "|---|---|---|---|---|"]
    for (state, event), rules in TABLE.items():
        for rule in rules:
            lines.append(
                f"| {state.value} | {event.value} | {rule.guard.value or 'always'} | {rule.effect.value} "
                f"| {rule.next.value} |"
            )
    return "\n".join(lines) + "\n"
