"""Rates, slow calls, windows, several permits, growing open times, forces, ramp, waiters. Times are numbers."""

from __future__ import annotations

import itertools
import random
from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pyworkflow_ray.errors import CircuitOpenError, RetryBudgetExhausted
from pyworkflow_ray.resilience.breaker import Breaker, BreakerEvent, BreakerState, IllegalBreakerEvent, event_of
from pyworkflow_ray.resilience.breaker_settings import BreakerSettings, full_name, options_for, split_name
from pyworkflow_ray.resilience.breaker_window import Window
from pyworkflow_ray.resilience.mirror import Asker
from pyworkflow_ray.resilience.waiters import PER_S, Waiters

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
E = BreakerEvent


def new(**settings: Any) -> Breaker:
    return Breaker(BreakerSettings(**settings))


def ends(breaker: Breaker, events: str, now: float = 0.0, **about: Any) -> None:
    """Calls that begin and end now: f(ailure), s(uccess), S(low success), F (slow failure), a(nswered)."""
    for letter in events:
        event = {"f": E.FAILURE, "s": E.SUCCESS, "a": E.ANSWERED}[letter.lower()]
        breaker.ended(event, now, generation=breaker.generation, slow=letter.isupper(), **about)


def opened(**settings: Any) -> Breaker:
    breaker = new(failure_threshold=1, **settings)
    ends(breaker, "f")
    assert breaker.state is OPEN
    return breaker


# Rates ----------------------------------------------------------------------------------------------------------------


def test_case_1_rate_mode_trips_only_with_minimum_calls_at_or_above_the_rate() -> None:
    breaker = new(failure_rate=0.5, minimum_calls=10)
    ends(breaker, "fffffffff")
    assert breaker.state is CLOSED  # nine calls say nothing yet
    ends(breaker, "s")  # judged at every counted outcome: this success fills the window
    assert breaker.state is OPEN
    assert breaker.reason == "9 of the last 10 calls failed (90%, limit 50%)"
    below = new(failure_rate=0.5, minimum_calls=4, window=100)
    ends(below, "sfsf")
    assert below.state is OPEN  # exactly at the rate
    below = new(failure_rate=0.51, minimum_calls=4, window=100)
    ends(below, "sfsf")
    assert below.state is CLOSED


def test_case_1_consecutive_failures_do_not_trip_in_rate_mode() -> None:
    breaker = new(failure_rate=0.9, minimum_calls=100, failure_threshold=5)
    ends(breaker, "f" * 20)
    assert breaker.state is CLOSED


def test_a_window_of_calls_forgets_the_oldest() -> None:
    breaker = new(failure_rate=0.5, minimum_calls=4, window=4)
    ends(breaker, "sssf" + "sss" + "f" + "ss")
    assert breaker.state is CLOSED
    ends(breaker, "f")
    assert breaker.state is OPEN  # f s s f: two of four


def test_a_window_of_time_forgets_what_is_as_old_as_it() -> None:
    breaker = new(failure_rate=0.5, minimum_calls=2, window=10.0)
    ends(breaker, "f", now=0.0)
    ends(breaker, "s", now=10.0)
    assert (breaker.state, breaker.window.calls) == (CLOSED, 1)
    other = new(failure_rate=0.5, minimum_calls=2, window=10.0)
    ends(other, "f", now=0.0)
    ends(other, "s", now=9.99)
    assert other.state is OPEN


@pytest.mark.parametrize("seed", range(20))
def test_successes_that_travel_as_one_are_judged_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    settings = {"failure_rate": 0.6, "minimum_calls": rng.randint(1, 9), "window": 10}
    batched, single = new(**settings), new(**settings)
    for _ in range(30):
        event, count = rng.choice([(E.FAILURE, 1), (E.SUCCESS, rng.randint(1, 12))])
        batched.ended(event, 0.0, generation=batched.generation, count=count) if batched.state is CLOSED else None
        for _ in range(count):
            if single.state is CLOSED:
                single.ended(event, 0.0, generation=single.generation)
        assert (batched.state, batched.reason) == (single.state, single.reason)


