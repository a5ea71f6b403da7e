"""Runs one workflow on a virtual clock, with a schedule of delays, crashes, losses and duplicates decided by a seed.

The driver, the machine and the codec are those of production; store, clock and workers are simulated. Faults that may
strike, each counted in `Simulation.struck`:

* crash: the owner dies at any moment; a prefix of its unacknowledged events survives; its workers die with it;
* lost: a worker dies in mid-step (a charged recovery), before or after the step's effect;
* duplicate: an outcome or attempt record is delivered twice, or again after its dispatch was replaced;
* together: attempt records that are told together, in part before the outcome, in part with it;
* slow_sync: an append stays unacknowledged for long; late: steps end in any order;
* wake: a person wakes the run at any moment; resume: one who has mended what it failed of, or paused at (its limit of
  events), has it go on; cancel: one cancels it, whatever its body does then.

Invariants that hold while it runs: nothing is dispatched before it is durable, a completed step is never executed
again, and a step that is not idempotent is never executed again where an outcome of it is unknown.

What is not simulated: torn and damaged bytes, two living owners (tests of the journal do that).
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pyworkflow_ray.engine.calls import Codec, Outcome, StepCall
from pyworkflow_ray.engine.commands import Append, CancelDispatch, Dispatch, Effect, Finish, Limits, Park, Pause
from pyworkflow_ray.engine.driver import Driver
from pyworkflow_ray.engine.events import (
    AttemptFailed,
    AttemptNote,
    AttemptsFailed,
    CodeEnvironment,
    CodeRef,
    Event,
    RunActivated,
    RunCreated,
    RunPaused,
    StepCompleted,
    StepDispatched,
    StepScheduled,
    StepStarted,
)
from pyworkflow_ray.engine.history import History, failed_positions
from pyworkflow_ray.execution.records import Failure, Records
from pyworkflow_ray.resilience.retry import Retry, Stop, decide
from pyworkflow_ray.resilience.taxonomy import classify
from pyworkflow_ray.storage.codec import StorageCodec
from pyworkflow_ray.storage.protection import CodecHook
from pyworkflow_ray.testing.blobs import MemoryBlobs
from pyworkflow_ray.testing.memory_store import MemoryStore

RUN_ID = "simulated"
START_AT = 1_700_000_000.0


@dataclass(slots=True, frozen=True)
class Faults:
    """How often each fault strikes, as probabilities a chance: 0 switches it off."""

    crash: float = 0.0  # a handled event of the simulation
    wake: float = 0.0  # likewise
    lost: float = 0.0  # a dispatched step
    duplicate: float = 0.0  # a message of a worker
    max_crashes: int = 30


@dataclass(slots=True)
class Simulation:
    """What came of it. `executions`: (position, value of the step's arguments) of each time a step's function ran."""

    seed: int
    events: list[Event] = field(default_factory=list)
    ended: Event | None = None
    paused: RunPaused | None = None
    executions: list[tuple[str, str]] = field(default_factory=list)
    struck: Counter[str] = field(default_factory=Counter)
    trace: list[str] = field(default_factory=list)
    clock_s: float = 0.0


class Simulator:
    """Simulates one run of `flow`, an undecorated or decorated workflow whose steps are decorated functions.

    Args:
        flow: The workflow function, or an object with `.fn`.
        steps: The functions of its steps by registered name: called with the decoded arguments, one call an attempt.
        seed: Decides everything that is left to chance: the same seed, the same simulation, bit for bit.
        cancel_at: Seconds after the start at which the run is cancelled; None: never.
        mend: Called before a run that failed, or paused at its limit of events, is resumed; None: it is not.
    """

    hook: ClassVar[CodecHook | None] = None  # what values pass through, as of every simulator

    def __init__(
        self,
        flow: Any,
        steps: dict[str, Callable[..., Any]],
        *,
        args: tuple[Any, ...] = (),
        seed: int = 0,
        faults: Faults | None = None,
        limits: Limits | None = None,
        cancel_at: float | None = None,
        mend: Callable[[], None] | None = None,
        max_duration_s: float | None = None,
        max_recoveries: int = 10_000,
    ) -> None:
        self._flow = getattr(flow, "fn", flow)
        self._steps = steps
        self._rng = random.Random(seed)
        self._faults = faults or Faults()
        self._limits = limits or Limits()
        self._cancel_at = cancel_at
        self._mend = mend
        self._done: dict[str, tuple[str, str]] = {}  # what had completed after a failure that a resume took back
        self._records: dict[tuple[int, str, int], Records] = {}  # of each dispatch
        self._unknown: set[str] = set()  # positions of steps that may not be executed again
        self.codec: Codec = StorageCodec(MemoryBlobs(), hook=self.hook)
        self.store = MemoryStore()
        self.result = Simulation(seed)
        self._now = START_AT
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._driver: Driver | None = None
        self._epoch = -1
        self._tick_at: float | None = None
        self._parked = False
        created = RunCreated(
            at=START_AT,
            run_id=RUN_ID,
            run_uid="0" * 32,
            storage_id="1" * 32,
            workflow="simulated",
            code=CodeRef(how="import", name="simulated"),
            environment=CodeEnvironment(key="simulated", python="3.11"),
            args=[self.codec.at(RUN_ID).encode(value) for value in args],
            max_duration_s=max_duration_s,
            max_recoveries=max_recoveries,
            trace_id="2" * 32,
        )
        created.seq = 0
        self.store.append((created,))
        self.store.sync()

    def run(self, max_events: int = 200_000) -> Simulation:
        """Simulate until the run has ended or is paused.

        Raises:
            AssertionError: it hangs: nothing is left to happen, or far too much happened. The message has the seed.
        """
        self._activate("start", False)
        if self._cancel_at is not None:
            self._at(self._cancel_at, self._cancel)
        handled = 0
        while not self._is_over():
            handled += 1
            if not self._queue or handled > max_events:
                raise AssertionError(f"seed {self.result.seed}: the run hangs after {handled} events at {self._now}")
            at, _, action = heapq.heappop(self._queue)
            self._now = max(self._now, at)
            action()
            if not self._is_over():
                self._maybe_wake()
                self._maybe_crash()
            if self._is_over() and self._mend is not None:
                self._resume_later(self._mend)
        self.result.events = self.store.events()
        self.result.clock_s = self._now - START_AT
        return self.result

    def _is_over(self) -> bool:
        return self.result.ended is not None or self.result.paused is not None

    # The world -----------------------------------------------------------------------------------------------

    def _at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self._now + delay, next(self._order), action))

    def _wake(self, epoch: int) -> None:
        if self._parked and epoch == self._epoch:
            self._activate("wake", False)

    def _activate(
        self,
        cause: Any,
        charged: bool,
        *,
        resets: list[str] | None = None,
        then: Callable[[Driver], None] | None = None,
    ) -> None:
        self._epoch += 1
        self._parked = False
        self._tick_at = None
        self._driver = driver = Driver(self._flow, self.codec, limits=self._limits, rng=self._rng)
        activation = RunActivated(epoch=self._epoch, cause=cause, charged=charged, resets=resets or [])
        events = self.store.events()
        if resets:  # what was begun after the failure never happened, but what completed is not executed again
            before = History.of(events)
            history = History.of([*events, activation.model_copy(update={"seq": len(events)})])
            self.store.completed &= completed_steps(history)
            self._unknown &= history.steps.keys()
            calls = {p: before.steps[p].event for p in completed_steps(before) - history.steps.keys()}
            self._done = {p: (call.step, repr(call.args)) for p, call in calls.items()}
        driver.activate(events, activation, self._now)
        if then is not None:
            then(driver)
        self._act(driver)

    def _maybe_wake(self) -> None:
        driver = self._driver
        if (driver is None and not self._parked) or self._rng.random() >= self._faults.wake:
            return
        self.result.struck["wake"] += 1
        if driver is None:
            self._activate("wake", False, then=lambda d: d.wake(self._now))
        else:
            self._with(driver, lambda d: d.wake(self._now))

    def _resume_later(self, mend: Callable[[], None]) -> None:
        """A person looks at a run that failed or is paused, mends what it needs, and resumes it."""
        events = self.store.events()
        resets = failed_positions(events)
        if self.result.paused is None and not resets:
            return
        if self.result.struck["resume"] >= self._faults.max_crashes:
            return
        self.result.struck["resume"] += 1
        self.result.trace.append(f"{self._now - START_AT:.6f} resume {' '.join(resets)}")
        self.result.ended = self.result.paused = None
        self._unknown -= set(resets)
        mend()
        if self._driver is not None:
            self._driver.evict()
            self._driver = None
        self._at(self._rng.uniform(0.0, 100.0), lambda: self._activate("resume", False, resets=resets))

    def _maybe_crash(self) -> None:
        driver = self._driver
        if driver is None or self.result.struck["crash"] >= self._faults.max_crashes:
            return
        if self._rng.random() < self._faults.crash:
            self.result.struck["crash"] += 1
            self.result.trace.append(f"{self._now - START_AT:.6f} crash")
            driver.evict()
            self._driver = None
            self.store.crash(self._rng)
            self._at(self._rng.uniform(0.0, 2.0), lambda: self._recover())

    def _recover(self) -> None:
        last = self.store.events()[-1]
        if last.type in ("run_completed", "run_failed", "run_cancelled"):
            self.result.ended = last
        elif isinstance(last, RunPaused):
            self.result.paused = last
        else:
            self._activate("recovery", True)

    def _cancel(self) -> None:
        cancel: Callable[[Driver], None] = lambda d: d.cancel("simulated", self._now)  # noqa: E731
        if self._driver is not None:
            self.result.struck["cancel"] += 1
            self._with(self._driver, cancel)
        elif self._parked:
            self.result.struck["cancel"] += 1
            self._activate("cancel", False, then=cancel)
        else:
            self._at(0.5, self._cancel)  # its owner has crashed, or it is being resumed

    def _with(self, driver: Driver, call: Callable[[Driver], None]) -> None:
        """Give an input to `driver`, if it is still the owner."""
        if driver is self._driver:
            call(driver)
            self._act(driver)

    def _act(self, driver: Driver) -> None:
        effects = driver.effects()
        while effects:
            for effect in effects:
                self._effect(driver, effect)
            effects = driver.effects() if driver is self._driver else []
        if driver is self._driver and driver.next_due is not None and driver.next_due != self._tick_at:
            self._tick_at = driver.next_due
            self._at(max(0.0, driver.next_due - self._now), lambda: self._tick(driver))

    def _tick(self, driver: Driver) -> None:
        self._tick_at = None
        self._with(driver, lambda d: d.tick(self._now))

    def _effect(self, driver: Driver, effect: Effect) -> None:
        self.result.trace.append(f"{self._now - START_AT:.6f} {type(effect).__name__} {_brief(effect)}")
        match effect:
            case Append(events):
                self.store.append(events)
                self.result.struck["together"] += sum(isinstance(event, AttemptsFailed) for event in events)
                slow = self._rng.random() < 0.2
                self._at(self._rng.uniform(0.0, 0.5 if slow else 0.01), lambda: self._sync(driver))
            case Dispatch(call):
                self._check_durable(driver, call)
                self._at(self._rng.uniform(0.0, 0.05), lambda: self._execute(driver, call))
            case CancelDispatch():
                pass  # its outcome, if it comes, is dropped by the driver: that is what is simulated
            case Park(due_at):
                driver.evict()
                self._driver = None
                self._parked = True
                epoch = self._epoch
                self._at(due_at - self._now, lambda: self._wake(epoch))
            case Pause(event):
                self.result.paused = event
            case Finish(event):
                self.result.ended = event

    def _check_durable(self, driver: Driver, call: StepCall) -> None:
        """A step is dispatched when it is durable; a relaxed one when all but relaxed steps before it is."""
        if call.policy.durability == "strict":
            early = call.position not in self.store.scheduled
        else:
            steps = driver.history.steps
            relaxed = {p for p, step in steps.items() if step.event.policy.durability == "relaxed"}
            pending = self.store.pending()
            begun = [
                e.seq for e in pending if isinstance(e, (StepScheduled, StepDispatched)) and e.position == call.position
            ]
            before = [e for e in pending if e.seq < max(begun, default=-1) and not isinstance(e, RunActivated)]
            early = any(getattr(event, "position", None) not in relaxed for event in before)
            self.result.struck["early"] += bool(begun)
        if early:
            raise AssertionError(f"seed {self.result.seed}: {call.position} is dispatched before it is durable")

    def _sync(self, driver: Driver) -> None:
        if driver is self._driver:
            seq = self.store.sync()
            self._with(driver, lambda d: d.durable(seq, self._now))

    # Workers -------------------------------------------------------------------------------------------------

    def _execute(self, driver: Driver, call: StepCall) -> None:
        """One attempt of a dispatched step; a further one follows in the worker, or the step is handed back."""
        if driver is not self._driver:
            return  # its worker died with its owner
        if call.not_before is not None and call.not_before > self._now:
            self._at(call.not_before - self._now, lambda: self._execute(driver, call))
            return
        if self._rng.random() < self._faults.lost:
            self.result.struck["lost_before"] += 1
            self._lose(driver, call)
            return
        started, took = self._now, self._rng.uniform(0.0, 1.0)
        begun = StepStarted(
            position=call.position, dispatch=call.dispatch, attempt=call.first_attempt, started_at=started
        )
        self._note(driver, begun)
        self._at(took, lambda: self._finish(driver, call, started))

    def _codec_of(self, call: StepCall) -> Codec:
        return self.codec.at(call.run_id, call.position)

    def _finish(self, driver: Driver, call: StepCall, started: float) -> None:
        if driver is not self._driver:
            return
        if call.position in self.store.completed:
            raise AssertionError(f"seed {self.result.seed}: completed step {call.position} is executed again")
        if self._done.get(call.position) == (call.step, repr(call.args)):
            raise AssertionError(f"seed {self.result.seed}: a resume executes {call.position} again")
        if call.position in self._unknown:
            raise AssertionError(f"seed {self.result.seed}: {call.position} is not idempotent and executed again")
        if not call.policy.idempotent:
            self._unknown.add(call.position)
        codec = self._codec_of(call)
        args = [codec.decode(value) for value in call.args]
        self.result.executions.append((call.position, repr(args)))
        attempt = call.first_attempt
        outcome = Outcome(call.position, call.dispatch, "completed", attempt, started_at=started, ended_at=self._now)
        outcome.attempts = self._records_of(driver, call).all()
        try:
            outcome.result = codec.encode(self._steps[call.step](*args))
        except Exception as error:
            self._failed(driver, call, outcome, error)
            return
        if self._rng.random() < self._faults.lost:
            self.result.struck["lost_after"] += 1
            self._lose(driver, call)
            return
        self._send(driver, lambda d: d.outcome(outcome, self._now))

    def _failed(self, driver: Driver, call: StepCall, outcome: Outcome, error: Exception) -> None:
        self._unknown.discard(call.position)  # a known failure may be tried again
        kind = classify(error)
        info = self._codec_of(call).encode_error(error, kind)
        choice = decide(error, kind, call.policy, now=self._now, rng=self._rng, retries_used=call.retries_used)
        retry = choice if isinstance(choice, Retry) else None
        records = self._records_of(driver, call)
        wait = (retry.delay_s, retry.reason, retry.retry_at) if retry else (None, None, None)
        failure = Failure(outcome.attempt, outcome.started_at, self._now, info, *wait)
        if retry is not None and retry.delay_s <= self._limits.park_after_s and self._rng.random() < 0.7:
            records.failed(failure)
            if self._rng.random() < 0.3:  # the worker's watch looks
                for note in records.take():
                    self._note(driver, note)
            call.first_attempt += 1
            call.retries_used += 1
            call.not_before = retry.retry_at
            self._at(retry.delay_s, lambda: self._execute(driver, call))
            return
        records.failed(failure)
        outcome.attempts = records.all()
        if retry is not None:
            outcome.status, outcome.retry_at = "handed_back", retry.retry_at
        else:
            outcome.status, outcome.error, outcome.why = (
                "failed",
                info,
                choice.why if isinstance(choice, Stop) else "",
            )
        self._send(driver, lambda d: d.outcome(outcome, self._now))

    def _records_of(self, driver: Driver, call: StepCall) -> Records:
        """What the worker of this dispatch has recorded: told one by one, or gathered until somebody looks."""
        key = (self._epoch, call.position, call.dispatch)
        if key not in self._records:
            gather_s = math.inf if self._rng.random() < 0.7 else 0.0
            report: Callable[[AttemptNote], None] = lambda note: self._note(driver, note)  # noqa: E731
            self._records[key] = Records(call.position, call.dispatch, report=report, gather_s=gather_s)
        return self._records[key]

    def _note(self, driver: Driver, note: AttemptNote) -> None:
        self._send(driver, lambda d: d.record(note, self._now))

    def _lose(self, driver: Driver, call: StepCall) -> None:
        self._at(
            self._rng.uniform(0.0, 0.5),
            lambda: self._with(
                driver,
                lambda d: d.lost(call.position, call.dispatch, cause="worker_died", charged=True, now=self._now),
            ),
        )

    def _send(self, driver: Driver, call: Callable[[Driver], None]) -> None:
        """A message of a worker: it takes time, and may come twice."""
        self._at(self._rng.uniform(0.0, 0.02), lambda: self._with(driver, call))
        if self._rng.random() < self._faults.duplicate:
            self.result.struck["duplicate"] += 1
            self._at(self._rng.uniform(0.0, 3.0), lambda: self._with(driver, call))


def _brief(effect: Effect) -> str:
    match effect:
        case Append(events):
            return " ".join(f"{e.seq}:{e.type}@{getattr(e, 'position', '')}" for e in events)
        case Dispatch(call):
            return f"{call.position}#{call.dispatch} attempt {call.first_attempt}"
        case CancelDispatch(position, dispatch):
            return f"{position}#{dispatch}"
        case _:
            return ""


def check_invariants(simulation: Simulation) -> None:
    """Dense seq, one end, nothing after it but a resume; each completion and failed attempt once (unless a resume took
    it back).

    Raises:
        AssertionError: one is broken; the message has the seed.
    """
    where = f"seed {simulation.seed}"
    events = simulation.events
    assert [e.seq for e in events] == list(range(len(events))), f"{where}: seq is not dense"
    history = History()
    completed: set[str] = set()
    for event in events:
        if history.ended is not None:
            resumed = isinstance(event, RunActivated) and event.resets
            assert resumed, f"{where}: {event.type} after the end"
        if isinstance(event, StepCompleted):
            assert event.position not in completed, f"{where}: {event.position} is completed more than once"
            completed.add(event.position)
        if isinstance(event, (AttemptFailed, AttemptsFailed)):
            failed = {event.attempt} if isinstance(event, AttemptFailed) else set(range(event.first, event.last + 1))
            twice = failed & history.steps[event.position].failed_attempts
            assert not twice, f"{where}: attempts {sorted(twice)} of {event.position} are recorded more than once"
        history.apply(event)
        if isinstance(event, RunActivated) and event.resets:
            again = {getattr(late, "position", "") for late in history.deferred}  # recorded again, executed never
            completed &= completed_steps(history) - again


def completed_steps(history: History) -> set[str]:
    """Positions of the steps whose completion holds."""
    return {position for position, step in history.steps.items() if step.ended == "completed"}
