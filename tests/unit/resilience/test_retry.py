"""Delays with every jitter, and the decision after a failed attempt."""

from __future__ import annotations

import datetime as dt
import math
import random
from collections import Counter
from typing import Any

import httpx
import pytest

from pyworkflow_ray.errors import CircuitOpenError, FatalError, RetryableError, StepTimeoutError
from pyworkflow_ray.resilience.policy import RetryPolicy
from pyworkflow_ray.resilience.retry import Retry, Stop, decide, retry_delay, spread
from pyworkflow_ray.resilience.taxonomy import classify

NOW = 1_800_000_000.0
JITTERS = ("auto", "none", "proportional", "full", "equal", "decorrelated")


def policy(**values: Any) -> RetryPolicy:
    return RetryPolicy(**{"max_retries": 5, **values})


def second_implementation(
    retry: int, p: RetryPolicy, rng: random.Random, previous: float | None
) -> tuple[float, float]:
    """Bounds of a delay, written apart from the first: by multiplication, one retry after another."""
    cap = p.max_retry_delay_s
    if cap is None:
        cap = 3600.0 if p.retry_backoff > 1 or p.jitter == "decorrelated" else math.inf
    d = p.retry_delay_s
    for _ in range(retry - 1):
        d = min(d * p.retry_backoff, cap)
    d = min(d, cap)
    jitter = p.jitter
    if jitter == "auto":
        jitter = "none" if p.retry_backoff == 1 else "proportional"
    if jitter == "decorrelated":
        low = min(p.retry_delay_s, cap)
        return low, max(low, min(cap, 3 * (low if previous is None else previous)))
    return {
        "none": (d, d),
        "proportional": (d - d / 8, min(d + d / 8, cap)),
        "full": (0.0, d),
        "equal": (d / 2, d),
    }[jitter]


def test_case_2_delays_stay_in_the_bounds_of_a_second_implementation() -> None:
    for seed in range(10_000):
        rng = random.Random(seed)
        p = policy(
            retry_delay_s=rng.choice([0.0, 0.1, 1.0, 5.0, rng.uniform(0, 100)]),
            retry_backoff=rng.choice([1.0, 1.5, 2.0, 10.0]),
            max_retry_delay_s=rng.choice([None, 0.0, 3.0, 60.0]),
            jitter=rng.choice(JITTERS),
        )
        retry = rng.randint(1, 40)
        previous = rng.choice([None, rng.uniform(0, 60)])
        low, high = second_implementation(retry, p, rng, previous)
        delay = retry_delay(retry, p, rng, previous)
        slack = 1e-9 * max(1.0, high)
        assert low - slack <= delay <= high + slack, f"seed {seed}: {delay} not in [{low}, {high}], retry {retry}, {p}"


@pytest.mark.parametrize("jitter", ["auto", "proportional", "full", "equal", "decorrelated"])
def test_case_2_clients_spread_at_the_cap_too(jitter: str) -> None:
    p = policy(retry_delay_s=1, retry_backoff=2, max_retry_delay_s=60, jitter=jitter)
    rng = random.Random(7)
    delays = [retry_delay(12, p, rng, previous_s=60.0) for _ in range(10_000)]
    assert max(Counter(delays).values()) <= 2, "clients return in step"
    low, high = second_implementation(12, p, rng, 60.0)
    assert min(delays) < low + 0.02 * (high - low)
    assert max(delays) > high - 0.02 * (high - low)
    assert sum(delays) / len(delays) == pytest.approx((low + high) / 2, rel=0.02)
    assert max(delays) <= 60


def test_case_2_automatic_jitter_of_a_four_second_wait() -> None:
    p = policy(retry_delay_s=1, retry_backoff=2, max_retry_delay_s=60)
    delays = [retry_delay(3, p, random.Random(seed)) for seed in range(1_000)]
    assert 3.5 <= min(delays) < 3.52
    assert 4.48 < max(delays) <= 4.5


def test_a_fixed_delay_has_no_automatic_jitter_and_no_cap() -> None:
    assert {retry_delay(k, policy(retry_delay_s=7200.0), random.Random(k)) for k in range(1, 50)} == {7200.0}


