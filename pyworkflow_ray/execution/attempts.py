"""The attempt loop: all attempts of one step call, written once for step workers, local steps, plain calls and tests.

Called by `worker` and `plain`, which carry out its commands through `perform`; calls `resilience.retry`. Rules:

* a generator: it yields what is to be done next and is sent how that went; it has no clock, thread or randomness of
  its own, so a virtual clock drives it as a real one does;
* order of wrapping, outermost first: total timeout, retry loop, retry budget, circuit breaker, attempt timeout, the
  user's function. Every attempt asks the breaker, and tells it its end before anything else is known of that end;
* cancellation is never retried and never counted; it is looked for before each attempt and ends a wait;
* deadlines nest, the smaller remaining one wins: an attempt is stopped at the end of the total timeout, and a wait that
  cannot end before that, or before the run's own end, is not begun;
* no wait after the last attempt. A wait longer than `wait_max_s` is not done here: the call is handed back;
* the last exception itself is the step's, with a note an attempt.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, Protocol

from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.engine.calls import PreviousFailure
from pyworkflow_ray.errors import CircuitOpenError, RetryBudgetExhausted, StepLostError, StepTimeoutError
from pyworkflow_ray.resilience.breaker import error_text
from pyworkflow_ray.resilience.policy import RetryPolicy
from pyworkflow_ray.resilience.retry import DelayOf, ErrorFilter, Retry, Stop, decide
from pyworkflow_ray.resilience.taxonomy import Kind, classify, log_level

log = logging.getLogger("pyworkflow_ray.step")

ASK_AGAIN_S = 1.0  # where a breaker that refuses does not say when
MAX_NOTES = 50  # of more attempts the first and the last are noted
MAX_PREVIOUS = 1_000  # earlier failures that an attempt can read
MAX_MESSAGE = 2_000  # characters of an error's text in `previous`


# What crosses the border to whoever carries the commands out ------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Wait:
    """Sleep; ends early when the call is cancelled."""

    seconds: float


@dataclass(slots=True, frozen=True)
class AskBudget:
    """A retry is to follow `error`: take its price from the step's retry budget.

    Answer: `Granted`, or `Failed` where it could not be asked.
    """

    error: BaseException


@dataclass(slots=True, frozen=True)
class TellBudget:
    """The step succeeded: the budget gets tokens back."""


@dataclass(slots=True, frozen=True)
class AskBreaker:
    """Ask the step's breaker. Answer: `Admitted`, `Refused`, or `Failed` where it could not be asked.

    waited_s: the step waits until it is let through, and has waited so long; None: it does not.
    """

    waited_s: float | None = None


@dataclass(slots=True, frozen=True)
class RunAttempt:
    """Run the user's function once, for at most `timeout_s`. Answer: `Succeeded`, `Failed` or `Cancelled`.

    last_chance: the limit is not the attempt's own but the end of the total timeout.
    """

    attempt: int
    previous: Sequence[PreviousFailure]
    started_at: float
    timeout_s: float | None = None
    last_chance: bool = False


@dataclass(slots=True, frozen=True)
class TellBreaker:
    """The attempt that `permit` admitted has ended; `error` None: it succeeded."""

    permit: Any
    error: BaseException | None


Command = Wait | AskBudget | TellBudget | AskBreaker | RunAttempt | TellBreaker


@dataclass(slots=True, frozen=True)
class Granted:
    granted: bool


@dataclass(slots=True, frozen=True)
class Admitted:
    permit: Any
    state: str


@dataclass(slots=True, frozen=True)
class Refused:
    error: CircuitOpenError
    state: str


@dataclass(slots=True, frozen=True)
class Succeeded:
    value: Any


@dataclass(slots=True, frozen=True)
class Failed:
    """outcome_unknown: it was stopped by us, and what it had done by then is not known.

    ended_the_step: it was stopped by the total timeout.
    """

    error: BaseException
    outcome_unknown: bool = False
    ended_the_step: bool = False


@dataclass(slots=True, frozen=True)
class Cancelled:
    pass


Answer = Granted | Admitted | Refused | Succeeded | Failed | Cancelled | None


class Permit(Protocol):
    """One admitted call, to be ended once."""

    def finish(self, error: BaseException | None) -> None: ...

    async def finish_async(self, error: BaseException | None) -> None: ...


class Guard(Protocol):
    """The step's circuit breaker (`breakers.CircuitGuard`)."""

    @property
    def state(self) -> Any: ...

    @property
    def generation(self) -> int: ...

    def acquire(self, waited_s: float | None = None) -> Permit: ...

    async def acquire_async(self, waited_s: float | None = None) -> Permit: ...


