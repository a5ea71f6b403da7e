"""Executes one step call: decodes its arguments, makes its attempts, encodes its outcome.

Called by the step host in a Ray task's main thread (`execute_call`), and by local steps and the test environment on a
running loop (`execute_call_async`); calls `attempts` through `perform`. What ends a call:

* the function's value, its last failure, a wait too long to be done here (handed back), or the interrupt;
* what is no Exception and was not asked for by us (SystemExit, KeyboardInterrupt, a CancelledError of the step's own)
  fails the step at once: the workflow gets a `StepFailedError` naming it, for in the workflow's own process it would
  end that process, or look like the run's cancellation;
* a timeout or cancel that user code does not obey ends the process (`kill_stuck`); its owner reports that attempt.

Faults: arguments that can't be decoded, or a result that can't be encoded, fail the step for good.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from pyworkflow_ray.engine.calls import Codec, Outcome, StepCall
from pyworkflow_ray.engine.chunks import parse_position
from pyworkflow_ray.engine.events import AttemptNote, ErrorInfo
from pyworkflow_ray.errors import StepFailedError
from pyworkflow_ray.execution.attempts import Ended, FailedAttempt, Guard, Plan, RunAttempt, attempts, message_of
from pyworkflow_ray.execution.budgets import Budget, budget_of
from pyworkflow_ray.execution.context import StepContext, instant, scope_of
from pyworkflow_ray.execution.definitions import StepDefinition
from pyworkflow_ray.execution.hooks import RetryEvent, adopt_hooks, hooked, tell
from pyworkflow_ray.execution.interrupt import Interrupt
from pyworkflow_ray.execution.perform import Work, drive, drive_async
from pyworkflow_ray.execution.records import Failure, Records
from pyworkflow_ray.execution.same_errors import encoded_once
from pyworkflow_ray.execution.worker_loop import WorkerLoop, worker_loop
from pyworkflow_ray.resilience.taxonomy import Kind, adopt_kinds, classify

Report = Callable[[AttemptNote], None]

RNG = random.Random()
os.register_at_fork(after_in_child=RNG.seed)


def execute_call(
    call: StepCall,
    step: StepDefinition,
    codec: Codec,
    *,
    report: Report,
    interrupt: Interrupt,
    breaker: Guard | None = None,
    wait_max_s: float = 1.0,
    worker: str = "",
    node: str = "",
    clock: Callable[[], float] = time.time,
    rng: random.Random = RNG,
    kill_stuck: bool = True,
    loop: WorkerLoop | None = None,
    confirmed: Callable[[], int] | None = None,
    starts: bool = True,
    gather_s: float = 0.0,
    hold: Callable[[Records], None] | None = None,
) -> Outcome:
    """Make the attempts of one dispatch, blocking the calling thread: a step worker's main thread, or one of a run
    actor's for a local step (several at once share the process's loop).

    Args:
        report: Gets each StepStarted and AttemptFailed as it happens; must not block for long, nor raise.
        interrupt: Cancels what runs, from any thread.
        breaker: The step's breaker, as this process sees it.
        wait_max_s: Longest wait between attempts that is slept here; a longer one hands the call back.
        kill_stuck: End the process where user code does not stop 2 s after its timeout or the interrupt. Only for
            step workers; never for local steps, of which a sync one runs to its end and an async one is abandoned.
        loop: Where async steps run; None: this process's lasting loop.
        confirmed: Number of the last attempt whose record the owner has; records up to it are left out of the outcome.
        starts: Whether the starts of attempts are reported.
        gather_s: Attempts that follow each other fast are reported together, once in so many seconds; 0: each.
        hold: Given the records, whose `take` any thread may call to report them sooner.
    """
    if call.chunk is not None:
        from pyworkflow_ray.execution.chunks import execute_chunk

        about = {"worker": worker, "node": node, "clock": clock, "rng": rng, "kill_stuck": kill_stuck, "loop": loop}
        return execute_chunk(
            call,
            step,
            codec,
            interrupt=interrupt,
            breaker=breaker,
            wait_max_s=wait_max_s,
            **about,  # type: ignore[arg-type]
        )
    execution = Execution(call, step, codec, report, worker, node, clock, rng, gather_s=gather_s)
    if hold is not None:
        hold(execution.records)
    try:
        function = execution.function()
    except Exception as error:
        return execution.broken(error)
    work = execution.work(function, breaker, interrupt)
    work.kill_stuck = kill_stuck and call.executor == "task"
    work.owns_loop = True
    if step.is_async:
        work.loop = loop or worker_loop()
    plan = execution.plan(breaker, interrupt, wait_max_s)
    if not starts:
        plan.on_started = None
    ended = drive(attempts(plan), work)
    return execution.outcome(ended, breaker, confirmed)


async def execute_call_async(
    call: StepCall,
    step: StepDefinition,
    codec: Codec,
    *,
    report: Report,
    interrupt: Interrupt | None = None,
    breaker: Guard | None = None,
    wait_max_s: float | None = None,
    worker: str = "",
    node: str = "",
    clock: Callable[[], float] = time.time,
    rng: random.Random = RNG,
    sleep: Callable[[float], Any] = time.sleep,
    settle: Callable[[], Awaitable[None]] | None = None,
    owns_loop: bool = False,
    confirmed: Callable[[], int] | None = None,
    starts: bool = True,
    gather_s: float = 0.0,
) -> Outcome:
    """As `execute_call`, on the running event loop: for local steps, and for the test environment.

    Waits and timeouts of async steps follow the loop's own clock, so that a virtual one works. A sync step blocks the
    loop while it runs. Cancelling the awaiting task cancels the step, and is raised.

    Args:
        wait_max_s: None: every wait is waited here.
        sleep: What `pw.sleep` does in a sync step.
        settle: Awaited after each attempt of a sync step, which may have slept in virtual time.
        owns_loop: The loop runs steps only: what a step leaves running is cancelled.
    """
    if call.chunk is not None:
        from pyworkflow_ray.execution.chunks import execute_chunk_async

        about = {"worker": worker, "node": node, "clock": clock, "rng": rng, "sleep": sleep, "settle": settle}
        return await execute_chunk_async(
            call,
            step,
            codec,
            interrupt=interrupt,
            breaker=breaker,
            wait_max_s=wait_max_s,
            owns_loop=owns_loop,
            **about,  # type: ignore[arg-type]
        )
    execution = Execution(call, step, codec, report, worker, node, clock, rng, sleep, gather_s)
    try:
        function = execution.function()
    except Exception as error:
        return execution.broken(error)
    work = execution.work(function, breaker, interrupt)
    work.owns_loop, work.settle = owns_loop, settle
    plan = execution.plan(breaker, interrupt, wait_max_s)
    if not starts:
        plan.on_started = None
    ended = await drive_async(attempts(plan), work)
    return execution.outcome(ended, breaker, confirmed)


class Execution:
    """One dispatch: what its parts need of the call, and the records it has made."""

    def __init__(
        self,
        call: StepCall,
        step: StepDefinition,
        codec: Codec,
        report: Report,
        worker: str,
        node: str,
        clock: Callable[[], float],
        rng: random.Random,
        sleep: Callable[[float], Any] = time.sleep,
        gather_s: float = 0.0,
    ) -> None:
        self.call = call
        self.step = step
        place = parse_position(call.position)
        self.codec = codec.at(call.run_id, call.position if place is None else place[0])
        self.worker = worker
        self.node = node
        self.clock = clock
        self.rng = rng
        self.sleep = sleep
        adopt_kinds(call.kinds)
        adopt_hooks(call.hooks, codec.for_code().decode)
        self.scope = scope_of(call)
        self.key = self.scope.key
        self.records = Records(call.position, call.dispatch, worker=worker, node=node, report=report, gather_s=gather_s)
        self.budget: Budget | None = None
        self._unusable: Exception | None = None
        try:
            self.budget = budget_of(call.step, call.policy.retry_budget, call.budget_settings)
        except Exception as error:  # raised where the call is begun
            self._unusable = error

    def function(self) -> Callable[[], Any]:
        """The user's function with its arguments."""
        if self._unusable is not None:
            raise self._unusable
        args = [self.codec.decode(payload) for payload in self.call.args]
        kwargs = {name: self.codec.decode(payload) for name, payload in self.call.kwargs.items()}
        fn = self.step.fn
        return lambda: fn(*args, **kwargs)

    def plan(self, breaker: Guard | None, interrupt: Interrupt | None, wait_max_s: float | None) -> Plan:
        call = self.call
        return Plan(
            step=call.step,
            policy=call.policy,
            clock=self.clock,
            rng=self.rng,
            retry_on=self.step.retry_on,
            no_retry_on=self.step.no_retry_on,
            delay_of=self.step.delay_of,
            guarded=breaker is not None,
            patient=breaker is not None and call.policy.on_open == "wait",
            budget=None if self.budget is None else self.budget.name,
            first_attempt=call.first_attempt,
            retries_used=call.retries_used,
            previous=[dataclasses.replace(p, message=self.codec.readable(p.message)) for p in call.previous],
            not_before=call.not_before,
            began_at=call.began_at,
            deadline=call.deadline,
            wait_max_s=wait_max_s,
            accept=self.codec.encode,
            on_started=self.records.started,
            on_failed=self.failed,
            cancelled=bool if interrupt is None else lambda: interrupt.cancelled,
            where=f"run {call.run_id}",
        )

    def work(self, function: Callable[[], Any], breaker: Guard | None, interrupt: Interrupt | None) -> Work:
        return Work(
            step=self.call.step,
            function=function,
            is_async=self.step.is_async,
            context=self.context,
            total_timeout_s=self.call.policy.total_timeout_s,
            guard=breaker,
            budget=self.budget,
            interrupt=interrupt,
        )

    def context(self, command: RunAttempt) -> StepContext:
        call = self.call
        timeout_s = command.timeout_s
        ends = [at for at in (call.deadline, timeout_s and command.started_at + timeout_s) if at is not None]
        return StepContext(
            name=call.step,
            attempt=command.attempt,
            idempotency_key=self.key,
            fence=(call.epoch, call.dispatch, command.attempt),
            run_id=call.run_id,
            deadline=instant(min(ends, default=None)),
            previous=command.previous,
            workflow=call.workflow,
            trace_id=call.trace_id,
            traceparent=call.traceparent,
            attributes=call.attributes,
            position=call.position,
            _is_async=self.step.is_async,
            _scope=self.scope,
            _clock=self.clock,
            _sleep=self.sleep,
        )

    def failed(self, failure: FailedAttempt) -> None:
        self.records.failed(
            Failure(
                failure.attempt,
                failure.started_at,
                failure.ended_at,
                self.error_info(failure.error, failure.kind),
                failure.delay_s,
                failure.delay_reason,
                failure.retry_at,
                failure.breaker,
                failure.why,
            )
        )
        if failure.delay_s is not None and hooked("retry"):
            call = self.call
            tell_retry(failure, call.step, call.run_id, call.workflow, call.position)

    def error_info(self, error: BaseException, kind: Kind | None = None) -> ErrorInfo:
        _trim(error)
        kind = kind or classify(error)
        return encoded_once(_raisable(error), kind, self.codec, self.codec.encode_error)

    def broken(self, error: Exception) -> Outcome:
        """The call could not be begun: the workflow's data or code are not what this process can use."""
        outcome = self.new_outcome("failed", self.call.first_attempt)
        outcome.error, outcome.why = self.error_info(error), "code"
        outcome.started_at = outcome.ended_at = self.clock()
        return outcome

    def outcome(self, ended: Ended, breaker: Guard | None, confirmed: Callable[[], int] | None) -> Outcome:
        outcome = self.new_outcome(ended.status, ended.attempt)
        known = 0 if confirmed is None else confirmed()
        outcome.attempts = self.records.all(after=known)
        outcome.started_at, outcome.ended_at = ended.started_at, ended.ended_at
        outcome.breaker, outcome.retry_at, outcome.why = ended.breaker, ended.retry_at, ended.why
        if breaker is not None:
            outcome.breaker_generation = breaker.generation
        if ended.status == "completed":
            outcome.result = ended.value
        elif ended.error is not None:
            outcome.error = self.error_info(ended.error)
        return outcome

    def new_outcome(self, status: Any, attempt: int) -> Outcome:
        return Outcome(
            position=self.call.position,
            dispatch=self.call.dispatch,
            status=status,
            attempt=attempt,
            worker=self.worker,
            node=self.node,
        )


def tell_retry(
    failure: FailedAttempt, step: str, run_id: str | None, workflow: str | None, position: str | None
) -> None:
    """Another attempt follows this one: tell the hooks."""
    event = RetryEvent(
        step=step,
        attempt=failure.attempt,
        kind=failure.kind,
        error=failure.error,
        delay=failure.delay_s or 0.0,
        reason=failure.delay_reason or "",
        run_id=run_id,
        workflow=workflow,
        position=position,
    )
    tell("retry", event)


def _raisable(error: BaseException) -> BaseException:
    """The error for the workflow: itself, or a `StepFailedError` for what is no Exception."""
    if isinstance(error, Exception):
        return error
    failed = StepFailedError(
        message_of(error) or "it ended the step", type=f"{type(error).__module__}.{type(error).__qualname__}"
    )
    failed.__traceback__ = error.__traceback__
    for note in getattr(error, "__notes__", []):
        failed.add_note(note)
    return failed


def _trim(error: BaseException) -> None:
    """Leave our own frames out of a traceback: it begins with the user's function."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__package__") == __package__:
        trace = trace.tb_next
    if trace is not None:
        error.__traceback__ = trace