def test_case_1_a_growing_delay_is_capped_at_an_hour() -> None:
    p = policy(retry_delay_s=1, retry_backoff=2, jitter="none")
    assert [retry_delay(k, p, random.Random(0)) for k in (1, 2, 3, 12, 13)] == [1, 2, 4, 2048, 3600]


@pytest.mark.parametrize("jitter", JITTERS)
@pytest.mark.parametrize("backoff", [1.0, 1.0001, 2.0, 1e300])
def test_case_1_finite_for_the_ten_thousandth_retry(jitter: str, backoff: float) -> None:
    delay = retry_delay(10_000, policy(retry_backoff=backoff, jitter=jitter), random.Random(1), previous_s=3600.0)
    assert 0 <= delay <= 3600


def test_a_zero_delay_stays_zero() -> None:
    for jitter in JITTERS:
        assert retry_delay(10_000, policy(retry_delay_s=0, retry_backoff=2, jitter=jitter), random.Random(1)) == 0


def test_case_2_a_seed_repeats_a_schedule() -> None:
    p = policy(retry_backoff=2)

    def schedule(seed: int) -> list[float]:
        rng = random.Random(seed)
        return [retry_delay(k, p, rng) for k in range(1, 20)]

    assert schedule(3) == schedule(3) != schedule(4)


def test_case_1_a_list_gives_the_delays_one_by_one_and_its_last_repeats() -> None:
    p = policy(delays_s=(0.0, 1.0, 30.0))
    assert [retry_delay(k, p, random.Random(k)) for k in (1, 2, 3, 4, 10_000)] == [0, 1, 30, 30, 30]
    capped = policy(delays_s=(1.0, 30.0), max_retry_delay_s=10)
    assert [retry_delay(k, capped, random.Random(k)) for k in (1, 2)] == [1, 10]


def test_a_list_is_jittered_only_where_a_jitter_is_named() -> None:
    p = policy(delays_s=(8.0,), jitter="proportional")
    delays = [retry_delay(k, p, random.Random(k)) for k in range(1, 1_000)]
    assert 7 <= min(delays) < 7.1
    assert 8.9 < max(delays) <= 9


def test_retry_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="number 1"):
        retry_delay(0, policy(), random.Random(0))


# The decision -----------------------------------------------------------------------------------------------------


def after(error: BaseException, p: RetryPolicy | None = None, **given: Any) -> Retry | Stop:
    values = {"now": NOW, "rng": random.Random(0), "retries_used": 0, **given}
    return decide(error, classify(error), p or policy(), **values)


def stopped(decision: Retry | Stop) -> str:
    assert isinstance(decision, Stop), decision
    assert decision.note
    return decision.why


def delay_of(decision: Retry | Stop) -> float:
    assert isinstance(decision, Retry), decision
    assert decision.retry_at == NOW + decision.delay_s
    return decision.delay_s


@pytest.mark.parametrize("error", [ConnectionError(), TimeoutError(), RetryableError("x"), RuntimeError("unknown")])
def test_transient_and_timeout_are_retried(error: Exception) -> None:
    assert delay_of(after(error)) == 1


def test_case_5_permanent_and_cascade_are_not() -> None:
    assert stopped(after(ValueError())) == "permanent"
    assert stopped(after(CircuitOpenError("x"))) == "refused"


def test_case_1_retries_run_out() -> None:
    assert delay_of(after(OSError(), policy(max_retries=2), retries_used=1)) == 1
    assert stopped(after(OSError(), policy(max_retries=2), retries_used=2)) == "exhausted"
    assert stopped(after(OSError(), policy(max_retries=0))) == "exhausted"
    assert delay_of(after(OSError(), policy(max_retries=None), retries_used=1_000_000)) == 1


