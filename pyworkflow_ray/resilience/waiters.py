"""Who waits for a breaker to let them through, and when each may ask again. Pure.

Called by `truth` and by a breaker of one process. Rules:

* waiters are ordered by how long they have waited. So many as may probe are told the rest of the open time; the others
  come after them, one by one: at `PER_S`, or at a ramp's rate. So what waited out an outage neither asks in one
  moment nor is let in at once, and whoever waited longest comes first;
* where a person closes, resets or configures the breaker, those who may come earlier are told, in the same order;
* a waiter that does not come when it is due is forgotten after a grace: its run was cancelled, or its owner died.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyworkflow_ray.resilience.breaker import Answer, Breaker, BreakerState
from pyworkflow_ray.resilience.mirror import Asker

PER_S = 50.0
HALF_OPEN_ASK_S = 1.0  # the next look at a breaker that another call is probing
FORCED_ASK_S = 30.0  # the next look at one that a person has opened
GRACE_S = 10.0


@dataclass(slots=True)
class _Waiter:
    since: float
    due_at: float
    run: tuple[str, str] | None = None


class Waiters:
    def __init__(self) -> None:
        self._waiting: dict[str, _Waiter] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def waits(self, who: str) -> bool:
        return who in self._waiting

    def answered(self, asker: Asker, answer: Answer, breaker: Breaker, now: float) -> Answer:
        """What a waiter is told: let through, or refused with the time at which to ask again."""
        who, waited_s = asker.who, asker.waited_s
        if answer.admitted:
            self._waiting.pop(who, None)
            return answer
        known = self._waiting.get(who)
        since = now - waited_s if known is None else min(known.since, now - waited_s)
        self._waiting[who] = waiter = _Waiter(since, now, asker.run)
        self._forget(now)
        ahead = sum(1 for other, w in self._waiting.items() if (w.since, other) < (since, who))
        after_s = self._after_s(ahead, breaker, now)
        waiter.due_at = now + after_s
        return answer._replace(retry_after_s=after_s)

    def recalled(self, breaker: Breaker, now: float) -> list[tuple[float, str, tuple[str, str]]]:
        """Those who may come earlier than they were told, in the order in which they have waited: in so many seconds,
        their name, storage and run."""
        earlier = []
        ordered = sorted(self._waiting.items(), key=lambda one: (one[1].since, one[0]))
        for ahead, (who, waiter) in enumerate(ordered):
            after_s = self._after_s(ahead, breaker, now)
            if waiter.run is not None and now + after_s < waiter.due_at:
                waiter.due_at = now + after_s
                earlier.append((after_s, who, waiter.run))
        return earlier

    def _after_s(self, ahead: int, breaker: Breaker, now: float) -> float:
        if breaker.ramp is not None:
            return (ahead + 1) / max(breaker.ramp.rate, 1.0)
        probes = breaker.settings.half_open_max_calls
        if breaker.state in (BreakerState.CLOSED, BreakerState.FORCED_CLOSED):
            return ahead / PER_S
        behind_s = max(0, ahead - probes + 1) / PER_S
        if breaker.state is BreakerState.OPEN:
            return (breaker.retry_after(now) or 0.0) + (behind_s and HALF_OPEN_ASK_S + behind_s)
        return (FORCED_ASK_S if breaker.state is BreakerState.FORCED_OPEN else HALF_OPEN_ASK_S) + behind_s

    def _forget(self, now: float) -> None:
        late = [who for who, w in self._waiting.items() if w.due_at + GRACE_S < now]
        for who in late:
            del self._waiting[who]