# What goes in, and what comes out ---------------------------------------------------------------------------------


@dataclass(slots=True)
class FailedAttempt:
    """delay_s, delay_reason, retry_at: of the wait before the next attempt; None where none follows."""

    attempt: int
    started_at: float
    ended_at: float
    error: BaseException
    kind: Kind
    delay_s: float | None
    delay_reason: str | None
    retry_at: float | None
    breaker: str | None
    why: str = ""  # as in `StepFailed.why`, where no attempt follows


@dataclass(slots=True)
class Plan:
    """What an attempt loop is made of.

    Args:
        step: Name of the step, for messages.
        guarded: Whether a breaker is to be asked.
        patient: Whether an attempt that it refuses waits instead of failing the step.
        budget: Name of the retry budget that each retry is to be taken from.
        first_attempt: Number of the first attempt made here.
        retries_used: Retries that were used before.
        previous: Failures before, oldest first.
        not_before: UNIX time before which no attempt may begin.
        began_at: UNIX time at which the step's first attempt began, in an earlier dispatch; None: it begins here.
        deadline: UNIX time at which the run ends: no wait that ends later is begun.
        wait_max_s: Longest wait that is done here; None: any.
        accept: Applied to the function's value; what it raises is a failure that is never retried (the value can't be
            stored: executing the step again would not change that).
        on_started: Told of each attempt that begins: number, UNIX time.
        on_failed: Told of each attempt that failed, once it is decided what follows.
        cancelled: Whether the call was cancelled.
    """

    step: str
    policy: RetryPolicy
    clock: Callable[[], float]
    rng: Random
    retry_on: ErrorFilter | None = None
    no_retry_on: ErrorFilter = ()
    delay_of: DelayOf | None = None
    guarded: bool = False
    patient: bool = False
    budget: str | None = None
    first_attempt: int = 1
    retries_used: int = 0
    previous: Sequence[PreviousFailure] = ()
    not_before: float | None = None
    began_at: float | None = None
    deadline: float | None = None
    wait_max_s: float | None = None
    accept: Callable[[Any], Any] | None = None
    on_started: Callable[[int, float], None] | None = None
    on_failed: Callable[[FailedAttempt], None] | None = None
    cancelled: Callable[[], bool] = bool
    where: str = ""


@dataclass(slots=True)
class Ended:
    """How the call ended. attempt: the last that was begun (of a call that never began one, the one before).

    completed: `value`. failed: `error` (with notes), `kind`, `why` as in `StepFailed`. handed_back: `retry_at`.
    """

    status: Literal["completed", "failed", "handed_back", "cancelled"]
    attempt: int
    value: Any = None
    error: BaseException | None = None
    kind: Kind = "transient"
    why: str = ""
    retry_at: float | None = None
    started_at: float = 0.0
    ended_at: float = 0.0
    breaker: str | None = None