def test_retry_on_replaces_the_taxonomy() -> None:
    assert delay_of(after(ValueError(), retry_on=(ValueError,))) == 1
    assert stopped(after(ConnectionError(), retry_on=(ValueError,))) == "no retry"
    assert stopped(after(TimeoutError(), retry_on=(ValueError,))) == "no retry"
    assert stopped(after(RuntimeError(), retry_on=(ValueError,))) == "no retry"
    assert delay_of(after(RetryableError("x"), retry_on=(ValueError,))) == 1
    assert delay_of(after(KeyError("k"), retry_on=lambda error: "k" in str(error))) == 1
    assert stopped(after(KeyError("other"), retry_on=lambda error: "k" in str(error))) == "no retry"


def test_case_5_no_retry_on_wins_over_everything() -> None:
    assert stopped(after(ConnectionError(), no_retry_on=(OSError,))) == "no retry"
    assert stopped(after(ConnectionError(), retry_on=(ConnectionError,), no_retry_on=(OSError,))) == "no retry"
    assert stopped(after(RetryableError("x"), no_retry_on=(RetryableError,))) == "no retry"
    assert stopped(after(ConnectionError("x"), no_retry_on=lambda error: str(error) == "x")) == "no retry"


def test_case_5_fatal_is_never_retried_even_if_retry_on_names_it() -> None:
    assert stopped(after(FatalError("x"), retry_on=(FatalError,))) == "permanent"
    assert stopped(after(ExceptionGroup("g", [FatalError("x")]), retry_on=lambda error: True)) == "permanent"


def test_case_7_a_group_and_the_filters() -> None:
    group = ExceptionGroup("g", [ConnectionError(), TimeoutError()])
    assert delay_of(after(group)) == 1
    assert delay_of(after(group, retry_on=(ConnectionError, TimeoutError))) == 1
    assert stopped(after(group, retry_on=(ConnectionError,))) == "no retry"
    assert stopped(after(group, no_retry_on=(TimeoutError,))) == "no retry"


def test_a_predicate_that_raises_ends_the_retrying_and_is_named() -> None:
    decision = after(ConnectionError(), retry_on=lambda error: error.status > 4)  # type: ignore[attr-defined]
    assert stopped(decision) == "code"
    assert isinstance(decision, Stop)
    assert "AttributeError" in decision.note


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        (30, 30.0),
        (0.25, 0.25),
        (0, 0.0),
        ("30s", 30.0),
        ("500ms", 0.5),
        (dt.timedelta(minutes=2), 120.0),
        (dt.datetime.fromtimestamp(NOW + 45, dt.UTC), 45.0),
        (dt.datetime.fromtimestamp(NOW - 45, dt.UTC), 0.0),
        (dt.datetime.fromtimestamp(NOW + 45, dt.timezone(dt.timedelta(hours=5))), 45.0),
        ("2h", 7200.0),
    ],
)
def test_case_3_retry_after_of_the_step_is_exact_and_may_exceed_the_cap(retry_after: Any, seconds: float) -> None:
    decision = after(RetryableError("x", retry_after=retry_after), policy(retry_backoff=2, max_retry_delay_s=10))
    assert delay_of(decision) == seconds
    assert isinstance(decision, Retry)
    assert decision.reason == "retry_after"


def _answer(status: int, retry_after: str) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://x")
    response = httpx.Response(status, headers={"Retry-After": retry_after}, request=request)
    return httpx.HTTPStatusError("x", request=request, response=response)


def test_case_3_retry_after_of_a_server_is_a_floor_under_a_spread() -> None:
    p = policy(retry_backoff=2, max_retry_delay_s=10)
    delays = [delay_of(after(_answer(503, "80"), p, rng=random.Random(seed))) for seed in range(1_000)]
    assert 80 <= min(delays) < 80.2
    assert 89.8 < max(delays) <= 90
    assert max(Counter(delays).values()) == 1
    decision = after(_answer(429, "80"))
    assert isinstance(decision, Retry)
    assert decision.reason == "server retry_after"


