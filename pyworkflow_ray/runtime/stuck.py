"""The outcome of an attempt that was stuck beyond its timeout, where only the end of its worker helped.

Called by `run_actor` when a step host died and its attempt's time was over; calls `resilience.retry`, as the attempt
loop would have done in the worker.
"""

from __future__ import annotations

import random
import time

from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.engine.calls import Outcome, StepCall
from pyworkflow_ray.engine.events import AttemptFailed
from pyworkflow_ray.errors import StepTimeoutError
from pyworkflow_ray.resilience.retry import DelayOf, ErrorFilter, Retry, decide
from pyworkflow_ray.runtime.process import Process


def stuck_outcome(
    call: StepCall,
    process: Process,
    attempt: int,
    retries_used: int,
    began: float,
    over_at: float,
    ends_at: float | None,
) -> Outcome:
    """Handed back for its next attempt, or failed with `StepTimeoutError`, as the step's policy says.

    Args:
        over_at: UNIX time at which the attempt's time was over.
        ends_at: UNIX time at which the step's total timeout is over; None: it has none.
    """
    now = time.time()
    timeout = max(0.0, over_at - began)
    error = StepTimeoutError(
        f"step {call.step!r}, attempt {attempt}, was stuck beyond its timeout of {format_duration(timeout)} in code "
        "that nothing can interrupt; its worker was ended"
    )
    retry_on: ErrorFilter | None = None
    no_retry_on: ErrorFilter = ()
    delay_of: DelayOf | None = None
    try:
        step = process.load_step(call.code)
        retry_on, no_retry_on, delay_of = step.retry_on, step.no_retry_on, step.delay_of
    except Exception:
        pass  # the policy's numbers decide alone
    decided = decide(
        error,
        "timeout",
        call.policy,
        now=now,
        rng=random.Random(),
        retries_used=retries_used,
        retry_on=retry_on,
        no_retry_on=no_retry_on,
        delay_of=delay_of,
        deadline=min((at for at in (call.deadline, ends_at) if at is not None), default=None),
        outcome_unknown=True,
    )
    again = decided if isinstance(decided, Retry) else None
    failed = AttemptFailed(
        position=call.position,
        dispatch=call.dispatch,
        attempt=attempt,
        started_at=began,
        ended_at=now,
        error=process.failure(error, "timeout"),
        delay_s=again.delay_s if again else None,
        delay_reason=again.reason if again else "none left",
        retry_at=again.retry_at if again else None,
        why="" if isinstance(decided, Retry) else decided.why,
        node=process.node,
    )
    return Outcome(
        position=call.position,
        dispatch=call.dispatch,
        status="handed_back" if again else "failed",
        attempt=attempt,
        attempts=[failed],
        error=None if again else failed.error,
        why="" if again is not None or isinstance(decided, Retry) else decided.why,
        started_at=began,
        ended_at=now,
        retry_at=again.retry_at if again else None,
    )