@given(
    size=st.one_of(st.integers(1, 6), st.floats(0.5, 5.0)),
    steps=st.lists(st.tuples(st.floats(0, 3), st.booleans(), st.booleans(), st.integers(1, 4)), max_size=40),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_the_window_is_what_a_list_of_all_calls_says(size: Any, steps: list[Any]) -> None:
    window, calls, now = Window(size), deque[tuple[float, bool, bool]](), 0.0
    for spent, failed, slow, count in steps:
        now += round(spent, 1)
        window.add(now, failed=failed, slow=slow, count=count)
        calls.extend([(now, failed, slow)] * count)
        kept = list(calls)[-size:] if isinstance(size, int) else [call for call in calls if now - call[0] < size]
        assert window.calls == len(kept)
        assert (window.failures, window.slow) == (sum(c[1] for c in kept), sum(c[2] for c in kept))


def test_a_window_of_time_is_bounded_whatever_the_rate() -> None:
    window = Window(60.0)
    for n in range(50_000):
        window.add(n * 0.001)
    assert window.calls == 50_000
    assert len(window._entries) < 1002


# Slow calls -----------------------------------------------------------------------------------------------------------


def test_case_3_slow_calls_count_whether_they_succeed_or_fail() -> None:
    breaker = new(slow_call_duration=1.0, slow_call_rate=0.5, minimum_calls=4)
    ends(breaker, "sSs")
    ends(breaker, "A")  # slow, and the service answered
    assert breaker.state is OPEN
    assert "2 of the last 4 calls were slow" in breaker.reason
    failing = new(slow_call_duration=1.0, slow_call_rate=0.5, minimum_calls=4, failure_threshold=99)
    ends(failing, "sFsF")
    assert failing.state is OPEN


def test_a_slow_call_is_a_failure_where_no_rate_is_given() -> None:
    breaker = new(slow_call_duration=1.0, failure_threshold=3)
    ends(breaker, "SAS")
    assert breaker.state is OPEN


def test_a_slow_probe_is_a_failed_probe() -> None:
    breaker = opened(slow_call_duration=1.0, slow_call_rate=0.5)
    permit = breaker.ask(60.0).permit
    breaker.ended(E.SUCCESS, 65.0, generation=breaker.generation, permit=permit, slow=True, error="a slow call (5s)")
    assert breaker.state is OPEN
    assert breaker.reason == "the call that probed failed: a slow call (5s)"


# Half-open ------------------------------------------------------------------------------------------------------------


def test_case_6_at_most_half_open_max_calls_permits_are_out_and_the_rest_are_refused() -> None:
    breaker = opened(half_open_max_calls=3, success_threshold=5)
    answers = [breaker.ask(60.0) for _ in range(10)]
    assert [answer.admitted for answer in answers] == [True] * 3 + [False] * 7
    assert len({answer.permit for answer in answers[:3]}) == 3
    breaker.ended(E.RELEASE, 61.0, generation=breaker.generation, permit=answers[0].permit)
    assert [breaker.ask(61.0).admitted for _ in range(2)] == [True, False]


def test_it_closes_after_success_threshold_probes() -> None:
    breaker = opened(success_threshold=3)
    for n in range(3):
        assert breaker.state is (HALF_OPEN if n else OPEN)
        permit = breaker.ask(60.0 + n).permit
        breaker.ended(E.SUCCESS if n else E.ANSWERED, 60.0 + n, generation=breaker.generation, permit=permit)
    assert breaker.state is CLOSED


def test_one_of_several_leases_that_ends_opens_it() -> None:
    breaker = opened(half_open_max_calls=2, success_threshold=2)
    first, second = breaker.ask(60.0), breaker.ask(60.0)
    assert first.permit is not None
    assert breaker.renew(first.permit, 65.0)
    assert breaker.view(70.1).state is OPEN
    assert breaker.retry_after(70.0) == 60.0
    assert breaker.ended(E.SUCCESS, 71.0, generation=second.generation or 0, permit=second.permit) is False


def test_each_failed_probe_in_a_row_grows_the_open_time_up_to_the_limit_and_closing_returns_it() -> None:
    breaker = opened(recovery_timeout=10.0, recovery_backoff=2.0, max_recovery_timeout=35.0)
    now, seen = 0.0, []
    for _ in range(5):
        seen.append(breaker.retry_after(now))
        now += breaker.retry_after(now) or 0.0
        permit = breaker.ask(now).permit
        breaker.ended(E.FAILURE, now, generation=breaker.generation, permit=permit)
    assert seen == [10.0, 20.0, 35.0, 35.0, 35.0]
    now += 35.0
    permit = breaker.ask(now).permit
    breaker.ended(E.SUCCESS, now, generation=breaker.generation, permit=permit)
    ends(breaker, "f", now=now)
    assert breaker.retry_after(now) == 10.0


def test_the_open_time_is_finite_for_any_number_of_probes() -> None:
    assert BreakerSettings(recovery_timeout=10.0, recovery_backoff=1e5).open_time(10**6) == 3600.0
    assert BreakerSettings(recovery_timeout=0.0, recovery_backoff=2.0).open_time(10**9) == 0.0
    assert BreakerSettings(recovery_timeout=9.0).open_time(10**9) == 9.0


# Forces, configure ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [E.FORCE_OPEN, E.FORCE_CLOSED, E.RESET], ids=str)
def test_a_force_begins_a_generation_and_results_from_before_are_late(force: BreakerEvent) -> None:
    breaker = new(failure_threshold=2)
    ends(breaker, "f")
    generation = breaker.generation
    breaker.force(force, 1.0)
    assert breaker.generation == generation + 1
    assert breaker.ended(E.FAILURE, 1.0, generation=generation) is False
    assert breaker.failures == 0


def test_forced_states_stay_until_reset_or_the_other_force() -> None:
    breaker = new(failure_threshold=1, recovery_timeout=1.0)
    breaker.force(E.FORCE_OPEN, 0.0)
    assert not breaker.ask(1e6).admitted
    assert breaker.retry_after(1e6) is None
    breaker.force(E.FORCE_CLOSED, 1e6)
    ends(breaker, "f" * 50, now=1e6)
    assert breaker.state is BreakerState.FORCED_CLOSED
    assert breaker.ask(1e6).admitted
    breaker.force(E.RESET, 1e6)
    ends(breaker, "f", now=1e6)
    assert breaker.state is OPEN


def test_a_call_can_do_nothing_that_a_person_does_and_no_person_what_a_call_does() -> None:
    breaker = new()
    with pytest.raises(IllegalBreakerEvent):
        breaker.ended(E.FORCE_OPEN, 0.0, generation=0)
    with pytest.raises(IllegalBreakerEvent):
        breaker.force(E.FAILURE, 0.0)


def test_configure_changes_a_living_breaker() -> None:
    breaker = new(failure_threshold=5)
    ends(breaker, "ff")
    breaker.configure({"failure_threshold": 3}, 0.0)
    ends(breaker, "f")
    assert breaker.state is OPEN
    breaker.configure({"recovery_timeout": 5.0}, 1.0)
    assert breaker.retry_after(1.0) == 4.0
    assert breaker.view(1.0).configured == BreakerSettings(failure_threshold=3, recovery_timeout=5.0)


# Nodes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [None, 0.5])
def test_case_2_failures_of_too_few_nodes_do_not_open_it_for_all(rate: float | None) -> None:
    breaker = new(failure_threshold=3, min_nodes=2, failure_rate=rate, minimum_calls=3)
    ends(breaker, "fffff", node="sick")
    assert breaker.state is CLOSED
    ends(breaker, "f", node="other")
    assert breaker.state is OPEN
    assert "from 2 nodes" in breaker.reason


# Ramp -----------------------------------------------------------------------------------------------------------------


def closed_with_ramp(ramp: float) -> Breaker:
    breaker = opened(ramp=ramp)
    permit = breaker.ask(60.0).permit
    breaker.ended(E.SUCCESS, 60.0, generation=breaker.generation, permit=permit)
    assert breaker.state is CLOSED
    return breaker


def offered(breaker: Breaker, from_s: float, for_s: float, per_s: int) -> int:
    """How many of evenly offered calls are let through."""
    return sum(breaker.ask(from_s + n / per_s).admitted for n in range(int(for_s * per_s)))


def test_case_9_after_closing_the_admitted_rate_grows_from_a_trickle_to_every_call() -> None:
    breaker = closed_with_ramp(10.0)
    admitted = [offered(breaker, 60.0 + second, 1.0, 100) for second in range(12)]
    assert admitted[0] <= 10
    assert 30 <= admitted[5] <= 70
    assert all(later >= sooner - 3 for sooner, later in itertools.pairwise(admitted))
    assert admitted[10:] == [100, 100]
    assert breaker.ramp is None


def test_case_9_a_failure_halves_the_share() -> None:
    breaker = closed_with_ramp(10.0)
    breaker.settings = BreakerSettings(failure_threshold=99, ramp=10.0)
    offered(breaker, 60.0, 6.0, 100)
    before = breaker.view(66.0).ramp
    ends(breaker, "f", now=66.0)
    assert breaker.view(66.0).ramp == pytest.approx((before or 0) / 2)


def test_a_ramp_never_starves_a_quiet_breaker() -> None:
    breaker = closed_with_ramp(3600.0)
    assert sum(breaker.ask(60.0 + 2.0 * n).admitted for n in range(100)) == 100


# Who waits ------------------------------------------------------------------------------------------------------------


def told(waiters: Waiters, breaker: Breaker, who: str, waited_s: float, now: float) -> Any:
    return waiters.answered(Asker(who, waited_s, ("storage", who)), breaker.ask(now), breaker, now)


def test_case_8_waiters_come_back_in_the_order_in_which_they_have_waited() -> None:
    breaker, waiters = opened(recovery_timeout=60.0), Waiters()
    due = {}
    for n in range(100):  # the later ones have waited longer: they come from another holder's time
        told(waiters, breaker, f"w{n}", float(n), 0.0)
    for n in range(100):
        due[n] = told(waiters, breaker, f"w{n}", n + 1.0, 1.0).retry_after_s
    order = sorted(due, key=lambda n: due[n])
    assert order == sorted(due, reverse=True)
    assert due[99] == 59.0  # whoever waited longest probes as soon as it may
    assert max(due.values()) <= 59.0 + 1.0 + 100 / PER_S


def test_case_8_along_a_ramp_waiters_are_told_their_place_in_it() -> None:
    breaker, waiters = closed_with_ramp(10.0), Waiters()
    offered(breaker, 60.0, 5.0, 100)
    rate = breaker.ramp.rate if breaker.ramp else 0.0
    due = []
    for n in range(20):
        while (answer := told(waiters, breaker, f"w{n}", 100.0 - n, 65.0)).admitted:
            pass
        due.append(answer.retry_after_s)
    assert due == sorted(due)
    assert due[-1] == pytest.approx(20 / rate, rel=0.3)


@pytest.mark.parametrize("force", [E.RESET, E.FORCE_CLOSED], ids=str)
def test_case_8_who_waits_comes_at_once_and_in_order_where_a_person_closes_it(force: BreakerEvent) -> None:
    breaker, waiters = opened(recovery_timeout=3600.0), Waiters()
    for n in range(100):
        told(waiters, breaker, f"w{n}", float(n), 0.0)
    assert waiters.recalled(breaker, 1.0) == []  # nothing has changed
    breaker.force(force, 1.0)
    called = waiters.recalled(breaker, 1.0)
    assert [who for _, who, _ in called] == [f"w{n}" for n in reversed(range(100))]
    assert called[0][0] == 0.0
    assert called[-1][0] <= 100 / PER_S
    assert called[0][2] == ("storage", "w99")
    assert waiters.recalled(breaker, 1.0) == []  # each is called once


def test_case_8_who_waits_is_told_of_a_shorter_open_time() -> None:
    breaker, waiters = opened(recovery_timeout=3600.0), Waiters()
    for n in range(3):
        told(waiters, breaker, f"w{n}", 10.0 - n, 0.0)
    breaker.configure({"recovery_timeout": 7200.0}, 1.0)
    assert waiters.recalled(breaker, 1.0) == []  # later is not told
    breaker.configure({"recovery_timeout": 60.0}, 1.0)
    after = [after_s for after_s, _, _ in waiters.recalled(breaker, 1.0)]
    assert after[0] == 59.0
    assert after == sorted(after)


def test_a_waiter_that_is_let_through_or_does_not_come_is_forgotten() -> None:
    breaker, waiters = opened(recovery_timeout=10.0), Waiters()
    told(waiters, breaker, "gone", 0.0, 0.0)
    told(waiters, breaker, "comes", 0.0, 0.0)
    assert len(waiters) == 2
    assert told(waiters, breaker, "comes", 10.0, 10.0).permit is not None
    assert len(waiters) == 1
    told(waiters, breaker, "new", 0.0, 100.0)
    assert len(waiters) == 1


# Names, kinds ---------------------------------------------------------------------------------------------------------


def test_a_key_and_its_breaker_are_one_name() -> None:
    assert split_name(full_name("payments", "host[7]")) == ("payments", "host[7]")
    assert split_name("payments") == ("payments", None)
    known = {"payments": {"failure_threshold": 3}}
    assert options_for(known, "payments[host-7]") == {"failure_threshold": 3}
    assert options_for(known, None) is None


def test_case_10_counts_may_ask_for_others_refusals_and_never_for_its_own() -> None:
    def every(error: BaseException) -> bool:
        return True

    own, other = CircuitOpenError(name="a", key="k"), CircuitOpenError(name="b")
    assert event_of("cascade", other, counts=every, name="a", key="k") is E.FAILURE
    assert event_of("cascade", own, counts=every, name="a", key="k") is E.RELEASE
    assert event_of("cascade", RetryBudgetExhausted(), counts=lambda error: False) is E.RELEASE
    assert event_of("permanent", ValueError(), counts=lambda error: isinstance(error, ValueError)) is E.FAILURE
    assert event_of("transient", ConnectionError(), counts=lambda error: False) is E.ANSWERED
    assert Asker().who == ""