def attempts(plan: Plan) -> Generator[Command, Answer, Ended]:
    """The loop. Send each command's answer; the generator's value is the end of the call."""
    attempt = plan.first_attempt
    retries_used = plan.retries_used
    history = _Previous(plan.previous)
    ends_at = _ends_at(plan)
    deadline = min((at for at in (plan.deadline, ends_at) if at is not None), default=None)
    resume_at = plan.not_before
    wait_s = 0.0 if resume_at is None else max(0.0, resume_at - plan.clock())
    while True:
        if wait_s > 0:
            if plan.wait_max_s is not None and wait_s > plan.wait_max_s:
                return Ended("handed_back", attempt - 1, retry_at=resume_at, ended_at=plan.clock())
            yield Wait(wait_s)
        if plan.cancelled():
            return Ended("cancelled", attempt - 1, ended_at=plan.clock())
        started_at = plan.clock()
        if ends_at is not None and started_at >= ends_at:
            return _too_late(plan, attempt, history, started_at)
        answer, breaker = yield from _one(plan, attempt, history, started_at, ends_at)
        ended_at = plan.clock()
        if plan.patient and isinstance(answer, Refused):
            wait_s = ASK_AGAIN_S if answer.error.ask_again_s is None else answer.error.ask_again_s
            if plan.wait_max_s is None:
                wait_s = min(wait_s, ASK_AGAIN_S)  # nobody can call us while we sleep: a person may have closed it
            resume_at = ended_at + wait_s
            if deadline is None or resume_at <= deadline:
                continue  # no attempt is spent
        if isinstance(answer, Cancelled):
            return Ended("cancelled", attempt, started_at=started_at, ended_at=ended_at, breaker=breaker)
        stored = True
        if isinstance(answer, Succeeded):
            try:
                value = answer.value if plan.accept is None else plan.accept(answer.value)
                if plan.budget is not None:
                    yield TellBudget()
                return Ended(
                    "completed", attempt, value=value, started_at=started_at, ended_at=ended_at, breaker=breaker
                )
            except Exception as error:
                answer, stored = Failed(error), False
        assert isinstance(answer, (Failed, Refused)), answer
        decision: Retry | Stop
        kind = classify(answer.error)
        if not stored:
            decision = Stop("permanent", "its result can't be stored")
        else:
            decision = (
                _out_of_time(plan)
                if plan.patient and isinstance(answer, Refused)
                else decide(
                    answer.error,
                    kind,
                    plan.policy,
                    now=_judged_at(answer, ended_at, ends_at),
                    rng=plan.rng,
                    retries_used=retries_used,
                    retry_on=plan.retry_on,
                    no_retry_on=plan.no_retry_on,
                    delay_of=plan.delay_of,
                    previous_s=history.last_delay_s,
                    deadline=deadline,
                    refused=isinstance(answer, Refused),
                    outcome_unknown=isinstance(answer, Failed) and answer.outcome_unknown,
                )
            )
        if plan.budget is not None and isinstance(decision, Retry):
            decision = yield from _afford(plan.budget, decision, answer.error)
        failure = _failure(attempt, started_at, ended_at, answer.error, kind, decision, breaker)
        history.add(failure)
        _log(plan, failure, decision)
        if plan.on_failed is not None:
            plan.on_failed(failure)
        if isinstance(decision, Stop):
            final = _final(plan, failure, decision)
            add_notes(final, history, decision)
            return Ended(
                "failed",
                attempt,
                error=final,
                kind=classify(final),
                why=decision.why,
                started_at=started_at,
                ended_at=ended_at,
                breaker=breaker,
            )
        attempt += 1
        retries_used += 1
        wait_s, resume_at = decision.delay_s, decision.retry_at
        del answer, failure  # a long wait keeps no frames of the user's alive


def _one(
    plan: Plan, attempt: int, history: _Previous, started_at: float, ends_at: float | None
) -> Generator[Command, Answer, tuple[Answer, str | None]]:
    """One attempt within the breaker: how it ended, and the breaker's state when it began."""
    breaker: str | None = None
    permit: Any = None
    if plan.guarded:
        waited_s = max(0.0, started_at - (plan.began_at or started_at)) if plan.patient and attempt == 1 else 0.0
        asked = yield AskBreaker(waited_s if plan.patient else None)
        if isinstance(asked, Failed):
            return asked, None
        if isinstance(asked, Refused):
            return asked, asked.state
        assert isinstance(asked, Admitted)
        permit, breaker = asked.permit, asked.state
    if plan.on_started is not None:
        plan.on_started(attempt, started_at)
    timeout_s, last_chance = plan.policy.timeout_s, False
    if ends_at is not None:
        left = max(1e-6, ends_at - plan.clock())
        last_chance = timeout_s is None or left < timeout_s
        timeout_s = left if last_chance else timeout_s
    answer = yield RunAttempt(attempt, history.visible(), started_at, timeout_s, last_chance)
    if last_chance and isinstance(answer, Failed) and answer.outcome_unknown:
        answer = Failed(answer.error, outcome_unknown=True, ended_the_step=True)
    if permit is not None:
        yield TellBreaker(permit, _for_breaker(answer))
    return answer, breaker


