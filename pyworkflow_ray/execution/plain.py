"""A step called outside a workflow: the function itself, with the step's retries, timeout and breaker.

Called by `step.Step`; calls `attempts` through `perform`. Rules:

* nothing is recorded and no wait is handed back; the waits block the caller (of an async step: the caller's task);
* the value is the function's own object, the exception the last attempt's own, with a note an attempt;
* cancellation, KeyboardInterrupt and SystemExit pass through at once;
* a `def` step with a timeout must be called in the main thread, where a signal can interrupt it.

Called inside a step it runs inline: its own policy holds, and its idempotency key derives from its caller's.
"""

from __future__ import annotations

import contextvars
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.attempts import Ended, FailedAttempt, Guard, Plan, RunAttempt, attempts
from pyworkflow_ray.execution.breakers import CircuitGuard, declared, kept_apart
from pyworkflow_ray.execution.budgets import budget_of
from pyworkflow_ray.execution.context import StepContext, instant, no_sleep, plain_scope, running_step
from pyworkflow_ray.execution.definitions import StepDefinition
from pyworkflow_ray.execution.hooks import hooked
from pyworkflow_ray.execution.perform import Work, drive, drive_async
from pyworkflow_ray.execution.worker import RNG, tell_retry

_no_waits: contextvars.ContextVar[bool] = contextvars.ContextVar("pyworkflow_ray_no_waits", default=False)


@contextmanager
def waits_removed() -> Iterator[None]:
    """Plain calls in this context try again at once (`testing.no_waits`)."""
    token = _no_waits.set(True)
    try:
        yield
    finally:
        _no_waits.reset(token)


def call_plain(step: StepDefinition, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The step's value; of an `async def` step a coroutine that gives it. Arguments are validated already.

    Raises:
        ConfigurationError: a `def` step with a timeout is called off the main thread, or its breaker is unknown here.
        StepLostError: an attempt of a step with `idempotent=False` was stopped by its timeout.
        CircuitOpenError: the step's breaker refused an attempt.
        Exception: of the last attempt, itself.
    """
    call = _PlainCall(step, args, kwargs)
    if step.is_async:
        return call.run_async()
    return call.run()


class _PlainCall:
    def __init__(self, step: StepDefinition, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.step = step
        self.args = args
        self.kwargs = kwargs
        # numbered when called, not when awaited: the calls of one `gather` keep their order in every attempt
        self.scope, self.fence = plain_scope()
        self.outer = running_step()
        self.clock: Callable[[], float] = self.outer._clock if self.outer is not None else time.time
        self.sleep: Callable[[float], Any] = self.outer._sleep if self.outer is not None else time.sleep
        if _no_waits.get():
            self.sleep = no_sleep

    def run(self) -> Any:
        guard = guard_of(self.step)
        return _value(drive(attempts(self.plan(guard)), self.work(guard)))

    async def run_async(self) -> Any:
        guard = guard_of(self.step)
        return _value(await drive_async(attempts(self.plan(guard)), self.work(guard)))

    def plan(self, guard: Guard | None) -> Plan:
        step = self.step
        return Plan(
            step=step.name,
            policy=step.policy,
            clock=self.clock,
            rng=RNG,
            retry_on=step.retry_on,
            no_retry_on=step.no_retry_on,
            delay_of=step.delay_of,
            deadline=_end_of(self.outer),
            on_failed=self.failed if hooked("retry") else None,
            guarded=guard is not None,
            patient=guard is not None and step.policy.on_open == "wait" and not _no_waits.get(),
            budget=step.policy.retry_budget,
            where=f"run {self.outer.run_id}" if self.outer is not None and self.outer.run_id else "",
        )

    def work(self, guard: Guard | None) -> Work:
        return Work(
            step=self.step.name,
            function=lambda: self.step.fn(*self.args, **self.kwargs),
            is_async=self.step.is_async,
            context=self.context,
            total_timeout_s=self.step.policy.total_timeout_s,
            guard=guard,
            budget=budget_of(self.step.name, self.step.policy.retry_budget),
            sleep=self.sleep,
            waits=not _no_waits.get(),
            passes_through=True,
        )

    def failed(self, failure: FailedAttempt) -> None:
        outer = self.outer
        if failure.delay_s is not None and outer is not None:
            tell_retry(failure, self.step.name, outer.run_id, outer.workflow, outer.position)
        elif failure.delay_s is not None:
            tell_retry(failure, self.step.name, None, None, None)

    def context(self, command: RunAttempt) -> StepContext:
        outer, timeout_s = self.outer, command.timeout_s
        deadline = instant(None if timeout_s is None else command.started_at + timeout_s)
        if outer is not None and outer.deadline is not None:
            deadline = outer.deadline if deadline is None else min(deadline, outer.deadline)
        return StepContext(
            name=self.step.name,
            attempt=command.attempt,
            idempotency_key=self.scope.key,
            fence=(*self.fence, command.attempt),
            run_id=outer.run_id if outer is not None else None,
            deadline=deadline,
            previous=command.previous,
            workflow=outer.workflow if outer is not None else None,
            trace_id=outer.trace_id if outer is not None else "",
            attributes=outer.attributes if outer is not None else {},
            position=outer.position if outer is not None else None,
            _is_async=self.step.is_async,
            _scope=self.scope,
            _clock=self.clock,
            _sleep=self.sleep,
        )


def _end_of(outer: StepContext | None) -> float | None:
    """UNIX time at which the step that makes the call is stopped: no wait that ends later is begun."""
    return None if outer is None or outer.deadline is None else outer.deadline.timestamp()


def guard_of(step: StepDefinition) -> Guard | None:
    """The breaker of a step that is called plainly, as this process sees it.

    Raises:
        ConfigurationError: it is given by a name that nothing here has declared.
    """
    breaker = step.breaker
    if breaker is None:
        return None
    if not isinstance(breaker, str):
        guard: Guard = breaker.guard()
        return guard
    found = declared(breaker)
    if found is None:
        raise ConfigurationError(
            f"step {step.name!r} has breaker={breaker!r}, and no CircuitBreaker of that name is declared in this "
            "process: make one, CircuitBreaker(name=...), before the call"
        )
    apart = kept_apart(found)
    if apart is not None:
        return CircuitGuard(apart)
    # the cluster's breaker where one is joined; looked up, never imported: a plain script needs no Ray
    ray = sys.modules.get("ray")
    links = sys.modules.get("pyworkflow_ray.runtime.breaker_actor")
    if links is not None and ray is not None and ray.is_initialized():
        return CircuitGuard(links.link_for(found))
    return CircuitGuard(found.local)


def _value(ended: Ended) -> Any:
    if ended.error is not None:
        try:
            raise ended.error
        finally:
            del ended  # no cycle of frame and exception
    return ended.value
