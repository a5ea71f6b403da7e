"""Whether a failed attempt is followed by another, and after how long.

Called by the attempt loop (`execution.attempts`) and by the driver for recoveries; calls `taxonomy`. Rules:

* the clock and the randomness are handed in: the same state of `rng` gives the same schedule;
* a list gives the delays one by one and its last repeats, a callable decides a delay an error; both are capped where a
  cap was given, and jittered only where a jitter was named;
* delays are capped first and jittered below the cap: clipping a jittered delay would put half of all clients at
  exactly the cap, where they return in step;
* what a step asks for by `RetryableError(retry_after=...)` is exact; what a server asks for is a floor;
* a wait that cannot end before the deadline is not begun.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from pyworkflow_ray.durations import Duration, format_duration, parse_duration
from pyworkflow_ray.errors import FatalError, RetryableError
from pyworkflow_ray.resilience.adapters import says_nothing
from pyworkflow_ray.resilience.policy import Jitter, RetryPolicy
from pyworkflow_ray.resilience.taxonomy import RETRIED, Kind, members, server_retry_after

ErrorFilter = tuple[type[BaseException], ...] | Callable[[BaseException], bool]
DelayOf = Callable[[int, BaseException], Duration]  # (number of failed attempts so far, the error) -> delay

BACKOFF_CAP_S = 3600.0  # cap where the delay grows and none was given
AT_ONCE, EVERY_S = 32, 0.5  # things that are overdue after a restart
SPREAD = 0.125  # proportional jitter, and what is added to a server's Retry-After


@dataclass(slots=True, frozen=True)
class Retry:
    """Try again.

    delay_s: the wait. reason: why it is this long, in words. retry_at: UNIX time at which the next attempt may begin.
    """

    delay_s: float
    reason: str
    retry_at: float


@dataclass(slots=True, frozen=True)
class Stop:
    """Do not try again. why: as in `StepFailed.why`. note: the same for people, one line."""

    why: str
    note: str


def retry_delay(
    retry: int, policy: RetryPolicy, rng: Random, previous_s: float | None = None, chosen_s: float | None = None
) -> float:
    """Seconds to wait before retry number `retry` (1 is the first).

    With `d = min(cap, retry_delay * retry_backoff**(retry - 1))`, U uniform, and `cap` `policy.max_retry_delay_s`
    (None: an hour where the delay grows, else no cap):

    * "none": d
    * "proportional": U(0.875 d, min(1.125 d, cap)), so that clients spread at the cap too
    * "full": U(0, d)
    * "equal": d/2 + U(0, d/2)
    * "decorrelated": U(min(retry_delay, cap), min(3 * previous, cap)), where the previous delay of the first retry is
      `retry_delay`; it grows by itself and ignores `retry_backoff`
    * "auto": "none" where `retry_backoff` is 1, else "proportional"

    Where the policy has a list of delays, d is its item number `retry`, or its last; where code decides, what it chose.

    Never negative, never above the cap, and finite for any `retry`. The state of `rng` decides the result.

    Args:
        previous_s: The delay before this one, for "decorrelated".
        chosen_s: What the step's own code chose.

    Raises:
        ValueError: `retry` is below 1.

    Source: "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
    """
    if retry < 1:
        raise ValueError(f"retry={retry}: the first retry is number 1")
    cap = delay_cap(policy)
    jitter = effective_jitter(policy)
    if jitter == "decorrelated":
        base = min(policy.retry_delay_s, cap)
        return rng.uniform(base, max(base, min(cap, 3.0 * (base if previous_s is None else previous_s))))
    if chosen_s is not None:
        delay = min(chosen_s, cap)
    elif policy.delays_s:
        delay = min(policy.delays_s[min(retry, len(policy.delays_s)) - 1], cap)
    else:
        delay = _capped_backoff(retry, policy, cap)
    if jitter == "proportional":
        return rng.uniform((1 - SPREAD) * delay, min((1 + SPREAD) * delay, cap))
    if jitter == "full":
        return rng.uniform(0.0, delay)
    if jitter == "equal":
        return delay / 2 + rng.uniform(0.0, delay / 2)
    return delay


def spread(count: int, rng: Random) -> list[float]:
    """Seconds after which each of `count` things that are all overdue may begin, so that they don't begin together.

    After a restart everything that fell due meanwhile is due at once. At most `AT_ONCE` of them begin within each
    `EVERY_S`, each at a random moment of it: what they call has just come back, too.
    """
    return [index // AT_ONCE * EVERY_S + rng.uniform(0.0, EVERY_S) for index in range(count)]


def delay_cap(policy: RetryPolicy) -> float:
    """The longest computed delay in seconds; infinite where the delay is fixed and no cap was given."""
    if policy.max_retry_delay_s is not None:
        return policy.max_retry_delay_s
    return BACKOFF_CAP_S if policy.retry_backoff > 1 or policy.jitter == "decorrelated" else math.inf


def effective_jitter(policy: RetryPolicy) -> Jitter:
    """The jitter that "auto" stands for; any other as it is."""
    if policy.jitter != "auto":
        return policy.jitter
    return "proportional" if policy.retry_backoff > 1 else "none"


def _capped_backoff(retry: int, policy: RetryPolicy, cap: float) -> float:
    if policy.retry_delay_s == 0:
        return 0.0
    try:
        return min(cap, policy.retry_delay_s * float(policy.retry_backoff) ** (retry - 1))
    except OverflowError:
        return cap  # finite: without a cap the factor is 1


def decide(
    error: BaseException,
    kind: Kind,
    policy: RetryPolicy,
    *,
    now: float,
    rng: Random,
    retries_used: int,
    retry_on: ErrorFilter | None = None,
    no_retry_on: ErrorFilter = (),
    delay_of: DelayOf | None = None,
    previous_s: float | None = None,
    deadline: float | None = None,
    refused: bool = False,
    outcome_unknown: bool = False,
) -> Retry | Stop:
    """What follows a failed attempt.

    Args:
        error: The failure, of `kind` in the taxonomy.
        now: UNIX time.
        retries_used: Retries made before this failure.
        retry_on: Replaces the taxonomy for this decision; None leaves it to the taxonomy.
        no_retry_on: Never retried; wins over everything.
        delay_of: The step's own choice of a delay.
        previous_s: The last delay that was waited.
        deadline: UNIX time before which a wait must end.
        refused: The step's own breaker refused the attempt.
        outcome_unknown: The attempt was stopped, and what it did is not known (a timeout).
    """
    if refused:
        return Stop("refused", "its circuit breaker refused the attempt")
    if outcome_unknown and not policy.idempotent:
        return Stop("lost", "its outcome is unknown, and idempotent=False forbids to repeat it")
    stop = _forbidden(error, kind, retry_on, no_retry_on)
    if stop is not None:
        return stop
    if policy.max_retries is not None and retries_used >= policy.max_retries:
        allowed = policy.max_retries
        words = {0: "max_retries is 0", 1: "its one retry is used"}
        return Stop("exhausted", words.get(allowed, f"all {allowed} retries are used"))
    try:
        delay_s, reason = _delay(error, policy, retries_used + 1, now, rng, previous_s, delay_of)
    except Exception as raised:  # a user's callable, or what it gave
        return Stop("code", f"retry_delay could not be asked: {type(raised).__name__}: {raised}")
    if deadline is not None and now + delay_s >= deadline:
        left = format_duration(max(0.0, deadline - now))
        return Stop("deadline", f"the next attempt would wait {format_duration(delay_s)}, the deadline is in {left}")
    return Retry(delay_s, reason, now + delay_s)


def _forbidden(error: BaseException, kind: Kind, retry_on: ErrorFilter | None, no_retry_on: ErrorFilter) -> Stop | None:
    """Why the sort of the error forbids another attempt; None where it does not."""
    if not isinstance(error, Exception):
        return Stop("no retry", f"{type(error).__name__} is never retried")
    if isinstance(error, FatalError) or (
        isinstance(error, BaseExceptionGroup) and any(isinstance(member, FatalError) for member in members(error))
    ):
        return Stop("permanent", "FatalError is never retried")
    try:
        if _matches(error, no_retry_on, any):
            return Stop("no retry", "no_retry_on names it")
        if isinstance(error, RetryableError):
            return None
        if retry_on is not None:
            return None if _matches(error, retry_on, all) else Stop("no retry", "retry_on does not name it")
    except Exception as raised:  # a user's predicate
        return Stop("code", f"the predicate of retry_on or no_retry_on raised {type(raised).__name__}: {raised}")
    return None if RETRIED[kind] else Stop("refused" if kind == "cascade" else kind, f"a {kind} error is not retried")


def _matches(error: BaseException, given: ErrorFilter, of_group: Callable[[list[bool]], bool]) -> bool:
    """Whether the filter names the error, or of a group any or all members. A predicate gets the error itself."""
    if not isinstance(given, tuple):
        return bool(given(error))
    if isinstance(error, given):
        return True
    if isinstance(error, BaseExceptionGroup):
        return of_group([isinstance(member, given) for member in members(error)])
    return False


def _delay(
    error: BaseException,
    policy: RetryPolicy,
    retry: int,
    now: float,
    rng: Random,
    previous_s: float | None,
    delay_of: DelayOf | None,
) -> tuple[float, str]:
    if not says_nothing(error) or isinstance(error, BaseExceptionGroup):
        wished = _wish(error, now, rng)
        if wished is not None:
            return wished
    chosen_s = None if delay_of is None else parse_duration(delay_of(retry, error))
    return retry_delay(retry, policy, rng, previous_s, chosen_s), delay_words(policy)


def _wish(error: BaseException, now: float, rng: Random) -> tuple[float, str] | None:
    """The wait that the step or the server asks for, and who does; None: the policy decides."""
    asked = [member.delay_s(now) for member in members(error) if isinstance(member, RetryableError)]
    exact = max((seconds for seconds in asked if seconds is not None), default=None)
    if exact is not None:
        return exact, "retry_after"
    floors = [server_retry_after(member, now) for member in members(error)]
    floor = max((seconds for seconds in floors if seconds is not None), default=0.0)
    if floor > 0:  # 0, or a date that is over, asks for nothing: the policy decides
        return floor + rng.uniform(0.0, SPREAD * floor), "server retry_after"
    return None


def delay_words(policy: RetryPolicy) -> str:
    """Why a delay is what it is: "fixed", "backoff", "listed", "chosen", each with "+jitter" or not; "decorrelated"."""
    jitter = effective_jitter(policy)
    if jitter == "decorrelated":
        return jitter
    shape = "backoff" if policy.retry_backoff > 1 else "fixed"
    if policy.delay_by_code or policy.delays_s:
        shape = "chosen" if policy.delay_by_code else "listed"
    return shape if jitter == "none" else f"{shape}+jitter"