def _afford(budget: str, retry: Retry, error: BaseException) -> Generator[Command, Answer, Retry | Stop]:
    """The retry, where its budget has the tokens for it."""
    answer = yield AskBudget(error)
    if isinstance(answer, Failed):
        return Stop("code", f"retry budget {budget!r} could not be asked: {error_text(answer.error)}")
    assert isinstance(answer, Granted), answer
    return retry if answer.granted else Stop("budget", f"retry budget {budget!r} is empty")


def _ends_at(plan: Plan) -> float | None:
    """UNIX time at which the total timeout is over."""
    total_s = plan.policy.total_timeout_s
    if total_s is None:
        return None
    return (plan.clock() if plan.began_at is None else plan.began_at) + total_s


def _out_of_time(plan: Plan) -> Stop:
    """The breaker is open, and nobody knows of a moment before the deadline at which it lets the step through."""
    limit = "the run's end"
    if plan.policy.total_timeout_s is not None:
        limit = f"its total_timeout of {format_duration(plan.policy.total_timeout_s)}"
    return Stop("refused", f"its circuit breaker lets it through no sooner than {limit} allows")


def _judged_at(answer: Failed | Refused, ended_at: float, ends_at: float | None) -> float:
    """Where the total timeout stopped it, it is over, though the clock that stopped it may be early by a moment."""
    if ends_at is not None and isinstance(answer, Failed) and answer.ended_the_step:
        return max(ended_at, ends_at)
    return ended_at


def _too_late(plan: Plan, attempt: int, history: _Previous, now: float) -> Ended:
    """The total timeout was over before the attempt could begin: a worker came late, or was lost."""
    total = format_duration(plan.policy.total_timeout_s or 0.0)
    error = StepTimeoutError(
        f"step {plan.step!r}: its total_timeout of {total} was over before attempt {attempt} could begin"
        f"{history.last_words()}"
    )
    add_notes(error, history, Stop("deadline", f"its total_timeout of {total} is over"))
    return Ended("failed", attempt - 1, error=error, kind="timeout", why="deadline", started_at=now, ended_at=now)


def _for_breaker(answer: Answer) -> BaseException | None:
    if isinstance(answer, Cancelled):
        return asyncio.CancelledError()  # the permit is given back and nothing is counted
    return answer.error if isinstance(answer, Failed) else None


def _failure(
    attempt: int,
    started_at: float,
    ended_at: float,
    error: BaseException,
    kind: Kind,
    decision: Retry | Stop,
    breaker: str | None,
) -> FailedAttempt:
    if isinstance(decision, Stop):
        return FailedAttempt(
            attempt, started_at, ended_at, error, kind, None, decision.note, None, breaker, decision.why
        )
    return FailedAttempt(
        attempt, started_at, ended_at, error, kind, decision.delay_s, decision.reason, decision.retry_at, breaker
    )


def _final(plan: Plan, failure: FailedAttempt, stop: Stop) -> BaseException:
    if stop.why == "budget":
        empty = RetryBudgetExhausted(
            f"step {plan.step!r}: attempt {failure.attempt} failed with {error_text(failure.error)}, and {stop.note}: "
            "too much of what it calls fails to try again"
        )
        empty.__cause__ = failure.error
        return empty
    if stop.why != "lost":
        return failure.error
    lost = StepLostError(
        f"step {plan.step!r}: attempt {failure.attempt} was stopped by its timeout, and whether it took effect is "
        "unknown. It is not repeated (idempotent=False): find out at the service, then start a new run"
    )
    lost.__cause__ = failure.error
    return lost


