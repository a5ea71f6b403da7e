"""The circuit breaker's state machine: a table, and the few numbers it works on.

Called by `execution.breakers` (a breaker of one process) and `resilience.mirror` (one of a cluster); calls nothing.

Rules:

* `TABLE` is the whole behaviour: for a state and an event its rules are tried in order, the first whose guard holds
  applies. A pair that is not in the table is illegal: it raises, and changes nothing.
* Every change of state begins a new *generation*. The result of a call carries the generation in which the call began;
  one of an earlier generation is late and changes nothing (in Polly a late success closes a half-open circuit).
* In half-open one call at a time is let through; it holds a *permit* with a lease. A lease that ends, because the
  holder's process died, counts as a failure of the probe, as of the instant at which it ended.
* Consecutive failures are counted in the order in which results arrive; a success sets the count to zero.
* `version` grows with every change, of state or count, and is what processes compare to learn who knows the newer.
* Time is handed in: seconds of one monotonic clock. What leaves a process carries durations, never instants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum, StrEnum, auto
from typing import Any, NamedTuple

from pyworkflow_ray.errors import CircuitOpenError, PyWorkflowError, RetryBudgetExhausted

PERMIT_LEASE_S = 10.0  # a holder renews three times in it; its death is noticed after it


class BreakerState(StrEnum):
    """State of a circuit breaker; compares equal to its text."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerEvent(StrEnum):
    """What happens to a breaker."""

    ASK = "ask"  # a caller asks to be let through
    SUCCESS = "success"  # a call that had been let through succeeded
    FAILURE = "failure"  # it failed in a way that counts
    ANSWERED = "answered"  # it failed in a way that does not count: the service answered
    RELEASE = "release"  # it was cancelled, or ended in a refusal of ours: it says nothing of the service
    EXPIRE = "expire"  # the lease of a permit ended


class Guard(Enum):
    ALWAYS = auto()
    LAST_FAILURE = auto()  # this failure makes the threshold full
    RECOVERY_OVER = auto()  # the recovery timeout is over
    PERMIT_FREE = auto()  # no other call probes


class Effect(Enum):
    NOTHING = auto()
    ADMIT = auto()
    REFUSE = auto()
    GRANT = auto()  # admit with a permit
    RETURN = auto()  # take the permit back
    COUNT = auto()
    CLEAR = auto()
    TRIP = auto()  # begin the recovery timeout


class Rule(NamedTuple):
    guard: Guard
    effect: Effect
    next: BreakerState


_C, _O, _H = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
_E = BreakerEvent

TABLE: Mapping[tuple[BreakerState, BreakerEvent], tuple[Rule, ...]] = {
    (_C, _E.ASK): (Rule(Guard.ALWAYS, Effect.ADMIT, _C),),
    (_C, _E.SUCCESS): (Rule(Guard.ALWAYS, Effect.CLEAR, _C),),
    (_C, _E.FAILURE): (Rule(Guard.LAST_FAILURE, Effect.TRIP, _O), Rule(Guard.ALWAYS, Effect.COUNT, _C)),
    (_C, _E.ANSWERED): (Rule(Guard.ALWAYS, Effect.NOTHING, _C),),
    (_C, _E.RELEASE): (Rule(Guard.ALWAYS, Effect.NOTHING, _C),),
    (_O, _E.ASK): (Rule(Guard.RECOVERY_OVER, Effect.GRANT, _H), Rule(Guard.ALWAYS, Effect.REFUSE, _O)),
    (_H, _E.ASK): (Rule(Guard.PERMIT_FREE, Effect.GRANT, _H), Rule(Guard.ALWAYS, Effect.REFUSE, _H)),
    (_H, _E.SUCCESS): (Rule(Guard.ALWAYS, Effect.CLEAR, _C),),
    (_H, _E.ANSWERED): (Rule(Guard.ALWAYS, Effect.CLEAR, _C),),
    (_H, _E.FAILURE): (Rule(Guard.ALWAYS, Effect.TRIP, _O),),
    (_H, _E.RELEASE): (Rule(Guard.ALWAYS, Effect.RETURN, _H),),
    (_H, _E.EXPIRE): (Rule(Guard.ALWAYS, Effect.TRIP, _O),),
}


