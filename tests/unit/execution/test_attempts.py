"""The attempt loop on a virtual clock: when attempts start, what ends them, what they leave behind."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import pytest

from pyworkflow_ray.engine.calls import PreviousFailure
from pyworkflow_ray.errors import CircuitOpenError, FatalError, RetryableError, StepLostError, StepTimeoutError
from pyworkflow_ray.execution.attempts import (
    Admitted,
    Answer,
    AskBreaker,
    Cancelled,
    Ended,
    Failed,
    FailedAttempt,
    Plan,
    Refused,
    RunAttempt,
    Succeeded,
    TellBreaker,
    Wait,
    attempts,
)
from pyworkflow_ray.resilience.policy import RetryPolicy

Behaviour = Callable[[RunAttempt], Answer]


class Bench:
    """Drives the loop: time passes in waits, and for as long as an attempt says it takes."""

    def __init__(self, behave: Behaviour, *, takes_s: float = 0.0, **plan: Any) -> None:
        self.now = 1_000.0
        self.begun_at = self.now
        self.behave = behave
        self.takes_s = takes_s
        self.starts: list[float] = []
        self.waits: list[float] = []
        self.ran: list[RunAttempt] = []
        self.failures: list[FailedAttempt] = []
        self.breaker: list[Any] = []
        self.told: list[BaseException | None] = []
        self.cancel_in_wait = False
        self.cancelled = False
        plan.setdefault("policy", RetryPolicy(max_retries=5))
        self.plan = Plan(
            step="charge",
            clock=lambda: self.now,
            rng=random.Random(0),
            on_failed=self.failures.append,
            cancelled=lambda: self.cancelled,
            **plan,
        )

    def run(self) -> Ended:
        loop = attempts(self.plan)
        answer: Answer = None
        while True:
            try:
                command = loop.send(answer)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            answer = None
            if isinstance(command, Wait):
                self.waits.append(command.seconds)
                self.now += command.seconds
                self.cancelled = self.cancelled or self.cancel_in_wait
            elif isinstance(command, RunAttempt):
                self.starts.append(self.now - self.begun_at)
                self.ran.append(command)
                self.now += self.takes_s
                answer = self.behave(command)
            elif isinstance(command, AskBreaker):
                answer = self.breaker.pop(0)
            elif isinstance(command, TellBreaker):
                self.told.append(command.error)


def failing(error: Callable[[], BaseException] = lambda: ConnectionError("refused"), times: int = 10**9) -> Behaviour:
    return lambda command: Failed(error()) if command.attempt <= times else Succeeded(f"value {command.attempt}")


# Timelines --------------------------------------------------------------------------------------------------------


def test_case_1_fixed_delays_start_attempts_at_0_5_10_15() -> None:
    bench = Bench(failing(), policy=RetryPolicy(max_retries=3, retry_delay_s=5))
    ended = bench.run()
    assert bench.starts == [0, 5, 10, 15]
    assert (ended.status, ended.why, ended.attempt) == ("failed", "exhausted", 4)
    assert bench.waits == [5, 5, 5], "no wait after the last attempt"


def test_case_1_exponential_delays_start_attempts_at_0_1_3_7_15_31() -> None:
    policy = RetryPolicy(max_retries=5, retry_delay_s=1, retry_backoff=2, max_retry_delay_s=60, jitter="none")
    bench = Bench(failing(), policy=policy)
    bench.run()
    assert bench.starts == [0, 1, 3, 7, 15, 31]


def test_case_1_exponential_delays_reach_the_cap() -> None:
    policy = RetryPolicy(max_retries=8, retry_delay_s=1, retry_backoff=2, max_retry_delay_s=60, jitter="none")
    bench = Bench(failing(), policy=policy)
    bench.run()
    assert bench.waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_delays_count_from_the_end_of_the_attempt() -> None:
    bench = Bench(failing(), takes_s=2, policy=RetryPolicy(max_retries=2, retry_delay_s=5))
    bench.run()
    assert bench.starts == [0, 7, 14]


def test_jittered_timelines_stay_in_their_bounds() -> None:
    policy = RetryPolicy(max_retries=5, retry_delay_s=1, retry_backoff=2, max_retry_delay_s=8)
    for seed in range(300):
        bench = Bench(failing(), policy=policy)
        bench.plan.rng = random.Random(seed)
        bench.run()
        for wait, d in zip(bench.waits, [1, 2, 4, 8, 8], strict=True):
            assert 0.875 * d <= wait <= min(1.125 * d, 8), f"seed {seed}: {bench.waits}"


def test_case_2_decorrelated_jitter_goes_on_from_the_last_delay_of_an_earlier_dispatch() -> None:
    earlier = [PreviousFailure(1, "transient", "ConnectionError", "x", 20.0)]
    policy = RetryPolicy(max_retries=5, retry_delay_s=1, jitter="decorrelated")
    longest = 0.0
    for seed in range(200):
        bench = Bench(failing(times=2), policy=policy, first_attempt=2, retries_used=1, previous=earlier)
        bench.plan.rng = random.Random(seed)
        bench.run()
        longest = max(longest, bench.waits[0])
    assert 50 < longest <= 60


def test_a_zero_delay_does_not_wait() -> None:
    bench = Bench(failing(times=2), policy=RetryPolicy(max_retries=5, retry_delay_s=0))
    assert bench.run().value == "value 3"
    assert bench.waits == []


# What ends it -----------------------------------------------------------------------------------------------------


def test_success_gives_the_value_itself() -> None:
    value = object()
    ended = Bench(lambda command: Succeeded(value)).run()
    assert (ended.status, ended.attempt) == ("completed", 1)
    assert ended.value is value


@pytest.mark.parametrize("error", [ValueError("bad"), FatalError("stop"), KeyError("k")])
def test_case_5_a_permanent_error_is_tried_once(error: Exception) -> None:
    bench = Bench(failing(lambda: error))
    ended = bench.run()
    assert bench.starts == [0]
    assert (ended.why, ended.kind) == ("permanent", "permanent")
    assert ended.error is error


def test_retryable_error_decides_its_delay() -> None:
    bench = Bench(failing(lambda: RetryableError("later", retry_after="30s"), times=1))
    bench.run()
    assert bench.starts == [0, 30]
    assert bench.failures[0].delay_reason == "retry_after"


def test_case_5_no_retry_on_wins_over_retry_on() -> None:
    bench = Bench(failing(), retry_on=(OSError,), no_retry_on=(ConnectionError,))
    assert bench.run().why == "no retry"
    assert bench.starts == [0]


def test_case_6_cancellation_is_never_retried_and_leaves_no_record() -> None:
    bench = Bench(lambda command: Cancelled())
    assert bench.run().status == "cancelled"
    assert bench.failures == []
    assert len(bench.ran) == 1


def test_case_6_cancellation_ends_a_wait_and_no_attempt_follows() -> None:
    bench = Bench(failing())
    bench.cancel_in_wait = True
    ended = bench.run()
    assert (ended.status, ended.attempt) == ("cancelled", 1)
    assert len(bench.ran) == 1


def test_a_step_cancelled_before_it_began_does_not_begin() -> None:
    bench = Bench(failing())
    bench.cancelled = True
    assert bench.run().status == "cancelled"
    assert bench.ran == []


def test_a_value_that_cannot_be_stored_fails_the_step_and_is_not_computed_again() -> None:
    def refuse(value: object) -> object:
        raise ConnectionError("even a transient error")

    bench = Bench(lambda command: Succeeded(1), accept=refuse)
    ended = bench.run()
    assert (ended.status, ended.why) == ("failed", "permanent")
    assert len(bench.ran) == 1


def test_an_unknown_outcome_of_a_step_that_is_not_idempotent_is_a_lost_step() -> None:
    timeout = StepTimeoutError("too long")
    bench = Bench(
        lambda command: Failed(timeout, outcome_unknown=True), policy=RetryPolicy(max_retries=5, idempotent=False)
    )
    ended = bench.run()
    assert len(bench.ran) == 1
    assert ended.why == "lost"
    assert isinstance(ended.error, StepLostError)
    assert ended.error.__cause__ is timeout
    assert bench.failures[0].kind == "timeout"


def test_case_4_a_wait_that_cannot_end_before_the_deadline_is_not_begun() -> None:
    bench = Bench(failing(), policy=RetryPolicy(max_retries=5, retry_delay_s=5), deadline=1_011.0)
    ended = bench.run()
    assert bench.starts == [0, 5, 10]
    assert ended.why == "deadline"
    assert isinstance(ended.error, ConnectionError)
    assert "deadline" in ended.error.__notes__[-1]


# The total timeout ------------------------------------------------------------------------------------------------


def test_case_4_the_total_timeout_ends_at_once_when_the_next_wait_cannot_end_before_it() -> None:
    policy = RetryPolicy(max_retries=None, retry_delay_s=1, retry_backoff=2, jitter="none", total_timeout_s=10)
    bench = Bench(failing(), policy=policy)
    ended = bench.run()
    assert bench.starts == [0, 1, 3, 7]
    assert bench.now - bench.begun_at == 7, "the wait of 8 s is not begun"
    assert (ended.why, ended.attempt) == ("deadline", 4)
    assert isinstance(ended.error, ConnectionError)
    assert "deadline" in ended.error.__notes__[-1]


def test_an_attempt_may_run_for_what_is_left_of_the_total_timeout_or_its_own_whichever_is_less() -> None:
    policy = RetryPolicy(max_retries=9, retry_delay_s=3, timeout_s=4, total_timeout_s=10)
    bench = Bench(failing(times=2), policy=policy)
    assert bench.run().value == "value 3"
    limits = [(command.timeout_s, command.last_chance) for command in bench.ran]
    assert [last for _, last in limits] == [False, False, False]
    assert [limit for limit, _ in limits] == [4, 4, 4]
    bench = Bench(failing(times=2), policy=policy.model_copy(update={"retry_delay_s": 4.0}))
    bench.run()
    assert [(command.timeout_s, command.last_chance) for command in bench.ran] == [(4, False), (4, False), (2, True)]


@pytest.mark.parametrize("early_s", [0.0, 0.004])
def test_an_attempt_that_the_total_timeout_stops_is_the_last(early_s: float) -> None:
    bench = Bench(failing(), policy=RetryPolicy(max_retries=None, retry_delay_s=0, total_timeout_s=10))
    bench.takes_s = 10.0 - early_s
    bench.behave = lambda command: Failed(StepTimeoutError("stopped"), outcome_unknown=True)
    ended = bench.run()
    assert (ended.why, ended.attempt, len(bench.ran)) == ("deadline", 1, 1)
    assert isinstance(ended.error, StepTimeoutError)


def test_the_total_timeout_of_a_step_that_is_not_idempotent_loses_it() -> None:
    policy = RetryPolicy(max_retries=3, idempotent=False, total_timeout_s=10)
    bench = Bench(lambda command: Failed(StepTimeoutError("x"), outcome_unknown=True), takes_s=10.0, policy=policy)
    assert isinstance(bench.run().error, StepLostError)


def test_the_total_timeout_counts_from_the_first_attempt_of_an_earlier_dispatch() -> None:
    earlier = [PreviousFailure(1, "transient", "ConnectionError", "refused", 3.0)]
    policy = RetryPolicy(max_retries=9, retry_delay_s=3, total_timeout_s=10)
    given: dict[str, Any] = {"policy": policy, "first_attempt": 2, "retries_used": 1, "previous": earlier}
    bench = Bench(failing(), began_at=995.0, **given)
    assert bench.run().why == "deadline"
    assert bench.starts == [0, 3]
    late = Bench(failing(), began_at=990.0, **given)
    ended = late.run()
    assert late.ran == []
    assert (ended.status, ended.why, ended.attempt) == ("failed", "deadline", 1)
    assert isinstance(ended.error, StepTimeoutError)
    assert "attempt 1 had failed with ConnectionError: refused" in str(ended.error)
    assert ended.error.__notes__[0].startswith("attempt 1:")


def test_case_3_retry_after_may_exceed_the_cap_only_up_to_the_total_timeout() -> None:
    policy = RetryPolicy(max_retries=9, retry_backoff=2, max_retry_delay_s=5, total_timeout_s=60)
    bench = Bench(failing(lambda: RetryableError("later", retry_after="50s")), policy=policy)
    assert bench.run().why == "deadline"
    assert bench.starts == [0, 50]


def test_the_smaller_of_the_runs_end_and_the_total_timeout_wins() -> None:
    policy = RetryPolicy(max_retries=9, retry_delay_s=5, total_timeout_s=60)
    assert len(Bench(failing(), policy=policy, deadline=1_011.0).run().error.__notes__) == 3  # type: ignore[union-attr]
    bench = Bench(failing(), policy=policy.model_copy(update={"total_timeout_s": 11.0}), deadline=1_060.0)
    bench.run()
    assert bench.starts == [0, 5, 10]


# Hand-back --------------------------------------------------------------------------------------------------------


def test_a_long_wait_is_handed_back_and_a_short_one_waited() -> None:
    policy = RetryPolicy(max_retries=9, retry_delay_s=0.5, retry_backoff=2, jitter="none")
    bench = Bench(failing(), policy=policy, wait_max_s=1.0)
    ended = bench.run()
    assert (ended.status, ended.attempt) == ("handed_back", 3)
    assert bench.waits == [0.5, 1.0]
    assert ended.retry_at == bench.now + 2.0


def test_a_handed_back_call_goes_on_where_it_was() -> None:
    earlier = [PreviousFailure(n, "transient", "ConnectionError", "x", 5.0) for n in (1, 2)]
    policy = RetryPolicy(max_retries=3, retry_delay_s=5)
    bench = Bench(failing(), policy=policy, first_attempt=3, retries_used=2, previous=earlier, not_before=1_000.4)
    ended = bench.run()
    assert [command.attempt for command in bench.ran] == [3, 4]
    assert bench.starts == pytest.approx([0.4, 5.4])
    assert [failure.attempt for failure in bench.ran[0].previous] == [1, 2]
    assert len(bench.ran[1].previous) == 3
    assert ended.error is not None
    assert [note.partition(":")[0] for note in ended.error.__notes__] == [f"attempt {n}" for n in (1, 2, 3, 4)]


def test_a_call_that_comes_far_too_early_is_handed_back_without_an_attempt() -> None:
    ended = Bench(failing(), not_before=1_060.0, wait_max_s=1.0).run()
    assert (ended.status, ended.attempt, ended.retry_at) == ("handed_back", 0, 1_060.0)


# Records, notes, log ----------------------------------------------------------------------------------------------


def test_case_9_every_failed_attempt_is_recorded_with_its_delay_and_why() -> None:
    policy = RetryPolicy(max_retries=2, retry_delay_s=5)
    bench = Bench(failing(), takes_s=1, policy=policy)
    bench.run()
    first, _, last = bench.failures
    assert (first.attempt, first.kind, first.started_at, first.ended_at) == (1, "transient", 1_000.0, 1_001.0)
    assert (first.delay_s, first.delay_reason, first.retry_at) == (5.0, "fixed", 1_006.0)
    assert (last.attempt, last.delay_s, last.retry_at) == (3, None, None)


def test_case_8_the_last_exception_is_raised_itself_with_a_note_an_attempt() -> None:
    bench = Bench(failing(), policy=RetryPolicy(max_retries=1, retry_delay_s=5))
    error = bench.run().error
    assert isinstance(error, ConnectionError)
    assert error.__notes__ == [
        "attempt 1: transient, ConnectionError: refused; waited 5s",
        "attempt 2: transient, ConnectionError: refused; no further attempt: its one retry is used",
    ]


def test_notes_of_an_exception_object_raised_by_many_calls_do_not_pile_up() -> None:
    error = ConnectionError("the same object")
    error.add_note("a user's note")
    for _ in range(3):
        Bench(failing(lambda: error), policy=RetryPolicy(max_retries=1)).run()
    assert error.__notes__[0] == "a user's note"
    assert len(error.__notes__) == 3


def test_case_8_of_many_attempts_the_first_and_last_are_noted() -> None:
    bench = Bench(failing(), policy=RetryPolicy(max_retries=2_999, retry_delay_s=0))
    error = bench.run().error
    assert error is not None
    assert len(error.__notes__) == 51
    assert error.__notes__[0].startswith("attempt 1:")
    assert error.__notes__[-1].startswith("attempt 3000:")
    assert len(bench.ran[-1].previous) == 1_000


def test_case_8_an_attempt_reads_the_failures_before_it() -> None:
    bench = Bench(failing(times=1), policy=RetryPolicy(max_retries=1, retry_delay_s=5))
    bench.run()
    assert list(bench.ran[0].previous) == []
    (seen,) = bench.ran[1].previous
    assert (seen.kind, seen.type, seen.message, seen.delay) == ("transient", "ConnectionError", "refused", 5.0)


def test_an_error_whose_text_raises_is_no_trouble() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    error = Bench(failing(Mute), policy=RetryPolicy(max_retries=1, retry_delay_s=0)).run().error
    assert isinstance(error, Mute)
    assert len(error.__notes__) == 2


@pytest.mark.parametrize(
    ("error", "level"),
    [(ConnectionError("x"), "INFO"), (ValueError("x"), "ERROR"), (TimeoutError("x"), "WARNING")],
)
def test_failures_are_logged_at_the_level_of_their_kind(
    caplog: pytest.LogCaptureFixture, error: Exception, level: str
) -> None:
    with caplog.at_level(logging.DEBUG, "pyworkflow_ray"):
        Bench(failing(lambda: error, times=1), policy=RetryPolicy(max_retries=1, retry_delay_s=4)).run()
    (record,) = caplog.records
    assert record.levelname == level
    assert "attempt 1 of 2 failed" in record.getMessage()


def test_attempts_that_follow_each_other_at_once_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "pyworkflow_ray"):
        Bench(failing(), policy=RetryPolicy(max_retries=99, retry_delay_s=0)).run()
        numbers = [int(r.getMessage().split("attempt ")[1].split()[0]) for r in caplog.records]
        assert numbers == [*range(1, 11), 16, 32, 64, 100]
        caplog.clear()
        Bench(failing(), policy=RetryPolicy(max_retries=99, retry_delay_s=1)).run()
    assert len(caplog.records) == 100, "slow ones are all logged"


def test_refusals_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "pyworkflow_ray"):
        Bench(failing(lambda: CircuitOpenError("open"))).run()
    assert caplog.records == []


# The breaker ------------------------------------------------------------------------------------------------------


def test_every_attempt_asks_the_breaker_and_a_refusal_ends_the_retrying_at_once() -> None:
    bench = Bench(failing(), policy=RetryPolicy(max_retries=9, retry_delay_s=5), guarded=True)
    refusal = CircuitOpenError("open", name="payments", retry_after=60.0)
    bench.breaker = [Admitted("p1", "closed"), Admitted("p2", "closed"), Refused(refusal, "open")]
    ended = bench.run()
    assert len(bench.ran) == 2
    assert (ended.why, ended.kind, ended.attempt) == ("refused", "cascade", 3)
    assert ended.error is refusal
    assert [type(error) for error in bench.told] == [ConnectionError, ConnectionError]
    assert [failure.breaker for failure in bench.failures] == ["closed", "closed", "open"]
    assert len(refusal.__notes__) == 3


def test_the_breaker_is_told_success_and_cancellation() -> None:
    bench = Bench(failing(times=0), guarded=True)
    bench.breaker = [Admitted("p", "half_open")]
    assert bench.run().breaker == "half_open"
    assert bench.told == [None]
    bench = Bench(lambda command: Cancelled(), guarded=True)
    bench.breaker = [Admitted("p", "closed")]
    bench.run()
    assert not isinstance(bench.told[0], Exception)
    assert bench.told[0] is not None


def test_a_breaker_that_cannot_be_asked_fails_the_attempt_without_running_it() -> None:
    bench = Bench(failing(times=0), policy=RetryPolicy(max_retries=1, retry_delay_s=5), guarded=True)
    bench.breaker = [Failed(ConnectionError("no answer")), Admitted("p", "closed")]
    assert bench.run().value == "value 2"
    assert bench.starts == [5]
