"""How a breaker that has closed lets calls in again: from a trickle up, so that a service just healed is not run over.

Pure; called by `breaker`. Rules (additive increase, multiplicative decrease):

* the admitted rate is a share of the offered one, which is measured over the last second or so; never below a trickle;
* the share grows evenly over the ramp's duration; each counted failure halves it. At 1 the ramp is over;
* the breaker's one holder decides, so the rate is the whole cluster's.
"""

from __future__ import annotations

import math

FIRST_SHARE = 0.05
TRICKLE_PER_S = 1.0
_MEMORY_S = 1.0


class Ramp:
    """duration_s: from the first call to every call, where nothing fails."""

    def __init__(self, duration_s: float, now: float, share: float = FIRST_SHARE) -> None:
        self.duration_s = duration_s
        self.share = share
        self._at = now
        self._offered = 0.0  # calls, older ones fading
        self._tokens = 1.0

    def pass_time(self, now: float) -> None:
        spent = max(0.0, now - self._at)
        self._at = max(self._at, now)
        self.share = min(1.0, self.share + (1 - FIRST_SHARE) * spent / self.duration_s)
        self._offered *= math.exp(-spent / _MEMORY_S)
        rate = self.rate
        self._tokens = min(max(1.0, rate / 10), self._tokens + spent * rate)

    @property
    def rate(self) -> float:
        """Calls a second that are admitted now."""
        return max(TRICKLE_PER_S, self.share * self._offered / _MEMORY_S)

    @property
    def over(self) -> bool:
        return self.share >= 1.0

    def full(self, now: float) -> bool:
        """A call is offered; True where it can't be admitted now."""
        self.pass_time(now)
        self._offered += 1
        return self._tokens < 1.0

    def take(self) -> None:
        """The call was admitted."""
        self._tokens -= 1.0

    def failed(self, now: float) -> None:
        self.pass_time(now)
        self.share = max(FIRST_SHARE, self.share / 2)

    def wait_s(self) -> float:
        """When a refused caller may try again."""
        return max(0.0, (1.0 - self._tokens) / self.rate)
