"""The circuit breaker's state machine: the interpreter of `breaker_table.TABLE`, and the numbers it works on.

Called by `execution.breakers` (a breaker of one process) and `resilience.mirror` (one of a cluster); calls the table,
the window and the ramp beside it.

Rules:

* Every change of state, and every reset, begins a new *generation*. The result of a call carries the generation in
  which the call began; one of an earlier generation is late and changes nothing (in Polly a late success closes a
  half-open circuit).
* In half-open at most `half_open_max_calls` calls are let through at the same time; each holds a *permit* with a lease.
  A lease that ends, because the holder's process died, counts as a failed probe, as of the instant at which it ended.
* Outcomes are counted in the order in which results arrive, and rates are judged at each of them.
* `version` grows with every change that another process could miss, and is what processes compare to learn who knows
  the newer.
* Time is handed in: seconds of one monotonic clock. What leaves a process carries durations, never instants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyworkflow_ray.errors import CircuitOpenError, PyWorkflowError, RetryBudgetExhausted
from pyworkflow_ray.resilience.breaker_ramp import FIRST_SHARE, Ramp
from pyworkflow_ray.resilience.breaker_settings import BreakerSettings
from pyworkflow_ray.resilience.breaker_table import TABLE, BreakerEvent, BreakerState, Effect, Guard
from pyworkflow_ray.resilience.breaker_window import Window

__all__ = [
    "PERMIT_LEASE_S",
    "TABLE",
    "Answer",
    "Breaker",
    "BreakerEvent",
    "BreakerSettings",
    "BreakerState",
    "Effect",
    "Guard",
    "IllegalBreakerEvent",
    "View",
    "error_text",
    "event_of",
]

PERMIT_LEASE_S = 10.0  # a holder renews three times in it; its death is noticed after it

_FORCES = (BreakerEvent.FORCE_OPEN, BreakerEvent.FORCE_CLOSED, BreakerEvent.RESET)
_NO_END = (BreakerEvent.ASK, BreakerEvent.EXPIRE, *_FORCES)


class IllegalBreakerEvent(PyWorkflowError):
    """An event that cannot happen in this state. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class View:
    """A breaker's state at one instant, as it travels between processes: durations, no instants.

    lineage: the actor (all its restarts) that the version belongs to; "" for a breaker of one process.
    failures: in a row; of a breaker that judges rates: in its window, of `calls`, of which `slow` were slow.
    open_for_s: rest of the open time; None: it has no end (forced open).
    permits: those that are out, each with the rest of its lease (None: it has none).
    successes: probes that succeeded. failed_probes: failed in a row. ramp: share that is let through.
    reason: in words, why it is not closed.
    heard: the newest version that any run has spoken of, never below `version`.
    configured: the settings that `configure()` put in place of the declared ones.
    nodes: views of nodes whose own failures have opened the breaker for them alone.
    """

    version: int = 0
    generation: int = 0
    state: BreakerState = BreakerState.CLOSED
    failures: int = 0
    open_for_s: float | None = 0.0
    permits: tuple[tuple[int, float | None], ...] = ()
    reason: str = ""
    lineage: str = ""
    heard: int = 0
    successes: int = 0
    failed_probes: int = 0
    calls: int = 0
    slow: int = 0
    ramp: float | None = None
    configured: BreakerSettings | None = None
    nodes: tuple[tuple[str, View], ...] = ()


class Answer(NamedTuple):
    """Answer to a caller that asked.

    generation: to be handed in with the call's end; None where the process has not joined the cluster's breaker yet.
    permit: set where the call is a probe.
    retry_after_s: of a refusal: when it makes sense to ask again; None: nobody knows.
    aside: of a call on a node with a breaker of its own: generation and permit there.
    """

    admitted: bool
    generation: int | None
    permit: int | None = None
    retry_after_s: float | None = None
    aside: tuple[int, int | None] | None = None


