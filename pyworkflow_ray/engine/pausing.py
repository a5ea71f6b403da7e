"""Pauses that a step or a person asks for: what is recorded, and which steps a resume gives fresh attempts.

Pure. Called by `driver` (of which `PausingDriver` is a part) and `history`. Rules:

* a run that is to pause begins nothing more; it pauses once what runs has ended, so that no attempt is lost by it;
* what the body asks for meanwhile is held: recorded as handed back, due at once;
* a resume grants each step that used up its attempts a fresh set; the policy that the code now gives holds from then on
  for every open step; the numbers of attempts and the idempotency key go on.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import TYPE_CHECKING, Any

from pyworkflow_ray.engine.chunks import parse_position
from pyworkflow_ray.engine.events import ErrorInfo, Event, RunCreated, RunPaused, StepHandedBack
from pyworkflow_ray.errors import UNREADABLE, NonDeterminismError
from pyworkflow_ray.resilience.retry import AT_ONCE, spread

if TYPE_CHECKING:
    from pyworkflow_ray.engine.calls import Codec
    from pyworkflow_ray.engine.history import History, StepState
    from pyworkflow_ray.engine.machine import Machine
    from pyworkflow_ray.resilience.policy import RetryPolicy

PAUSES = ("exhausted", "deadline", "budget")  # `StepFailed.why` of a step that gave up, and might not have


def pauses(step: StepState, why: str) -> bool:
    """Whether the run pauses instead of the step failing."""
    policy = step.event.policy
    if policy.on_exhausted != "pause" or why not in PAUSES:
        return False
    # without a total timeout it is the run's own end that leaves no time
    return why != "deadline" or policy.total_timeout_s is not None


def exhausted(created: RunCreated, step: StepState, error: ErrorInfo, why: str, now: float) -> RunPaused:
    """The pause of a run one of whose steps gave up."""
    event, run_id = step.event, created.run_id
    words = {
        "exhausted": f"used up its attempts ({step.attempt})",
        "deadline": f"used up its total_timeout ({step.attempt} attempts)",
        "budget": f"was refused another attempt by its retry budget ({step.attempt} so far)",
    }[why]
    return RunPaused(
        at=now,
        reason="step_exhausted",
        message=(
            f"run {run_id!r} is paused: step {event.step!r} (position {event.position}) {words}; the last failure was "
            f"{error.type}: {error.message}. Mend what it needs, then grant it fresh attempts: "
            f"pyworkflow-ray runs resume {run_id}"
        ),
        details={"position": event.position, "step": event.step, "why": why, "type": error.type},
    )


def by_hand(created: RunCreated, now: float) -> RunPaused:
    """The pause that a person asked for."""
    run_id = created.run_id
    return RunPaused(
        at=now,
        reason="user",
        message=f"run {run_id!r} is paused by hand. Go on: pyworkflow-ray runs resume {run_id}",
    )


def spread_overdue(waiting: list[StepState], rng: Random, now: float) -> None:
    """Retries that all fell due while nobody owned the run come back a few at a time, with jitter."""
    overdue = [step for step in waiting if step.ended is None and (step.retry_at or 0.0) <= now]
    if len(overdue) > AT_ONCE:
        for step, after_s in zip(overdue, spread(len(overdue), rng), strict=True):
            step.retry_at = now + after_s


def lost_too_often(created: RunCreated, times: int) -> str:
    return (
        f"run {created.run_id!r} is paused: {times} activations were lost without a step completed in between "
        f"(max_recoveries={created.max_recoveries}). Find what kills it, then: "
        f"pyworkflow-ray runs resume {created.run_id}"
    )


def cannot_be_called(created: RunCreated, error: Exception) -> str:
    return (
        f"run {created.run_id!r} is paused: its workflow {created.workflow!r} can't be called with the recorded "
        f"arguments: {type(error).__name__}: {error}. Restore the code that the run was started with and resume: "
        f"pyworkflow-ray runs resume {created.run_id}"
    )


def not_replayed(created: RunCreated, error: Exception, now: float) -> tuple[Any, str, float, dict[str, Any] | None]:
    """The pause of a run that could not be replayed, as `Driver._pause` takes it."""
    if isinstance(error, NonDeterminismError):
        details = {name: getattr(error, name) for name in ("position", "recorded", "attempted", "remedy")}
        return "nondeterminism", str(error), now, details
    if isinstance(error, UNREADABLE):
        return "environment", unreadable(created, error), now, None
    # its arguments can't be restored, or the workflow does not take them any more
    return "code", cannot_be_called(created, error), now, None


def unreadable(created: RunCreated | None, error: Exception) -> str:
    assert created is not None
    return (
        f"run {created.run_id!r} is paused: {type(error).__name__}: {error}. Nothing was lost by it: mend that and "
        f"resume: pyworkflow-ray runs resume {created.run_id}"
    )


def grant(steps: Iterable[StepState], paused: RunPaused | None, now: float) -> None:
    """A person resumed the run: what gave up has a fresh set of attempts, and every limit of time begins anew."""
    gave_up: Any = paused.details.get("position") if paused is not None and paused.reason == "step_exhausted" else None
    for step in steps:
        if step.ended is not None:
            continue
        step.began_at = None
        if step.event.policy.on_exhausted == "pause" and (step.verdict is not None or step.event.position == gave_up):
            step.verdict = None
            step.retries_used = step.recoveries = 0
            step.waiting, step.retry_at = True, now


class PausingDriver:
    """The part of the driver that pauses and wakes. The rest of it is in `driver`."""

    _history: History
    _over: bool
    _now: float
    _machine: Machine | None
    _cause: str
    _wanted_pause: RunPaused | None
    _paused_by_hand: bool
    _codec: Codec

    if TYPE_CHECKING:

        def _note(self, event: Event) -> None: ...

        def _dispatch(self, step: StepState) -> None: ...

        def _settle(self, now: float) -> None: ...

        def _pause(self, reason: Any, message: str, now: float, details: dict[str, Any] | None = None) -> None: ...

    def pause(self, now: float) -> None:
        """Pause the run for a person, once what runs has ended; nothing more begins.

        May be called before `activate`: then nothing is dispatched at all.
        """
        self._now = now
        if self._over or self._history.ended is not None or self._history.paused is not None:
            return
        self._paused_by_hand = True
        if self._history.created is not None:
            self._settle(now)

    def wake(self, now: float) -> None:
        """Parked retries happen now, durably: a recovery does not wait for them again. Timers stay as they are."""
        self._now = now
        if self._over or self._history.created is None or self._history.paused is not None:
            return
        for step in list(self._history.open_steps.values()):
            if step.waiting and self._history.ended is None:
                self._dispatch(step)
        self._settle(now)

    def _codec_at(self, position: str) -> Codec:
        """The codec for what lies at a step's position, or of a map's chunk at the map's."""
        created, chunk = self._history.created, parse_position(position)
        assert created is not None
        return self._codec.at(created.run_id, position if chunk is None else chunk[0])

    def _waits(self) -> list[float]:
        """Everything that time alone brings: timers and waiting retries."""
        timers = list(self._history.open_timers.values())
        if self._is_pausing():
            return timers
        return timers + [s.retry_at or 0.0 for s in self._history.open_steps.values() if s.waiting]

    def _is_pausing(self) -> bool:
        """Whether the run begins nothing more, for it is to pause. A cancelled run ends instead."""
        wanted = self._wanted_pause is not None or self._paused_by_hand
        return wanted and self._history.cancel is None

    def _policy_from_here_on(self, position: str) -> RetryPolicy | None:
        """The policy that the code now gives where it is another and a person resumed; None: no change."""
        policy = self._machine.policies.pop(position, None) if self._machine is not None else None
        return policy if self._cause == "resume" else None

    def _hold(self, step: StepState) -> None:
        """Not now: the run is about to pause. It is due at once when the run goes on."""
        if not step.waiting:
            position = step.event.position
            self._note(StepHandedBack(at=self._now, position=position, dispatch=step.dispatch, due_at=self._now))

    def _pause_now(self, now: float) -> None:
        """Nothing runs any more: the pause that was asked for begins."""
        created = self._history.created
        assert created is not None
        event = self._wanted_pause or by_hand(created, now)
        self._pause(event.reason, event.message, now, event.details)