class IllegalBreakerEvent(PyWorkflowError):
    """An event that cannot happen in this state. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """What a breaker is declared with. Compared between all who use its name.

    failure_threshold: consecutive counted failures that open it, ≥ 1 (default 5).
    recovery_timeout: seconds it stays open before a call may probe (default 60).
    """

    failure_threshold: int = 5
    recovery_timeout: float = 60.0

    def as_options(self) -> dict[str, Any]:
        """The settings as the constructor's options, in JSON types; they travel with a step under this form."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> BreakerSettings:
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in options.items() if name in known})

    def conflict(self, other: BreakerSettings) -> tuple[str, Any, Any] | None:
        """The first option that differs, with our value and the other's; None where all agree."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                return field.name, mine, theirs
        return None


@dataclass(frozen=True, slots=True)
class View:
    """A breaker's state at one instant, as it travels between processes: durations, no instants.

    lineage: the actor (all its restarts) that the version belongs to; "" for a breaker of one process.
    open_for_s: rest of the open time. permit, lease_s: the permit that is out, and the rest of its lease.
    reason: in words, why it is not closed.
    heard: the newest version that any run has spoken of, never below `version`.
    """

    version: int = 0
    generation: int = 0
    state: BreakerState = BreakerState.CLOSED
    failures: int = 0
    open_for_s: float = 0.0
    permit: int | None = None
    lease_s: float = 0.0
    reason: str = ""
    lineage: str = ""
    heard: int = 0


class Answer(NamedTuple):
    """Answer to a caller that asked.

    generation: to be handed in with the call's end; None where the process has not joined the cluster's breaker yet.
    permit: set where the call is a probe.
    """

    admitted: bool
    generation: int | None
    permit: int | None = None


class Breaker:
    """One circuit breaker in consecutive mode.

    Args:
        settings: The declared settings.
        lease_s: Life of a permit without renewal, in seconds; None where the holder cannot die alone (one process).
    """

    def __init__(self, settings: BreakerSettings, *, lease_s: float | None = PERMIT_LEASE_S) -> None:
        self.settings = settings
        self.lease_s = lease_s
        self.state = BreakerState.CLOSED
        self.generation = 0
        self.version = 0
        self.failures = 0
        self.reason = ""
        self.open_until = 0.0
        self.permit: int | None = None
        self.permit_until: float | None = None

    def ask(self, now: float) -> Answer:
        """A caller asks to be let through: admitted, admitted with a permit, or refused."""
        self.settle(now)
        effect = self._apply(BreakerEvent.ASK, now)
        return Answer(effect is not Effect.REFUSE, self.generation, self.permit if effect is Effect.GRANT else None)

    def ended(
        self, event: BreakerEvent, now: float, *, generation: int, permit: int | None = None, error: str = ""
    ) -> bool:
        """A call that began in `generation` has ended; False where that is late and changed nothing.

        Raises:
            IllegalBreakerEvent: no call of this generation can end so: it has not begun yet, or none was let through,
                or its permit is not the one that is out.
        """
        self.settle(now)
        if event in (BreakerEvent.ASK, BreakerEvent.EXPIRE):
            raise IllegalBreakerEvent(f"a call cannot end with {event.value!r}")
        if generation > self.generation:
            raise IllegalBreakerEvent(
                f"a call of generation {generation} ended ({event.value}), the breaker is at {self.generation}"
            )
        if generation < self.generation:
            return False
        if permit != self.permit:
            raise IllegalBreakerEvent(
                f"a call with permit {permit} ended ({event.value}) in state {self.state.value}, "
                f"where permit {self.permit} is out"
            )
        self._apply(event, now, error)
        return True

    def renew(self, permit: int, now: float) -> bool:
        """The holder of `permit` lives: its lease begins anew. False where the permit is out no longer."""
        self.settle(now)
        if permit != self.permit:
            return False
        self.permit_until = None if self.lease_s is None else now + self.lease_s
        return True

    def settle(self, now: float) -> None:
        """Let a lease that has ended by `now` expire, as of the instant at which it ended."""
        if self.permit is not None and self.permit_until is not None and now >= self.permit_until:
            self._apply(BreakerEvent.EXPIRE, self.permit_until)

    def retry_after(self, now: float) -> float:
        """Seconds of open time that are left; 0 in half-open and closed."""
        return max(0.0, self.open_until - now) if self.state is BreakerState.OPEN else 0.0

    def view(self, now: float) -> View:
        """The state at `now`. Looking is not asking: it lets nobody through and never turns open into half-open."""
        self.settle(now)
        return View(
            version=self.version,
            generation=self.generation,
            state=self.state,
            failures=self.failures,
            open_for_s=self.retry_after(now),
            permit=self.permit,
            lease_s=0.0 if self.permit_until is None else max(0.0, self.permit_until - now),
            reason=self.reason,
            heard=self.version,
        )

    def adopt(self, view: View, now: float) -> None:
        """Take over a state that another process knew. Its rest of open time is clamped to what the settings allow."""
        self.version, self.generation = view.version, view.generation
        self.state, self.failures, self.reason = view.state, view.failures, view.reason
        self.open_until = now + min(max(0.0, view.open_for_s), self.settings.recovery_timeout)
        self.permit = view.permit
        self.permit_until = None
        if view.permit is not None and self.lease_s is not None:
            self.permit_until = now + min(max(0.0, view.lease_s), self.lease_s)

    # The table's interpreter ------------------------------------------------------------------------------------

    def _apply(self, event: BreakerEvent, now: float, error: str = "") -> Effect:
        rules = TABLE.get((self.state, event))
        if rules is None:
            raise IllegalBreakerEvent(f"{event.value!r} cannot happen in state {self.state.value!r}")
        rule = next(rule for rule in rules if self._holds(rule.guard, now))
        was = self.state
        if rule.next is not was:
            self.state = rule.next
            self.generation += 1
            self.version += 1
            self.permit = self.permit_until = None
        self._take_effect(rule.effect, was, event, now, error)
        return rule.effect

    def _holds(self, guard: Guard, now: float) -> bool:
        if guard is Guard.LAST_FAILURE:
            return self.failures + 1 >= self.settings.failure_threshold
        if guard is Guard.RECOVERY_OVER:
            return now >= self.open_until
        if guard is Guard.PERMIT_FREE:
            return self.permit is None
        return True

    def _take_effect(self, effect: Effect, was: BreakerState, event: BreakerEvent, now: float, error: str) -> None:
        if effect is Effect.GRANT:
            self.version += 1
            self.permit = self.version  # versions never repeat, so neither do permits
            self.permit_until = None if self.lease_s is None else now + self.lease_s
        elif effect is Effect.RETURN:
            self.version += 1
            self.permit = self.permit_until = None
        elif effect is Effect.COUNT:
            self.version += 1
            self.failures += 1
            self.reason = error
        elif effect is Effect.CLEAR:
            if self.failures:
                self.version += 1
            self.failures, self.reason = 0, ""
        elif effect is Effect.TRIP:
            self.failures += event is BreakerEvent.FAILURE
            self.open_until = now + self.settings.recovery_timeout
            self.reason = _tripped_because(was, event, self.failures, error)


def _tripped_because(was: BreakerState, event: BreakerEvent, failures: int, error: str) -> str:
    if event is BreakerEvent.EXPIRE:
        return f"the call that probed was lost: its process gave no sign for {PERMIT_LEASE_S:g} s"
    if was is BreakerState.HALF_OPEN:
        return f"the call that probed failed: {error}" if error else "the call that probed failed"
    counted = "1 failure" if failures == 1 else f"{failures} consecutive failures"
    return f"{counted}, the last: {error}" if error else counted


def event_of(kind: str, error: BaseException) -> BreakerEvent:
    """What the end of a call with `error`, of `kind` in the taxonomy, is for its breaker.

    Transient errors and timeouts count; a permanent one shows that the service answered. Refusals of ours (an open
    breaker, an empty retry budget) and everything that is no `Exception` (cancellation, KeyboardInterrupt) say nothing
    of the service. A cascade of a user's own type counts.
    """
    if not isinstance(error, Exception) or isinstance(error, (CircuitOpenError, RetryBudgetExhausted)):
        return BreakerEvent.RELEASE
    return BreakerEvent.ANSWERED if kind == "permanent" else BreakerEvent.FAILURE


def error_text(error: BaseException) -> str:
    """`error` on one line, at most 200 characters, whatever its `__str__` does."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "(its text could not be made)"
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