class Breaker:
    """One circuit breaker.

    Args:
        settings: The declared settings.
        lease_s: Life of a permit without renewal, in seconds; None where the holder cannot die alone (one process).
    """

    def __init__(self, settings: BreakerSettings, *, lease_s: float | None = PERMIT_LEASE_S) -> None:
        self.settings = settings
        self.configured = False
        self.lease_s = lease_s
        self.state = BreakerState.CLOSED
        self.generation = 0
        self.version = 0
        self.failures = 0
        self.successes = 0
        self.failed_probes = 0
        self.reason = ""
        self.opened_at = 0.0
        self.open_until = 0.0
        self.permits: dict[int, float | None] = {}
        self.window = Window(settings.window)
        self.ramp: Ramp | None = None
        self.nodes: set[str] = set()  # of the failures in a row

    def ask(self, now: float) -> Answer:
        """A caller asks to be let through: admitted, admitted with a permit, or refused."""
        self.settle(now)
        effect = self._apply(BreakerEvent.ASK, now)
        permit = self.version if effect is Effect.GRANT else None
        if effect is Effect.REFUSE:
            return Answer(False, self.generation, None, self.retry_after(now))
        return Answer(True, self.generation, permit)

    def ended(
        self,
        event: BreakerEvent,
        now: float,
        *,
        generation: int,
        permit: int | None = None,
        error: str = "",
        slow: bool = False,
        count: int = 1,
        node: str = "",
    ) -> bool:
        """A call that began in `generation` has ended; False where that is late and changed nothing.

        Args:
            slow: It took as long as `slow_call_duration`, or longer.
            count: So many calls have ended so, one after another.
            node: Where it was made.

        Raises:
            IllegalBreakerEvent: no call of this generation can end so: it has not begun yet, or none was let through,
                or its permit is not one that is out.
        """
        self.settle(now)
        if event in _NO_END:
            raise IllegalBreakerEvent(f"a call cannot end with {event.value!r}")
        if generation > self.generation:
            raise IllegalBreakerEvent(
                f"a call of generation {generation} ended ({event.value}), the breaker is at {self.generation}"
            )
        if generation < self.generation:
            return False
        if permit not in self.permits if self.state is BreakerState.HALF_OPEN else permit is not None:
            out = ", ".join(map(str, self.permits)) or "none"
            raise IllegalBreakerEvent(
                f"a call with permit {permit} ended ({event.value}) in state {self.state.value}, permits out: {out}"
            )
        event = self._judged(event, slow)
        if self.state is not BreakerState.CLOSED:
            self._apply(event, now, error, permit=permit)
            return True
        began_in = self.generation
        while count > 0 and self.generation == began_in:
            step = self._counted_together(event, count)
            count -= step
            failed = event is BreakerEvent.FAILURE
            if self.settings.windowed and event in (BreakerEvent.SUCCESS, BreakerEvent.FAILURE):
                self.window.add(now, failed=failed, slow=slow, count=step, node=node)
            elif failed:
                self.nodes.add(node)
            self._apply(event, now, error, count=step)
        return True

    def force(self, event: BreakerEvent, now: float) -> None:
        """A person forces the breaker open or closed, or resets it."""
        if event not in _FORCES:
            raise IllegalBreakerEvent(f"{event.value!r} is nothing that a person does")
        self.settle(now)
        self._apply(event, now)

    def configure(self, changes: Mapping[str, Any], now: float) -> None:
        """Change settings of the living breaker. Counts go on, save those of a window that becomes another."""
        self.settle(now)
        was, self.settings = self.settings, self.settings.with_options(changes)
        self.configured = True
        self.version += 1
        self._fit_window(was)
        if self.state is BreakerState.OPEN:
            self.open_until = self.opened_at + self.settings.open_time(self.failed_probes)
        if self.settings.ramp is None:
            self.ramp = None

    def renew(self, permit: int, now: float) -> bool:
        """The holder of `permit` lives: its lease begins anew. False where the permit is out no longer."""
        self.settle(now)
        if permit not in self.permits:
            return False
        self.permits[permit] = None if self.lease_s is None else now + self.lease_s
        return True

    def settle(self, now: float) -> None:
        """Let a lease that has ended by `now` expire, as of the instant at which it ended; end a ramp that is over."""
        ended = min((until for until in self.permits.values() if until is not None), default=None)
        if ended is not None and now >= ended:
            self._apply(BreakerEvent.EXPIRE, ended)
        if self.ramp is not None:
            self.ramp.pass_time(now)
            if self.ramp.over:
                self.ramp = None
                self.version += 1

    def retry_after(self, now: float) -> float | None:
        """Seconds of open time that are left; 0 in half-open and closed, None when forced open."""
        if self.state is BreakerState.FORCED_OPEN:
            return None
        if self.ramp is not None:
            return self.ramp.wait_s()
        return max(0.0, self.open_until - now) if self.state is BreakerState.OPEN else 0.0

    @property
    def bad_nodes(self) -> set[str]:
        """The nodes whose failures count now."""
        if self.settings.windowed:
            return self.window.nodes()
        return self.nodes or {""}

    @property
    def idle(self) -> bool:
        """Whether forgetting it loses nothing: closed, with nothing counted, forced or configured."""
        return (
            self.state is BreakerState.CLOSED
            and not self.failures
            and not self.window.failures
            and not self.window.slow
            and self.ramp is None
            and not self.configured
        )

    def view(self, now: float) -> View:
        """The state at `now`. Looking is not asking: it lets nobody through and never turns open into half-open."""
        self.settle(now)
        self.window.expire(now)
        windowed = self.settings.windowed
        return View(
            version=self.version,
            generation=self.generation,
            state=self.state,
            failures=self.window.failures if windowed and self.state is BreakerState.CLOSED else self.failures,
            open_for_s=self.retry_after(now) if self.ramp is None else 0.0,
            permits=tuple((n, None if at is None else max(0.0, at - now)) for n, at in self.permits.items()),
            reason=self.reason,
            heard=self.version,
            successes=self.successes,
            failed_probes=self.failed_probes,
            calls=self.window.calls,
            slow=self.window.slow,
            ramp=None if self.ramp is None else self.ramp.share,
            configured=self.settings if self.configured else None,
        )

    def adopt(self, view: View, now: float) -> None:
        """Take over a state that another process knew. Its rest of open time is clamped to what the settings allow.

        What a window held is not in a view: a breaker that judges rates begins its window anew.
        """
        if view.configured is not None:
            was, self.settings, self.configured = self.settings, view.configured, True
            self._fit_window(was)
        self.version, self.generation = view.version, view.generation
        self.state, self.failures, self.reason = view.state, view.failures, view.reason
        self.successes, self.failed_probes = view.successes, view.failed_probes
        if self.settings.windowed and self.state is BreakerState.CLOSED:
            self.failures = 0
        longest = self.settings.open_time(view.failed_probes)
        rest = min(max(0.0, view.open_for_s or 0.0), longest)
        self.open_until, self.opened_at = now + rest, now + rest - longest
        self.permits = {}
        for permit, lease_s in view.permits:
            none = lease_s is None or self.lease_s is None
            self.permits[permit] = None if none else now + min(max(0.0, lease_s or 0.0), self.lease_s or 0.0)
        self.ramp = None
        if view.ramp is not None and self.settings.ramp is not None:
            self.ramp = Ramp(self.settings.ramp, now, max(FIRST_SHARE, view.ramp))

    # The table's interpreter ------------------------------------------------------------------------------------

    def _apply(
        self, event: BreakerEvent, now: float, error: str = "", *, permit: int | None = None, count: int = 1
    ) -> Effect:
        rules = TABLE.get((self.state, event))
        if rules is None:
            raise IllegalBreakerEvent(f"{event.value!r} cannot happen in state {self.state.value!r}")
        rule = next(rule for rule in rules if self._holds(rule.guard, event, now))
        was = self.state
        if rule.next is not was or rule.effect is Effect.CLEAR:
            self.state = rule.next
            self.generation += 1
            self.version += 1
            self.permits = {}
        self._take_effect(rule.effect, was, event, now, error, permit, count)
        return rule.effect

    def _holds(self, guard: Guard, event: BreakerEvent, now: float) -> bool:
        if guard is Guard.TRIPS:
            return self._why_tripping(event) is not None and len(self.bad_nodes) >= self.settings.min_nodes
        if guard is Guard.RECOVERY_OVER:
            return now >= self.open_until
        if guard is Guard.PERMIT_FREE:
            return len(self.permits) < self.settings.half_open_max_calls
        if guard is Guard.ENOUGH:
            return self.successes + 1 >= self.settings.success_threshold
        if guard is Guard.RAMP_FULL:
            return self.ramp is not None and self.ramp.full(now)
        return True

    def _take_effect(
        self,
        effect: Effect,
        was: BreakerState,
        event: BreakerEvent,
        now: float,
        error: str,
        permit: int | None,
        count: int,
    ) -> None:
        if effect is Effect.GRANT:
            self.version += 1
            # versions never repeat, so neither do permits
            self.permits[self.version] = None if self.lease_s is None else now + self.lease_s
            if was is not BreakerState.HALF_OPEN:
                self.successes = 0
        elif effect is Effect.ADMIT and self.ramp is not None:
            self.ramp.take()
        elif effect in (Effect.RETURN, Effect.PROVE):
            self.version += 1
            self.permits.pop(permit or 0, None)
            self.successes += effect is Effect.PROVE
        elif effect is Effect.COUNT:
            self.version += 1
            self.failures += count
            self.reason = error
            if self.ramp is not None:
                self.ramp.failed(now)
        elif effect is Effect.PASS:
            if self.failures:
                self.version += 1
                if not self.settings.windowed:
                    self.nodes.clear()
            self.failures, self.reason = 0, ""
        elif effect is Effect.TRIP:
            self._trip(was, event, now, error)
        elif effect in (Effect.CLOSE, Effect.CLEAR):
            self._begin_anew(effect, now)

    def _trip(self, was: BreakerState, event: BreakerEvent, now: float, error: str) -> None:
        if was is BreakerState.CLOSED:
            why = self._why_tripping(event) or ""
            self.failures += event is BreakerEvent.FAILURE
            self.reason = f"{why}, the last: {error}" if error else why
            if self.settings.min_nodes > 1:
                self.reason += f" (from {len(self.bad_nodes)} nodes)"
        else:
            self.failed_probes += 1
            self.failures += event is BreakerEvent.FAILURE
            if event is BreakerEvent.EXPIRE:
                self.reason = f"the call that probed was lost: its process gave no sign for {PERMIT_LEASE_S:g} s"
            else:
                self.reason = f"the call that probed failed: {error}" if error else "the call that probed failed"
        self.opened_at = now
        self.open_until = now + self.settings.open_time(self.failed_probes)
        self.ramp = None
        self.window.clear()
        self.nodes.clear()

    def _begin_anew(self, effect: Effect, now: float) -> None:
        self.failures = self.successes = self.failed_probes = 0
        self.window.clear()
        self.nodes.clear()
        self.ramp = None
        self.reason = ""
        if self.state in (BreakerState.FORCED_OPEN, BreakerState.FORCED_CLOSED):
            self.reason = f"{self.state.value.replace('_', ' ')} by hand"
        elif effect is Effect.CLOSE and self.settings.ramp is not None:
            self.ramp = Ramp(self.settings.ramp, now)

    # Counting -----------------------------------------------------------------------------------------------------

    def _judged(self, event: BreakerEvent, slow: bool) -> BreakerEvent:
        """What the end of a call is for the table, where it may have been slow: success or failure, slow counts."""
        if not slow or event is BreakerEvent.RELEASE:
            return event
        if self.settings.slow_call_rate is None or self.state is BreakerState.HALF_OPEN:
            return BreakerEvent.FAILURE
        return BreakerEvent.SUCCESS if event is BreakerEvent.ANSWERED else event

    def _counted_together(self, event: BreakerEvent, count: int) -> int:
        """How many of `count` equal ends are judged as one: a success trips only as the window reaches its minimum."""
        if event is not BreakerEvent.SUCCESS:
            return 1
        missing = self.settings.minimum_calls - self.window.calls
        return min(count, missing) if self.settings.windowed and missing > 0 else count

    def _why_tripping(self, event: BreakerEvent) -> str | None:
        """In words, why the breaker opens with this end of a call, which the window holds by now; None: it does not."""
        settings, window = self.settings, self.window
        if settings.windowed and window.calls >= settings.minimum_calls:
            failed, slow = window.rates()
            of = f"of the last {window.calls} calls"
            if settings.failure_rate is not None and failed >= settings.failure_rate:
                return f"{window.failures} {of} failed ({failed:.0%}, limit {settings.failure_rate:.0%})"
            if settings.slow_call_rate is not None and slow >= settings.slow_call_rate:
                return f"{window.slow} {of} were slow ({slow:.0%}, limit {settings.slow_call_rate:.0%})"
        if settings.failure_rate is None and event is BreakerEvent.FAILURE:
            failures = self.failures + 1
            if failures >= settings.failure_threshold:
                return "1 failure" if failures == 1 else f"{failures} consecutive failures"
        return None

    def _fit_window(self, was: BreakerSettings) -> None:
        if was.window != self.settings.window:
            self.window = Window(self.settings.window)


