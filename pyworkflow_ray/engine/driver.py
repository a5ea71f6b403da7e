"""The driver of one run: record, then act. The same for production, tests and the simulator.

Pure: inputs are method calls that carry the time, effects are collected and drained by the shell (run actor, simulator,
test environment). Rules:

* A completion may be delivered to the body before it is durable; the commands that follow are appended with it, and
  are dispatched or acknowledged only when they are durable.
* A step that was dispatched has all earlier completions durable before it; `barrier` tells of relaxed ones.
* Notes that nobody waits for (a started attempt) ride with the next append, or alone after `flush_after_s`.
* An outcome of a dispatch that is not the step's current one is dropped: a zombie changes nothing.
* The run parks when nothing is executed and the next thing is due later than `park_after_s`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from pyworkflow_ray.engine import barrier, chunks, known, overdue, pausing
from pyworkflow_ray.engine.calls import ChunkCall, Codec, Outcome, StepCall
from pyworkflow_ray.engine.commands import Append, CancelDispatch, Dispatch, Effect, Finish, Limits, Park, Pause
from pyworkflow_ray.engine.events import (
    TERMINAL,
    AttemptNote,
    BodyAbandoned,
    Event,
    RunActivated,
    RunCancelled,
    RunCancelRequested,
    RunFailed,
    RunParked,
    RunPaused,
    StepCancelled,
    StepCompleted,
    StepDispatched,
    StepFailed,
    StepHandedBack,
    StepLost,
    StepScheduled,
    StepStarted,
    TimerFired,
)
from pyworkflow_ray.engine.history import History, StepState
from pyworkflow_ray.engine.machine import Flow, Machine
from pyworkflow_ray.engine.resources import ask_for
from pyworkflow_ray.errors import UNREADABLE, StepLostError, StepTimeoutError

_RECOVERY_DELAY_S = 0.1  # before the first re-execution of a lost step; doubled for each further one
_RECOVERY_DELAY_MAX_S = 5.0


class Driver(pausing.PausingDriver, known.KnowingDriver):
    """Drives one activation of one run. See the module for its rules and `commands` for its effects.

    Args:
        flow: The bare `async def` of the workflow.
        codec: Encodes and decodes values and errors.
        limits, rng: See `Limits`; jitter of recoveries.
        log: Called with one line for a person, for what deserves a warning.
    """

    def __init__(
        self,
        flow: Flow,
        codec: Codec,
        *,
        limits: Limits | None = None,
        rng: random.Random,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._flow = flow
        self._codec = codec
        self._limits = limits or Limits()
        self._rng = rng
        self._log = log or (lambda line: None)
        self._history = History()
        self._machine: Machine | None = None
        self._effects: list[Effect] = []
        self._gated: deque[tuple[int, Effect]] = deque()  # effects that wait for a seq to be durable
        self._pending: list[Event] = []  # numbered, to be appended by this input
        self._lazy: list[Event] = []  # not numbered yet, ride with the next append
        self._flush_at: float | None = None
        self._durable = self._barrier = -1  # seq; before the barrier's no relaxed step begins
        self._cause = ""  # of this activation
        self._paused_by_hand = False
        self._cancel_deadline: float | None = None
        self._wanted_pause: RunPaused | None = None  # begun once nothing runs
        self._generations: dict[str, int] = {}
        self._warned = False
        self._over = False  # parked, paused, finished or evicted
        self._now = 0.0  # of the input that is being handled

    # Inputs --------------------------------------------------------------------------------------------------

    def activate(self, history: list[Event], activation: RunActivated, now: float) -> None:
        """Take the run up: replay `history` (all accepted events, `run_created` first), go on from its end."""
        self._now = now
        self._history = History.of(history)
        self._cause = activation.cause
        self._durable = self._history.next_seq - 1
        created = self._history.created
        if created is None:
            raise ValueError("a history begins with run_created")
        before = self._history
        if before.ended is not None and not activation.resets:  # it ended, and only its owner's last word was lost
            self._over = True
            self._effects.append(Finish(before.ended))
            return
        recorded = set(before.maps)
        self._note(activation.model_copy(update={"at": now}))
        handed_back = {p for p, s in before.open_steps.items() if s.waiting}
        if before.lost_activations > created.max_recoveries:
            return self._pause("max_recoveries", pausing.lost_too_often(created, before.lost_activations), now)
        self._machine = Machine(self._flow, created, self._codec)
        try:
            fresh = self._machine.replay(before.script, before.first_activated_at or now)
        except Exception as error:
            self._machine.evict()
            return self._pause(*pausing.not_replayed(created, error, now))
        if before.cancel is not None:
            since = before.cancel.at if activation.cause == "wake" else now  # a lost owner must not shorten the grace
            self._cancel_deadline = since + self._limits.cancel_grace_s
        taken_up = [(p, s) for p, s in before.open_steps.items() if p not in before.known]
        self._commands(fresh, now)
        pausing.spread_overdue([s for p, s in taken_up if p in handed_back], self._rng, now)
        for position, step in taken_up:
            if step.ended is None and self._history.ended is None:
                self._take_up(position, step, position in handed_back, activation, now)
        for event in list(self._history.deferred):
            if not self._over and not self._history.ended and event in self._history.deferred:
                self._deliver(event.model_copy(update={"seq": -1, "at": now}), now)
        self._open_chunks(now, recorded - set(activation.resets))
        self._settle(now)

    def record(self, event: AttemptNote, now: float) -> None:
        """A note streamed by a worker; repeated and stale ones are dropped. A cancelled step keeps none."""
        self._now = now
        step = self._current(event.position, event.dispatch)
        if step is None:
            return
        if event.attempt <= step.attempt if isinstance(event, StepStarted) else not step.follows(event):
            return  # what has overtaken others comes with the outcome, in order
        self._note(event.model_copy(update={"at": now}))

    def outcome(self, outcome: Outcome, now: float) -> None:
        """A dispatch ended."""
        self._now = now
        step = self._current(outcome.position, outcome.dispatch)
        if step is None:
            return
        step.dispatched = False
        name = step.event.breaker
        if name is not None:
            self._generations[name] = max(self._generations.get(name, 0), outcome.breaker_generation)
        if step.chunk is not None and outcome.status == "completed" and outcome.chunk is not None:
            self._deliver(chunks.completed(step.chunk, outcome, self._is_last(step), now), now)
            return self._settle(now)
        for attempt in outcome.attempts:
            if not step.has(attempt):
                self._note(step.unseen(attempt).model_copy(update={"at": now}))
        position, dispatch = outcome.position, outcome.dispatch
        if outcome.status == "completed" and outcome.result is not None:
            self._deliver(
                StepCompleted(
                    at=now,
                    position=position,
                    dispatch=dispatch,
                    attempt=outcome.attempt,
                    started_at=outcome.started_at,
                    ended_at=outcome.ended_at,
                    result=outcome.result,
                    breaker=outcome.breaker,
                    worker=outcome.worker,
                    node=outcome.node,
                ),
                now,
            )
        elif outcome.status == "failed" and outcome.error is not None:
            self._fail(step, outcome.attempt, outcome.error, outcome.why, now)
        elif outcome.status == "handed_back" and outcome.retry_at is not None:
            self._note(StepHandedBack(at=now, position=position, dispatch=dispatch, due_at=outcome.retry_at))
        else:  # told to stop by somebody else than this run: as good as lost, and nobody's fault
            self._lose(step, "worker_died", False, "the step was interrupted", now)
        self._settle(now)

    def lost(self, position: str, dispatch: int, *, cause: str, charged: bool, now: float, message: str = "") -> None:
        """The worker of a dispatch is gone."""
        self._now = now
        step = self._current(position, dispatch)
        if step is None:
            return
        started, timeout = step.started_at, step.event.policy.timeout_s
        limits = [step.ends_at(), None if timeout is None or started is None else started + timeout]
        over_at = min((at for at in limits if at is not None), default=None)
        if started is not None and over_at is not None and cause == "worker_died" and now >= over_at:
            self._time_out(step, started, over_at - started, now)
        else:
            self._lose(step, cause, charged, message, now)
        self._settle(now)

    def tick(self, now: float) -> None:
        """Do what is due: timers, in order; retries; the run's deadline; the end of a cancelled run's grace."""
        self._now = now
        if self._over or self._machine is None or self._history.paused is not None:
            return
        # Those that are due now, at the same moment in the order they were started. What they start in turn is for the
        # next tick, however soon: a body that sleeps for next to nothing in a loop must not keep out everything else.
        due = sorted((at, i, p) for i, (p, at) in enumerate(self._history.open_timers.items()) if at <= now)
        for _, _, position in due:
            if position in self._history.open_timers and not self._history.ended:
                self._deliver(TimerFired(at=now, position=position), now)
        deadline = self._deadline()
        if deadline is not None and deadline <= now and self._history.cancel is None and not self._history.ended:
            limit = self._history.created.max_duration_s if self._history.created else None
            self._request_cancel("max_duration", f"the run reached its max_duration of {limit:g} s", now)
        if self._cancel_deadline is not None and self._cancel_deadline <= now and not self._history.ended:
            self._end_by_force(now)
        for step in list(self._history.open_steps.values()):
            if step.waiting and (step.retry_at or 0.0) <= now and not self._history.ended:
                self._dispatch(step)
        self._settle(now)

    def cancel(self, reason: str | None, now: float) -> None:
        """Cancel the run: CancelledError in the body, whose `finally` may await steps for a grace."""
        self._now = now
        if (
            not self._over
            and self._history.ended is None
            and self._history.cancel is None
            and self._machine is not None
        ):
            self._request_cancel("user", reason, now)
            self._settle(now)

    def durable(self, seq: int, now: float) -> None:
        """The store confirmed everything up to `seq`."""
        self._durable = max(self._durable, seq)
        while self._gated and self._gated[0][0] <= self._durable:
            gate, effect = self._gated.popleft()
            if isinstance(effect, Dispatch):
                step = self._current(effect.call.position, effect.call.dispatch)
                if step is None:
                    continue
            elif isinstance(effect, Park):
                if self._history.next_seq - 1 > gate:
                    continue  # something happened meanwhile: settle decides anew
                self._over = True
            elif isinstance(effect, (Pause, Finish)):
                self._over = True
            self._effects.append(effect)

    def evict(self) -> None:
        """Drop the body; from now on nothing is emitted."""
        self._over = True
        if self._machine is not None:
            self._machine.evict()

    # What the shell reads ------------------------------------------------------------------------------------

    def effects(self) -> list[Effect]:
        """The effects since the last call, in order."""
        drained, self._effects = self._effects, []
        return drained

    @property
    def next_due(self) -> float | None:
        """When `tick` must be called next; None: never by itself."""
        if self._over or self._history.ended is not None or self._history.paused is not None:
            return None
        moments = [*self._waits(), self._flush_at, self._cancel_deadline]
        if self._history.cancel is None:
            moments.append(self._deadline())
        return min((m for m in moments if m is not None), default=None)

    @property
    def history(self) -> History:
        """The state so far (read only)."""
        return self._history

    # Inside --------------------------------------------------------------------------------------------------

    def _note(self, event: Event) -> None:
        """An event that rides with the next append. It is numbered now, so that order is the order of happening."""
        event.seq = self._history.next_seq
        self._history.apply(event)
        self._lazy.append(event)
        if not barrier.passes(event, self._history):
            self._barrier = event.seq
        if self._flush_at is None:
            self._flush_at = self._now + self._limits.flush_after_s

    def _command(self, event: Event) -> None:
        self._note(event)
        self._pending.append(event)

    def _deliver(self, event: Event, now: float) -> None:
        self._command(event)
        if self._machine is None:
            return
        try:
            fresh = self._machine.deliver(event)
        except UNREADABLE as error:
            self._machine.evict()
            return self._pause("environment", pausing.unreadable(self._history.created, error), now)
        self._commands(fresh, now)

    def _commands(self, events: list[Event], now: float) -> None:
        for event in events:
            event.at = now
            held = self._held(event.position) if isinstance(event, StepCancelled) else []
            self._command(event)
            if isinstance(event, StepScheduled):
                self._begin(self._history.steps[event.position])
            elif held:
                for position, dispatch in held:
                    self._gate(CancelDispatch(position, dispatch))
            elif isinstance(event, TERMINAL):
                self._gate(Finish(event))

    def _held(self, position: str) -> list[tuple[str, int]]:
        """(position, dispatch) of what is executed of a step or map."""
        places = self._history.chunks_of(position) if position in self._history.maps else [position]
        steps = [(p, self._history.steps[p]) for p in places if p in self._history.steps]
        return [(p, step.dispatch) for p, step in steps if step.dispatched]

    def _open_chunks(self, now: float, recorded: Iterable[str] = ()) -> None:
        """Dispatch what maps have opened. recorded: maps of which an earlier owner may have dispatched it."""
        if self._machine is None or self._over or self._history.ended is not None:
            return
        while opened := self._machine.opened_chunks():
            for chunk in opened:
                known = [s.chunk for s in map(self._history.step, self._history.chunks_of(chunk[0])) if s.chunk]
                for first, count in chunks.uncovered(chunk[1], chunk[2], [(k[1], k[2]) for k in known]):
                    step = self._history.step(chunks.chunk_position(chunk[0], first, count))
                    if chunk[0] in recorded and not step.event.policy.idempotent:
                        self._lose(step, "run_actor_lost", False, "", now)
                    else:
                        self._dispatch(step)
            recorded = ()  # what is opened from now on is new

    def _chunk_call(self, step: StepState) -> ChunkCall | None:
        if step.chunk is None or self._machine is None:
            return None
        position, first, count = step.chunk
        current = self._machine.loop.maps[position]
        return chunks.pack_items(self._codec_at(position), current.items(first, count), first, current.failures_left())

    def _is_last(self, step: StepState) -> bool:
        current = None if step.chunk is None or self._machine is None else self._machine.loop.maps.get(step.chunk[0])
        return step.chunk is not None and current is not None and current.is_last(*step.chunk[1:])

    def _current(self, position: str, dispatch: int) -> StepState | None:
        """The step, when this dispatch of it is the one whose word counts."""
        step = self._history.steps.get(position)
        if self._over or step is None or step.ended is not None or not step.dispatched or step.dispatch != dispatch:
            return None
        return step

    def _gate(self, effect: Effect) -> None:
        """Let `effect` out when everything recorded so far is durable, or what `barrier` asks for."""
        self._gated.append((self._barrier if barrier.is_relaxed(effect) else self._history.next_seq - 1, effect))

    def _dispatch(self, step: StepState) -> None:
        created = self._history.created
        assert created is not None
        if self._is_pausing():
            return self._hold(step)
        ends_at = step.ends_at()
        if ends_at is not None and ends_at <= self._now:
            return self._fail(
                step, step.attempt, overdue.too_late(step, self._codec_at(step.event.position)), "deadline", self._now
            )
        step.dispatch += 1
        event = step.event
        if step.dispatch > 1 or step.waiting or step.attempt or step.recoveries:
            policy = self._policy_from_here_on(event.position)
            self._command(StepDispatched(at=self._now, position=event.position, dispatch=step.dispatch, policy=policy))
            event = step.event
        step.dispatched, step.waiting, step.started_at = True, False, None
        step.first_attempt = step.attempt + 1
        call = StepCall(
            run_id=created.run_id,
            run_uid=created.run_uid,
            storage_id=created.storage_id,
            generation=created.generation,
            workflow=created.workflow,
            position=event.position,
            number=event.number,
            epoch=self._history.epoch,
            dispatch=step.dispatch,
            step=event.step,
            code=event.code,
            args=event.args,
            kwargs=event.kwargs,
            policy=event.policy,
            executor=event.executor,
            ray_options=ask_for(event.ray_options, step.out_of_memory),
            breaker=event.breaker,
            breaker_settings=created.breaker_options(event.breaker),
            breaker_generation=self._generations.get(event.breaker, 0) if event.breaker else 0,
            first_attempt=step.attempt + 1,
            retries_used=step.retries_used,
            previous=list(step.previous),
            not_before=step.retry_at,
            began_at=step.began_at,
            deadline=None if event.compensates else self._deadline(),
            trace_id=created.trace_id,
            chunk=self._chunk_call(step),
            budget_settings=created.budgets.get(event.policy.retry_budget) if event.policy.retry_budget else None,
            kinds=created.kinds,
            hooks=created.hooks,
            traceparent=created.traceparent,
            attributes=created.attributes,
        )
        self._gate(Dispatch(call))

    def _take_up(self, position: str, step: StepState, waited: bool, activation: RunActivated, now: float) -> None:
        """An open step of an earlier activation: its worker died with its owner, or nobody had it."""
        if position in activation.resets:
            return self._dispatch(step)
        if waited:
            step.waiting = True
            if (step.retry_at or 0.0) <= now:
                self._dispatch(step)
            return
        if step.verdict is not None:  # the last attempt was recorded, the end that follows from it was not
            most = step.event.policy.max_retries
            why = "permanent" if most is None or step.retries_used <= most else "exhausted"
            return self._fail(step, step.attempt, step.verdict.error, step.verdict.why or why, now)
        self._lose(step, "run_actor_lost", False, "", now)

    def _lose(self, step: StepState, cause: str, charged: bool, message: str, now: float) -> None:
        event, policy = step.event, step.event.policy
        exhausted = step.recoveries + charged > policy.max_recoveries
        retry_at: float | None = None
        if policy.idempotent and not exhausted:
            retry_at = max(now, step.retry_at or 0.0)
            if charged:
                delay = min(_RECOVERY_DELAY_MAX_S, _RECOVERY_DELAY_S * 2.0 ** min(step.recoveries, 20))
                retry_at = max(retry_at, now + delay * self._rng.uniform(0.5, 1.0))
        dispatch = step.dispatch
        parts: list[tuple[int, int]] = []
        if step.chunk is not None and charged and retry_at is not None and step.chunk[2] > 1:
            parts = chunks.divide(step.chunk[1], step.chunk[2], step.recoveries + 1, policy.max_recoveries)
        self._note(
            StepLost(
                at=now,
                position=event.position,
                dispatch=dispatch,
                attempt=step.attempt or None,
                cause=cause,
                charged=charged,
                retry_at=retry_at,
                message=message,
                parts=parts,
            )
        )
        if parts and step.chunk is not None:
            for first, count in parts:
                part = self._history.step(chunks.chunk_position(step.chunk[0], first, count))
                if part.waiting and (part.retry_at or 0.0) <= now:
                    self._dispatch(part)
            return
        if retry_at is None:
            why = (
                f"its worker was lost {step.recoveries} times (max_recoveries={policy.max_recoveries})"
                if policy.idempotent
                else "it is not idempotent, so it is not executed again"
            )
            error = StepLostError(
                f"the outcome of step {event.step!r} (position {event.position}) is unknown, "
                f"{cause.replace('_', ' ')}: {why}" + (f". {message}" if message else "")
            )
            self._fail(step, step.attempt, self._codec_at(event.position).encode_error(error, "permanent"), "lost", now)
        elif retry_at <= now:
            self._dispatch(step)

    def _time_out(self, step: StepState, started: float, timeout: float, now: float) -> None:
        """The worker ended itself because an attempt stood still past its timeout: a failed attempt, not a loss."""
        deadline = min((at for at in (self._deadline(), step.ends_at()) if at is not None), default=None)
        codec = self._codec_at(step.event.position)
        record, final, why = overdue.stuck(step, started, timeout, now, self._rng, deadline, codec)
        self._note(record)
        if record.retry_at is None:
            return self._fail(step, record.attempt, final, why, now)
        position, dispatch = step.event.position, step.dispatch
        self._note(StepHandedBack(at=now, position=position, dispatch=dispatch, due_at=record.retry_at))
        if record.retry_at <= now:
            self._dispatch(step)

    def _fail(self, step: StepState, attempt: int, error: Any, why: str, now: float) -> None:
        if self._history.cancel is None and pausing.pauses(step, why):
            if self._wanted_pause is None and self._history.created is not None:
                self._wanted_pause = pausing.exhausted(self._history.created, step, error, why, now)
            return
        if step.chunk is not None:
            lost = chunks.failed(step.chunk, step.dispatch, attempt, error, why, self._is_last(step), now)
            return self._deliver(lost, now)
        self._deliver(
            StepFailed(
                at=now, position=step.event.position, dispatch=step.dispatch, attempt=attempt, error=error, why=why
            ),
            now,
        )

    def _request_cancel(self, cause: Any, reason: str | None, now: float) -> None:
        self._cancel_deadline = now + self._limits.cancel_grace_s
        self._deliver(RunCancelRequested(at=now, cause=cause, reason=reason), now)

    def _end_by_force(self, now: float) -> None:
        """The body did not end within its grace: it ends here, and what it still runs is cancelled.

        Its compensations are not bound to the grace: they go on, or begin now.
        """
        if self._machine is not None and (self._machine.saga.running or self._machine.saga):
            self._cancel_deadline = None
            if not self._machine.saga.running:
                self._deliver(BodyAbandoned(at=now), now)
            return
        cancel = self._history.cancel
        open_steps = dict.fromkeys(p if s.chunk is None else s.chunk[0] for p, s in self._history.open_steps.items())
        events: list[Event] = [StepCancelled(position=p, forced=True) for p in open_steps]
        if cancel is not None and cancel.cause == "max_duration":
            late = StepTimeoutError(cancel.reason or "the run reached its max_duration")
            events.append(RunFailed(error=self._codec_at("").encode_error(late, "timeout")))
        else:
            events.append(RunCancelled(reason=cancel.reason if cancel else None))
        if self._machine is not None:
            self._machine.evict()
        self._commands(events, now)

    def _pause(self, reason: Any, message: str, now: float, details: dict[str, Any] | None = None) -> None:
        event = RunPaused(at=now, reason=reason, message=message, details=details or {})
        self._command(event)
        self._gated.clear()
        self._gate(Pause(event))
        self._flush()

    def _deadline(self) -> float | None:
        created = self._history.created
        if created is None or created.max_duration_s is None:
            return None
        return created.at + created.max_duration_s

    def _settle(self, now: float) -> None:
        """After an input: limits, parking, and one append of all that is ready."""
        if self._over:
            return
        self._recall(now)
        self._open_chunks(now)
        history = self._history
        if history.ended is None and history.counted >= self._limits.max_events:
            run_id = history.created.run_id if history.created else ""
            return self._pause(
                "event_limit",
                f"run {run_id!r} is paused: it has {history.counted} events (max_events={self._limits.max_events}). "
                f"If that is meant: pyworkflow-ray runs resume {run_id}",
                now,
            )
        if not self._warned and history.counted >= self._limits.warn_events:
            self._warned = True
            self._log(f"run {history.created.run_id if history.created else ''} has {history.counted} events")
        if history.ended is None and not any(s.dispatched for s in history.open_steps.values()):
            if self._is_pausing():
                return self._pause_now(now)
            self._wait_or_park(now)
        if self._pending or self._gated or (self._flush_at is not None and self._flush_at <= now):
            self._flush()

    def _wait_or_park(self, now: float) -> None:
        waits = self._waits()
        if not waits:
            if self._history.cancel is None and self._machine is not None and self._machine.waits_for_nothing():
                self._pause(
                    "code",
                    "the workflow waits for something that no step and no timer will ever bring "
                    "(an Event or Future that nothing sets)",
                    now,
                )
            return
        deadline = self._deadline() if self._history.cancel is None else None
        due = min(m for m in (*waits, deadline, self._cancel_deadline) if m is not None)
        parked = any(isinstance(effect, Park) and gate == self._history.next_seq - 1 for gate, effect in self._gated)
        if due - now > self._limits.park_after_s and not parked:
            event = RunParked(at=now, due_at=due)
            self._command(event)
            self._gate(Park(due))

    def _flush(self) -> None:
        self._flush_at = None
        self._pending = []
        if self._lazy:
            self._effects.append(Append(tuple(self._lazy)))
            self._lazy = []
        if self._gated and self._gated[0][0] <= self._durable:
            self.durable(self._durable, 0.0)
