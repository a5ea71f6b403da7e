"""Retry budgets: one token bucket a name, of which every process holds a share, so that a decision needs no message.

Called by `execution.budgets` and, for the cluster's bucket, by `runtime.budget_actor`; calls nothing. Rules:

* a retry takes `retry_cost` tokens, one after a throttled attempt `throttle_cost`; a success gives `refund` back; there
  are never more than `tokens`. With the defaults steady extra load is bounded by 1/14, about 7 %;
* tokens are conserved: what all processes spend is at most `tokens` and what successes gave back; beyond the bucket a
  process may have earned itself the price of one retry, which it need not ask for;
* a process asks the bucket when its share is too small, and gives back what its share has too much of. Of its decisions
  it asks at most once in `CALL_EVERY`, and `BURST` times more at once: in between an empty share refuses by itself;
* a share is half of what the bucket has, so that the first to ask do not take it all; small buckets give all they have;
* the share of a process that dies is gone until successes have filled the bucket again.

Source: AWS SDKs, "Retry behavior", standard mode (botocore 1.44: 500 tokens, 14 a retry, 5 when throttled, 1 back).
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

CALL_EVERY = 150  # decisions for one more message
BURST = 3.0  # messages that may follow each other at once
SMALL = 4  # retries that a share is enough for, where the bucket has them
ON_CREDIT = 0.1  # of the bucket: what a process may spend while the bucket does not answer


class BudgetSettings(BaseModel):
    """What a budget is made of; the defaults are those of today's AWS SDKs."""

    model_config = ConfigDict(frozen=True)

    tokens: float = 500
    retry_cost: float = 14
    throttle_cost: float = 5
    refund: float = 1

    def cost(self, throttled: bool) -> float:
        return self.throttle_cost if throttled else self.retry_cost


class Bucket:
    """The tokens that no process holds."""

    def __init__(self, settings: BudgetSettings) -> None:
        self.settings = settings
        self.available = float(settings.tokens)

    def exchange(self, returned: float, wants: bool) -> float:
        """Take back `returned` tokens (negative: they were spent before they were granted), and give a share.

        Args:
            wants: Whether a share is asked for.
        """
        self.available = min(self.settings.tokens, self.available + returned)
        if not wants or self.available <= 0:
            return 0.0
        share = min(self.available, max(self.available / 2, SMALL * self.settings.retry_cost))
        self.available -= share
        return share

    def configure(self, settings: BudgetSettings) -> None:
        """Take newer settings: what is gone stays gone, in proportion."""
        self.available = self.available / self.settings.tokens * settings.tokens
        self.settings = settings


@dataclass(slots=True, frozen=True)
class Ask:
    """A message to the bucket: what is given back, and whether a share is wanted."""

    returned: float
    wants: bool


class Share:
    """The tokens that one process holds.

    A decision is `retry` or `success`. Where it gives an `Ask`, send it, hand the answer to `granted`, and, for a
    retry, decide with `spend`; where the bucket does not answer, call `unanswered`.
    """

    def __init__(self, settings: BudgetSettings) -> None:
        self.settings = settings
        self.tokens = 0.0
        self._credit = BURST  # messages that may be sent now
        self._surplus = 0.0  # to be given back; not to be spent here
        self._debt = 0.0  # spent without an answer, still to be told
        self._giving = False

    def retry(self, throttled: bool) -> bool | Ask:
        """Whether a retry may be made: yes, no, or the question to be asked first."""
        self._decided()
        if self.spend(throttled):
            return True
        if self._credit < 1:
            return False
        return self._ask(wants=True)

    def spend(self, throttled: bool) -> bool:
        """Take the price of a retry, where the share has it."""
        cost = self.settings.cost(throttled)
        if self.tokens < cost:
            return False
        self.tokens -= cost
        return True

    def success(self) -> Ask | None:
        """A step succeeded. What the share then has too much of is given back, now and then."""
        self._decided()
        kept = self.settings.retry_cost
        if self.tokens < kept:
            self.tokens = min(self.tokens + self.settings.refund, kept)
        else:
            self._surplus = min(self._surplus + self.settings.refund, self.settings.tokens)
        if self._surplus > 0 and self._credit >= BURST and not self._giving:
            self._surplus, self.tokens = self._surplus + self.tokens - kept, kept
            self._giving = True
            return self._ask(wants=False)
        return None

    def granted(self, tokens: float) -> None:
        """The bucket's answer."""
        self._giving = False
        self.tokens += tokens

    def unanswered(self, ask: Ask, throttled: bool | None = None) -> bool:
        """The bucket did not answer: the next message tells what this one did.

        Returns:
            Whether the retry may be made on credit, of a tenth of the bucket in all.
        """
        self._giving = False
        self._surplus, self._debt = max(0.0, ask.returned), max(0.0, -ask.returned)
        if throttled is None or self._debt + self.settings.cost(throttled) > self.settings.tokens * ON_CREDIT:
            return False
        self._debt += self.settings.cost(throttled)
        return True

    def _ask(self, *, wants: bool) -> Ask:
        self._credit -= 1
        ask = Ask(self._surplus - self._debt, wants)
        self._surplus = self._debt = 0.0
        return ask

    def _decided(self) -> None:
        self._credit = min(BURST, self._credit + 1 / CALL_EVERY)