def _log(plan: Plan, failure: FailedAttempt, decision: Retry | Stop) -> None:
    if failure.kind == "cascade":
        return  # refusals are counted, not logged: the breaker that opened has said so once
    if not log.isEnabledFor(log_level(failure.kind)) or _is_one_of_many(failure):
        return
    allowed = "" if plan.policy.max_retries is None else f" of {plan.policy.max_retries + 1}"
    if isinstance(decision, Stop):
        then = f"no further attempt: {decision.note}"
    else:
        when = f"in {format_duration(decision.delay_s)}" if decision.delay_s else "at once"
        then = f"next {when} ({decision.reason})"
    log.log(
        log_level(failure.kind),
        "%s%s: attempt %d%s failed (%s), %s; %s",
        f"{plan.where}: " if plan.where else "",
        plan.step,
        failure.attempt,
        allowed,
        failure.kind,
        error_text(failure.error),
        then,
    )


def _is_one_of_many(failure: FailedAttempt) -> bool:
    """Of attempts that follow each other at once the first are logged, then the 16th, 32nd, 64th, ..."""
    number = failure.attempt
    return failure.delay_s is not None and failure.delay_s < 0.05 and number > 10 and number & (number - 1) != 0


# The failures before ----------------------------------------------------------------------------------------------


class _Previous:
    """The failures of this step, oldest first; of a step retried for ever the first and the last."""

    def __init__(self, earlier: Sequence[PreviousFailure]) -> None:
        self._items = list(earlier)
        self.last_delay_s = next((item.delay for item in reversed(self._items) if item.delay is not None), None)

    def add(self, failure: FailedAttempt) -> None:
        self._items.append(
            PreviousFailure(
                attempt=failure.attempt,
                kind=failure.kind,
                type=type(failure.error).__name__,
                message=message_of(failure.error),
                delay=failure.delay_s,
            )
        )
        if failure.delay_s is not None:
            self.last_delay_s = failure.delay_s
        if len(self._items) > MAX_PREVIOUS:
            del self._items[MAX_PREVIOUS // 2]

    def visible(self) -> tuple[PreviousFailure, ...]:
        return tuple(self._items)

    def last_words(self) -> str:
        """The last failure, for a message."""
        if not self._items:
            return ""
        last = self._items[-1]
        return f"; attempt {last.attempt} had failed with {last.type}: {last.message}"

    def __iter__(self) -> Any:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def message_of(error: BaseException) -> str:
    """The error's text, shortened, whatever its `__str__` does."""
    try:
        text = str(error)
    except Exception as raised:
        text = f"(its text could not be made: {type(raised).__name__})"
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 3] + "..."


def add_notes(error: BaseException, history: _Previous, stop: Stop) -> None:
    """A note an attempt: number, kind, error, and the wait that followed or why none did."""
    notes = []
    for failure in history:
        if failure is not history._items[-1]:
            then = "no wait" if not failure.delay else f"waited {format_duration(failure.delay)}"
        else:
            then = f"no further attempt: {stop.note}"
        text = " ".join(failure.message.split())
        text = text if len(text) <= 200 else text[:197] + "..."
        shown = f"{failure.type}: {text}" if text else failure.type
        notes.append(f"attempt {failure.attempt}: {failure.kind}, {shown}; {then}")
    if len(notes) > MAX_NOTES:
        half = MAX_NOTES // 2
        notes[half:-half] = [f"({len(notes) - 2 * half} more attempts)"]
    try:
        # an exception object that is raised again and again keeps the notes of its last call only
        kept = [note for note in getattr(error, "__notes__", []) if not _is_ours(note)]
        error.__notes__ = [*kept, *notes]
    except Exception:  # a class may forbid attributes; its error matters more than our notes
        pass


def _is_ours(note: Any) -> bool:
    return isinstance(note, str) and note.startswith("attempt ") and ("; waited " in note or "; no " in note)