Counts = Callable[[BaseException], bool]


def event_of(
    kind: str, error: BaseException, *, counts: Counts | None = None, name: str = "", key: str | None = None
) -> BreakerEvent:
    """What the end of a call with `error`, of `kind` in the taxonomy, is for its breaker.

    Transient errors and timeouts count; a permanent one shows that the service answered. Refusals of ours (an open
    breaker, an empty retry budget) and everything that is no `Exception` (cancellation, KeyboardInterrupt) say nothing
    of the service. A cascade of a user's own type counts.

    Args:
        counts: Decides in place of the taxonomy. It may ask for another breaker's refusals too, never for those of
            the breaker itself.
        name, key: Of the breaker itself.
    """
    if not isinstance(error, Exception):
        return BreakerEvent.RELEASE
    refused = isinstance(error, (CircuitOpenError, RetryBudgetExhausted))
    if isinstance(error, CircuitOpenError) and (error.name, error.key) == (name, key):
        return BreakerEvent.RELEASE
    if counts is not None and counts(error):
        return BreakerEvent.FAILURE
    if refused:
        return BreakerEvent.RELEASE
    return BreakerEvent.ANSWERED if counts is not None or kind == "permanent" else BreakerEvent.FAILURE


def error_text(error: BaseException) -> str:
    """`error` on one line, at most 200 characters, whatever its `__str__` does."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "(its text could not be made)"
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
