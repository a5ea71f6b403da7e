"""The work of `benchmarks.retries`: steps that fail a number of times and then succeed, by tasks and by local steps.

Each step's error names what it was called for, as errors of real services do: of two steps no two are equal.
"""

from __future__ import annotations

import pyworkflow_ray as pw

FEW, MANY = 5, 50  # attempts of a step
SHORT_S, LONG_S = 0.01, 1.1  # a jittered delay that is slept in the worker; one beyond `worker_wait_max`, handed back


def fail_until(last: int, order: int) -> int:
    """Fail in all attempts but number `last`."""
    attempt = pw.current_step().attempt
    if attempt < last:
        raise ConnectionError(f"503 from payments, order {order}")
    return attempt


@pw.step(max_retries=FEW - 1, retry_delay=0)
def task_at_once(order: int) -> int:
    """Five attempts, one after another, in a Ray task."""
    return fail_until(FEW, order)


@pw.step(max_retries=FEW - 1, retry_delay=SHORT_S, jitter="full")
def task_jittered(order: int) -> int:
    """Five attempts with short waits that the worker sleeps."""
    return fail_until(FEW, order)


@pw.step(max_retries=FEW - 1, retry_delay=LONG_S)
def task_handed_back(order: int) -> int:
    """Five attempts with waits that give the worker back."""
    return fail_until(FEW, order)


@pw.step(max_retries=MANY - 1, retry_delay=0)
def task_many(order: int) -> int:
    """Fifty attempts, one after another."""
    return fail_until(MANY, order)


@pw.step(executor="local", max_retries=FEW - 1, retry_delay=0)
def local_at_once(order: int) -> int:
    """Five attempts, one after another, in the run's actor."""
    return fail_until(FEW, order)


@pw.step(executor="local", max_retries=FEW - 1, retry_delay=SHORT_S, jitter="full")
def local_jittered(order: int) -> int:
    """Five attempts with short waits in the run's actor."""
    return fail_until(FEW, order)


@pw.step(executor="local", max_retries=FEW - 1, retry_delay=LONG_S)
def local_handed_back(order: int) -> int:
    """Five attempts with waits during which the run holds no actor."""
    return fail_until(FEW, order)


@pw.step(executor="local", max_retries=MANY - 1, retry_delay=0)
def local_many(order: int) -> int:
    """Fifty attempts in the run's actor."""
    return fail_until(MANY, order)


@pw.workflow
async def by_tasks(kind: str, steps: int, first: int) -> int:
    """Flaky task steps, one after another; gives the attempts made."""
    chosen = {"at_once": task_at_once, "jittered": task_jittered, "handed_back": task_handed_back, "many": task_many}
    return sum([await chosen[kind](first + n) for n in range(steps)])


@pw.workflow
async def by_local_steps(kind: str, steps: int, first: int) -> int:
    """Flaky local steps, one after another; gives the attempts made."""
    chosen = {
        "at_once": local_at_once,
        "jittered": local_jittered,
        "handed_back": local_handed_back,
        "many": local_many,
    }
    return sum([await chosen[kind](first + n) for n in range(steps)])
