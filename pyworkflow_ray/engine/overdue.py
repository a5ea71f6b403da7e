"""Steps whose time is over where no worker can say so: an attempt that stood still, a dispatch that comes too late.

Pure. Called by `driver`; calls `resilience.retry`, as the attempt loop would have done in the worker.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from pyworkflow_ray.engine.calls import Codec
from pyworkflow_ray.engine.events import AttemptFailed, ErrorInfo
from pyworkflow_ray.errors import StepLostError, StepTimeoutError
from pyworkflow_ray.resilience.retry import Retry, Stop, decide

if TYPE_CHECKING:
    from pyworkflow_ray.engine.history import StepState


def stuck(
    step: StepState, started: float, timeout_s: float, now: float, rng: Random, deadline: float | None, codec: Codec
) -> tuple[AttemptFailed, ErrorInfo, str]:
    """The failed attempt of a worker that ended itself, and the step's error and why, should no attempt follow.

    What `retry_on` and a callable `retry_delay` say is code and not known here: the taxonomy decides, by which timeouts
    are retried, and the policy's numbers.
    """
    attempt = max(1, step.attempt)
    error = StepTimeoutError(
        f"attempt {attempt} of step {step.event.step!r} ran longer than its timeout of {timeout_s:g} s, "
        "and could only be ended with its worker"
    )
    info = codec.encode_error(error, "timeout")
    choice = decide(
        error,
        "timeout",
        step.event.policy,
        now=now,
        rng=rng,
        retries_used=step.retries_used,
        deadline=deadline,
        outcome_unknown=True,
    )
    retry = choice if isinstance(choice, Retry) else None
    why = choice.why if isinstance(choice, Stop) else ""
    record = AttemptFailed(
        at=now,
        position=step.event.position,
        dispatch=step.dispatch,
        attempt=attempt,
        started_at=started,
        ended_at=now,
        error=info,
        delay_s=retry.delay_s if retry else None,
        delay_reason=retry.reason if retry else None,
        retry_at=retry.retry_at if retry else None,
        why=why,
    )
    if isinstance(choice, Stop) and why == "lost":
        info = codec.encode_error(StepLostError(f"{error}; {choice.note}"), "permanent")
    return record, info, why


def too_late(step: StepState, codec: Codec) -> ErrorInfo:
    """The error of a step whose total timeout was over before it could be dispatched: its last, where it has one."""
    if step.last_error is not None:
        return step.last_error
    name, total_s = step.event.step, step.event.policy.total_timeout_s or 0.0
    error = StepTimeoutError(f"step {name!r}: its total_timeout of {total_s:g} s was over, and no attempt had ended")
    return codec.encode_error(error, "timeout")