def test_case_1_a_callable_decides_the_delay_of_each_error() -> None:
    def chosen(attempt: int, error: BaseException) -> object:
        return {"TimeoutError": "2m", "ConnectionError": attempt * 10}.get(type(error).__name__, dt.timedelta(0))

    p = policy(delay_by_code=True, max_retries=9)
    given: dict[str, Any] = {"delay_of": chosen}
    assert delay_of(after(TimeoutError(), p, **given)) == 120
    assert delay_of(after(ConnectionError(), p, retries_used=2, **given)) == 30
    assert delay_of(after(RuntimeError(), p, **given)) == 0
    capped = policy(delay_by_code=True, max_retry_delay_s=10)
    assert delay_of(after(TimeoutError(), capped, **given)) == 10
    asked = after(RetryableError("x", retry_after="1h"), p, **given)
    assert delay_of(asked) == 3600, "the error's own wish comes first"


@pytest.mark.parametrize("gives", ["soon", -1, None, float("nan"), lambda: 1])
def test_a_callable_that_gives_no_delay_ends_the_retrying_and_is_named(gives: Any) -> None:
    decision = after(ConnectionError(), policy(delay_by_code=True), delay_of=lambda attempt, error: gives)
    assert stopped(decision) == "code"
    assert isinstance(decision, Stop)
    assert "retry_delay" in decision.note


def test_a_callable_that_raises_ends_the_retrying_and_is_named() -> None:
    decision = after(ConnectionError(), policy(delay_by_code=True), delay_of=lambda attempt, error: 1 / 0)
    assert stopped(decision) == "code"
    assert isinstance(decision, Stop)
    assert "ZeroDivisionError" in decision.note


def test_a_servers_zero_leaves_the_delay_to_the_policy() -> None:
    assert delay_of(after(_answer(503, "0"))) == 1


def test_case_4_a_wait_that_cannot_end_before_the_deadline_is_not_begun() -> None:
    assert delay_of(after(OSError(), policy(retry_delay_s=5), deadline=NOW + 5.1)) == 5
    assert stopped(after(OSError(), policy(retry_delay_s=5), deadline=NOW + 5)) == "deadline"
    assert stopped(after(RetryableError("x", retry_after="1h"), deadline=NOW + 60)) == "deadline"


def test_an_unknown_outcome_of_a_step_that_is_not_idempotent_is_not_repeated() -> None:
    error = StepTimeoutError("x")
    assert delay_of(after(error, outcome_unknown=True)) == 1
    assert stopped(after(error, policy(idempotent=False), outcome_unknown=True)) == "lost"
    given: dict[str, Any] = {"outcome_unknown": True, "retry_on": (StepTimeoutError,)}
    assert stopped(after(error, policy(idempotent=False), **given)) == "lost"
    assert delay_of(after(ConnectionError(), policy(idempotent=False))) == 1, "a known failure may be retried"


def test_a_refusal_of_the_steps_breaker_ends_the_retrying_even_if_retry_on_names_it() -> None:
    assert stopped(after(CircuitOpenError("x"), retry_on=(CircuitOpenError,), refused=True)) == "refused"
    assert delay_of(after(CircuitOpenError("x"), retry_on=(CircuitOpenError,))) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "fixed"),
        ({"retry_backoff": 2}, "backoff+jitter"),
        ({"retry_backoff": 2, "jitter": "none"}, "backoff"),
        ({"jitter": "full"}, "fixed+jitter"),
        ({"jitter": "decorrelated"}, "decorrelated"),
        ({"delays_s": (1.0, 2.0)}, "listed"),
        ({"delays_s": (1.0, 2.0), "jitter": "full"}, "listed+jitter"),
        ({"delay_by_code": True}, "chosen"),
    ],
)
def test_case_9_the_reason_of_a_delay_is_told(values: dict[str, Any], words: str) -> None:
    decision = after(OSError(), policy(**values))
    assert isinstance(decision, Retry)
    assert decision.reason == words


def test_case_12_what_is_overdue_after_a_restart_comes_back_with_jitter_and_a_bounded_number_at_once() -> None:
    offsets = spread(320, random.Random(1))
    assert 4.5 < max(offsets) <= 5.0
    for start in range(10):
        assert sum(start * 0.5 <= offset < (start + 1) * 0.5 for offset in offsets) == 32
    assert max(Counter(offsets).values()) == 1
    assert all(offset <= 0.5 for offset in spread(3, random.Random(1))), "few begin at once"
