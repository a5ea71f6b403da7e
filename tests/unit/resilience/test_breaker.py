"""The breaker's table: every (state, event) pair, generations, permits, leases. Times are numbers."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import pytest

from pyworkflow_ray.errors import CircuitOpenError, FatalError, RetryBudgetExhausted
from pyworkflow_ray.resilience.breaker import (
    PERMIT_LEASE_S,
    TABLE,
    Breaker,
    BreakerEvent,
    BreakerSettings,
    BreakerState,
    Guard,
    IllegalBreakerEvent,
    View,
    error_text,
    event_of,
)
from pyworkflow_ray.resilience.breaker_settings import CODE

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
FORCED_OPEN, FORCED_CLOSED = BreakerState.FORCED_OPEN, BreakerState.FORCED_CLOSED
E = BreakerEvent
ENDS = (E.SUCCESS, E.FAILURE, E.ANSWERED, E.RELEASE)


def breaker_in(state: BreakerState, *, threshold: int = 3, recovery_timeout: float = 60.0) -> Breaker:
    """A breaker brought to `state` by time 0 (open since 0, its probe let through at 0)."""
    breaker = Breaker(BreakerSettings(threshold, recovery_timeout))
    if state is CLOSED:
        return breaker
    if state in (FORCED_OPEN, FORCED_CLOSED):
        breaker.force(E.FORCE_OPEN if state is FORCED_OPEN else E.FORCE_CLOSED, 0.0)
        return breaker
    opened_at = 0.0 if state is OPEN else -recovery_timeout
    for _ in range(threshold):
        breaker.ended(E.FAILURE, opened_at, generation=0)
    if state is HALF_OPEN:
        breaker.ask(0.0)
    assert breaker.state is state
    return breaker


def permit_of(breaker: Breaker) -> int | None:
    """The one that is out."""
    return next(iter(breaker.permits), None)


def everything(breaker: Breaker) -> dict[str, Any]:
    """All that it remembers, copied."""
    return copy.deepcopy({**vars(breaker), "window": breaker.window.rates()})


# What each pair does: (state, event) -> state after it, written out by hand; a pair that is missing is illegal.
EXPECTED = {
    (CLOSED, E.ASK): CLOSED,
    (CLOSED, E.SUCCESS): CLOSED,
    (CLOSED, E.FAILURE): CLOSED,
    (CLOSED, E.ANSWERED): CLOSED,
    (CLOSED, E.RELEASE): CLOSED,
    (OPEN, E.ASK): OPEN,
    (HALF_OPEN, E.ASK): HALF_OPEN,
    (HALF_OPEN, E.SUCCESS): CLOSED,
    (HALF_OPEN, E.ANSWERED): CLOSED,
    (HALF_OPEN, E.FAILURE): OPEN,
    (HALF_OPEN, E.RELEASE): HALF_OPEN,
    (HALF_OPEN, E.EXPIRE): OPEN,
    (FORCED_OPEN, E.ASK): FORCED_OPEN,
    (FORCED_CLOSED, E.ASK): FORCED_CLOSED,
    (FORCED_CLOSED, E.SUCCESS): FORCED_CLOSED,
    (FORCED_CLOSED, E.FAILURE): FORCED_CLOSED,
    (FORCED_CLOSED, E.ANSWERED): FORCED_CLOSED,
    (FORCED_CLOSED, E.RELEASE): FORCED_CLOSED,
    **{(state, E.FORCE_OPEN): FORCED_OPEN for state in BreakerState},
    **{(state, E.FORCE_CLOSED): FORCED_CLOSED for state in BreakerState},
    **{(state, E.RESET): CLOSED for state in BreakerState},
}


@pytest.mark.parametrize("event", BreakerEvent, ids=str)
@pytest.mark.parametrize("state", BreakerState, ids=str)
def test_every_event_in_every_state(state: BreakerState, event: BreakerEvent) -> None:
    breaker = breaker_in(state)
    before = everything(breaker)
    if (state, event) in EXPECTED:
        breaker._apply(event, 1.0)
        assert breaker.state is EXPECTED[state, event]
    else:
        with pytest.raises(IllegalBreakerEvent):
            breaker._apply(event, 1.0)
        assert everything(breaker) == before


def test_the_table_has_no_pair_that_this_file_does_not_expect() -> None:
    assert TABLE.keys() == EXPECTED.keys()


def test_the_last_rule_of_a_pair_always_applies() -> None:
    assert all(rules[-1].guard is Guard.ALWAYS for rules in TABLE.values())


@pytest.mark.parametrize("event", ENDS, ids=str)
def test_no_call_of_this_generation_can_end_while_open(event: BreakerEvent) -> None:
    breaker = breaker_in(OPEN)
    before = everything(breaker)
    with pytest.raises(IllegalBreakerEvent, match=event.value):
        breaker.ended(event, 1.0, generation=breaker.generation)
    assert everything(breaker) == before


@pytest.mark.parametrize("event", ENDS, ids=str)
@pytest.mark.parametrize("state", BreakerState, ids=str)
def test_a_call_of_a_generation_to_come_is_illegal_and_changes_nothing(
    state: BreakerState, event: BreakerEvent
) -> None:
    breaker = breaker_in(state)
    before = everything(breaker)
    with pytest.raises(IllegalBreakerEvent, match="generation 99"):
        breaker.ended(event, 1.0, generation=99)
    assert everything(breaker) == before


@pytest.mark.parametrize("event", ENDS, ids=str)
@pytest.mark.parametrize("permit", [None, 12345])
def test_only_the_holder_of_the_permit_ends_the_probe(event: BreakerEvent, permit: int | None) -> None:
    breaker = breaker_in(HALF_OPEN)
    before = everything(breaker)
    with pytest.raises(IllegalBreakerEvent, match="permit"):
        breaker.ended(event, 1.0, generation=breaker.generation, permit=permit)
    assert everything(breaker) == before


@pytest.mark.parametrize("event", [E.ASK, E.EXPIRE], ids=str)
def test_a_call_ends_with_the_end_of_a_call(event: BreakerEvent) -> None:
    breaker = breaker_in(HALF_OPEN)
    before = everything(breaker)
    with pytest.raises(IllegalBreakerEvent):
        breaker.ended(event, 1.0, generation=breaker.generation, permit=permit_of(breaker))
    assert everything(breaker) == before


# Counting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [1, 2, 5])
def test_opens_at_the_threshold_and_not_before(threshold: int) -> None:
    breaker = Breaker(BreakerSettings(threshold, 60.0))
    for _ in range(threshold - 1):
        breaker.ended(E.FAILURE, 0.0, generation=0)
        assert breaker.state is CLOSED
    breaker.ended(E.FAILURE, 0.0, generation=0, error="ConnectionError: 503")
    assert breaker.state is OPEN
    assert not breaker.ask(59.9).admitted
    assert "ConnectionError: 503" in breaker.view(0.0).reason


def test_a_success_between_failures_keeps_it_closed() -> None:
    breaker = Breaker(BreakerSettings(3, 60.0))
    for end in (E.FAILURE, E.FAILURE, E.SUCCESS, E.FAILURE, E.FAILURE):
        breaker.ended(end, 0.0, generation=0)
    assert breaker.state is CLOSED
    assert breaker.failures == 2


@pytest.mark.parametrize("event", [E.ANSWERED, E.RELEASE], ids=str)
def test_case_4_permanent_errors_and_cancelled_calls_neither_count_nor_clear(event: BreakerEvent) -> None:
    breaker = Breaker(BreakerSettings(3, 60.0))
    for end in (E.FAILURE, event, E.FAILURE):
        breaker.ended(end, 0.0, generation=0)
    assert breaker.failures == 2
    breaker.ended(E.FAILURE, 0.0, generation=0)
    assert breaker.state is OPEN


def test_case_7_a_late_result_neither_closes_nor_trips_again() -> None:
    breaker = breaker_in(HALF_OPEN)
    before = everything(breaker)
    for end in ENDS:
        assert breaker.ended(end, 1.0, generation=0) is False
    assert everything(breaker) == before
    breaker.ended(E.SUCCESS, 2.0, generation=breaker.generation, permit=permit_of(breaker))
    assert breaker.state is CLOSED
    for generation in range(breaker.generation):
        for _ in range(10):
            assert breaker.ended(E.FAILURE, 3.0, generation=generation) is False
    assert (breaker.state, breaker.failures) == (CLOSED, 0)


def test_every_change_of_state_begins_a_generation_and_nothing_else_does() -> None:
    breaker = Breaker(BreakerSettings(2, 10.0))
    rng = random.Random(7)
    now = 0.0
    for _ in range(2000):
        now += rng.random() * 3
        breaker.settle(now)
        state, generation = breaker.state, breaker.generation
        answer = breaker.ask(now)
        if answer.admitted and rng.random() < 0.9:
            assert answer.generation is not None
            breaker.ended(rng.choice(ENDS), now, generation=answer.generation, permit=answer.permit)
        changes = breaker.generation - generation
        assert changes in (0, 1, 2)
        assert (changes == 0) <= (breaker.state is state)


# Half-open ----------------------------------------------------------------------------------------------------------


def test_the_first_caller_after_the_recovery_timeout_probes_and_the_rest_are_refused() -> None:
    breaker = breaker_in(OPEN)
    assert breaker.retry_after(20.0) == 40.0
    assert not breaker.ask(59.999).admitted
    probe = breaker.ask(60.0)
    assert probe.admitted
    assert probe.permit is not None
    assert breaker.state is HALF_OPEN
    assert [breaker.ask(60.1).admitted for _ in range(3)] == [False] * 3
    assert breaker.retry_after(60.1) == 0


def test_looking_is_not_asking() -> None:
    breaker = breaker_in(OPEN)
    assert breaker.view(100.0).state is OPEN
    assert breaker.view(100.0).open_for_s == 0
    assert breaker.ask(100.0).permit is not None


def test_a_failed_probe_opens_it_for_the_whole_recovery_timeout() -> None:
    breaker = breaker_in(HALF_OPEN)
    breaker.ended(E.FAILURE, 5.0, generation=breaker.generation, permit=permit_of(breaker), error="TimeoutError")
    assert breaker.state is OPEN
    assert breaker.retry_after(5.0) == 60.0
    assert breaker.view(5.0).reason == "the call that probed failed: TimeoutError"


def test_case_4_a_permanent_error_ends_the_probe_as_a_success() -> None:
    breaker = breaker_in(HALF_OPEN)
    breaker.ended(E.ANSWERED, 1.0, generation=breaker.generation, permit=permit_of(breaker))
    assert (breaker.state, breaker.failures) == (CLOSED, 0)


def test_case_5_a_cancelled_probe_gives_its_permit_back() -> None:
    breaker = breaker_in(HALF_OPEN)
    first = permit_of(breaker)
    breaker.ended(E.RELEASE, 1.0, generation=breaker.generation, permit=first)
    assert breaker.state is HALF_OPEN
    again = breaker.ask(1.0)
    assert again.admitted
    assert again.permit not in (None, first)


def test_case_6_a_lease_that_is_not_renewed_counts_as_a_failure_from_its_end_on() -> None:
    breaker = breaker_in(HALF_OPEN)
    permit, generation = permit_of(breaker), breaker.generation
    assert breaker.view(PERMIT_LEASE_S - 0.001).state is HALF_OPEN
    assert breaker.view(PERMIT_LEASE_S + 7).state is OPEN
    assert breaker.retry_after(PERMIT_LEASE_S + 7) == 60.0 - 7
    assert "lost" in breaker.view(PERMIT_LEASE_S + 7).reason
    assert breaker.ended(E.SUCCESS, PERMIT_LEASE_S + 8, generation=generation, permit=permit) is False
    assert breaker.state is OPEN


def test_case_6_a_hanging_probe_that_renews_keeps_its_one_permit() -> None:
    breaker = breaker_in(HALF_OPEN)
    permit = permit_of(breaker)
    assert permit is not None
    for n in range(1, 100):
        assert breaker.renew(permit, n * PERMIT_LEASE_S / 3)
        assert not breaker.ask(n * PERMIT_LEASE_S / 3).admitted
    assert breaker.state is HALF_OPEN
    assert not breaker.renew(permit + 1, 100 * PERMIT_LEASE_S / 3)


def test_without_a_lease_a_permit_lasts() -> None:
    breaker = Breaker(BreakerSettings(1, 0.0), lease_s=None)
    breaker.ended(E.FAILURE, 0.0, generation=0)
    assert breaker.ask(0.0).permit is not None
    assert breaker.view(1e9).state is HALF_OPEN


# Over processes and restarts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("told", "kept"), [(-5.0, 0.0), (12.0, 12.0), (1e9, 60.0)])
def test_case_11_the_rest_of_the_open_time_is_clamped_when_taken_over(told: float, kept: float) -> None:
    breaker = Breaker(BreakerSettings(5, 60.0))
    breaker.adopt(View(version=9, generation=3, state=OPEN, failures=5, open_for_s=told), 1000.0)
    assert breaker.retry_after(1000.0) == kept


def test_a_state_that_is_taken_over_is_the_same_state() -> None:
    for state in BreakerState:
        view = breaker_in(state).view(2.0)
        other = Breaker(BreakerSettings(3, 60.0))
        other.adopt(view, 5000.0)
        assert other.view(5000.0) == view


def test_settings_travel_as_options_and_name_what_differs() -> None:
    settings = BreakerSettings(7, 2.5)
    assert settings.as_options() == {"failure_threshold": 7, "recovery_timeout": 2.5}
    assert BreakerSettings.from_options(settings.as_options()) == settings
    assert settings.conflict(BreakerSettings(7, 2.5)) is None
    assert settings.conflict(BreakerSettings(7, 3.0)) == ("recovery_timeout", 2.5, 3.0)
    every = BreakerSettings(7, 2.5, 0.5, 1.5, 0.25, 20, 30.0, 2, 3, 4, 60.0, 2.0, 10.0, "builtins:OSError")
    assert len(every.as_options()) == len(dataclasses.fields(settings)) - len(CODE)
    from_code = dataclasses.replace(every, code="a", since=1.0)
    assert from_code.as_options() == every.as_options()
    assert BreakerSettings.from_options(from_code.as_declared()).code == "a"
    assert BreakerSettings.from_options(every.as_options()) == every
    assert BreakerSettings(window=30).as_options()["window"] == 30


# What an error is for a breaker -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "error", "event"),
    [
        ("transient", ConnectionError("503"), E.FAILURE),
        ("timeout", TimeoutError(), E.FAILURE),
        ("cascade", RuntimeError("a user's cascade"), E.FAILURE),
        ("permanent", ValueError(), E.ANSWERED),
        ("permanent", FatalError(), E.ANSWERED),
        ("cascade", CircuitOpenError(name="other"), E.RELEASE),
        ("cascade", RetryBudgetExhausted(), E.RELEASE),
        ("transient", KeyboardInterrupt(), E.RELEASE),
        ("transient", GeneratorExit(), E.RELEASE),
    ],
)
def test_case_10_what_counts(kind: str, error: BaseException, event: BreakerEvent) -> None:
    assert event_of(kind, error) is event


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def test_an_error_is_one_short_line_whatever_it_says() -> None:
    assert error_text(ConnectionError("a\nb   c")) == "ConnectionError: a b c"
    assert error_text(ConnectionError()) == "ConnectionError"
    assert len(error_text(ConnectionError("x" * 1000))) == 200
    assert error_text(Unprintable()).startswith("Unprintable: (")


def test_the_state_is_its_text() -> None:
    assert BreakerState.HALF_OPEN == "half_open"
    assert f"{BreakerState.OPEN}" == "open"
