"""Owns one run of a test environment: the shell round the engine's driver, as a run actor is in production.

Made by `environment`; calls the driver, the attempt loop (`execution.worker`) and a journal in memory. Nothing of the
engine or of the attempt loop is made anew here: this carries out the driver's effects on a virtual loop. Faults that it
can bring about: a crash of the owner after any event, which takes the steps that run with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyworkflow_ray.engine.calls import Outcome, StepCall
from pyworkflow_ray.engine.commands import Append, CancelDispatch, Dispatch, Effect, Finish, Park, Pause
from pyworkflow_ray.engine.driver import Driver
from pyworkflow_ray.engine.events import (
    TERMINAL,
    AttemptFailed,
    AttemptNote,
    AttemptsFailed,
    Event,
    RunActivated,
    RunCreated,
    RunFailed,
    RunParked,
    RunPaused,
    StepStarted,
)
from pyworkflow_ray.engine.history import History, failed_positions
from pyworkflow_ray.errors import NonDeterminismError, RunError
from pyworkflow_ray.execution.code import load_step, load_workflow
from pyworkflow_ray.execution.hooks import run_has_failed
from pyworkflow_ray.execution.interrupt import Interrupt
from pyworkflow_ray.execution.worker import execute_call_async
from pyworkflow_ray.testing.memory_store import MemoryStore
from pyworkflow_ray.testing.problems import RunPausedError

if TYPE_CHECKING:
    from pyworkflow_ray.testing.environment import WorkflowEnv

log = logging.getLogger("pyworkflow_ray.run")

_UNWIND_S = 2.0  # of virtual time: what a crash's step may take to end
WAIT_MAX_S = 1.0  # as a worker by default: a longer wait between attempts hands the step back


@dataclass(slots=True)
class _Running:
    """A dispatched step. interrupt: of an async one that has begun."""

    call: StepCall
    task: asyncio.Task[None]
    interrupt: Interrupt | None = None


class Owner:
    """One run, from its creation to its end, through all its activations.

    Attributes:
        settled: Done once the run has ended or is paused, or something here broke.
        broken: What broke: an error of the environment or of ours, not of the run.
        crash_at: The owner dies once so many events of the run are durable; None: it does not.
        crashes: How often it died.
    """

    def __init__(self, env: WorkflowEnv, created: RunCreated) -> None:
        self._env = env
        self._loop = env.loop
        self.created = created
        self.run_id = created.run_id
        self.store = MemoryStore()
        self.settled: asyncio.Future[None] = self._loop.create_future()
        self.broken: BaseException | None = None
        self.paused: RunPaused | None = None
        self.crash_at: int | None = None
        self.crashes = 0
        self._driver: Driver | None = None
        self._epoch = -1
        self._timer: asyncio.TimerHandle | None = None
        self._parked_until: float | None = None
        self._running: dict[tuple[int, str, int], _Running] = {}

    def begin(self) -> None:
        """Take the run up on the loop's next turn."""
        self._loop.call_soon(self._guarded, self._begin)

    def _begin(self) -> None:
        if self._write((self.created,)):
            self._activate("start")

    # What a handle asks for --------------------------------------------------------------------------------------

    def cancel(self, reason: str | None) -> None:
        self._loop.call_soon(self._guarded, lambda: self._control("cancel", lambda d: d.cancel(reason, self._now())))

    def wake(self) -> None:
        self._loop.call_soon(self._guarded, lambda: self._control("wake", lambda d: d.wake(self._now())))

    def pause(self) -> None:
        self._loop.call_soon(self._guarded, lambda: self._control("wake", lambda d: d.pause(self._now())))

    def resume(self) -> None:
        """A paused run goes on, a failed one from its failed step; others stay as they are.

        Raises:
            RunError: it failed in its own body.
        """
        resets: list[str] = []
        events = self.store.events()
        if isinstance(events[-1], RunFailed):
            resets = failed_positions(events)
            if not resets:
                raise RunError(
                    f"run {self.run_id!r} failed in the workflow's own code, not in a step: there is no step to go on "
                    "from. Start it anew",
                    run_id=self.run_id,
                )
        if resets or self.paused is not None:
            self._reopen()
            self._loop.call_soon(self._guarded, lambda: self._activate("resume", resets=resets))

    def _control(self, cause: Any, do: Callable[[Driver], None]) -> None:
        if self._driver is None and (self._parked_until is not None or (self.paused is not None and cause == "cancel")):
            self._reopen()
            self._activate(cause, then=do)
        elif self._driver is not None:
            self._input(self._driver, do)

    def _reopen(self) -> None:
        self.paused = None
        if self.settled.done():
            self.settled = self._loop.create_future()

    # Activations -------------------------------------------------------------------------------------------------

    def _activate(
        self,
        cause: Any,
        *,
        charged: bool = False,
        resets: list[str] | None = None,
        then: Callable[[Driver], None] | None = None,
    ) -> None:
        """Replay the history and go on from its end; `then` is the first input, before the run may park again."""
        self._epoch += 1
        self._parked_until = None
        self._cancel_timer()
        flow = load_workflow(self.created.code, self._env.blobs.get_blob)
        driver = Driver(flow.fn, self._env.codec, limits=self._env.limits, rng=self._env.rng, log=log.warning)
        self._driver = driver
        activation = RunActivated(
            epoch=self._epoch, cause=cause, charged=charged, worker="test", node="test", resets=resets or []
        )
        events = self.store.events()
        if resets:  # of what the body did after the failure it may do something else now
            history = History.of([*events, activation.model_copy(update={"seq": len(events)})])
            self.store.completed &= {p for p, step in history.steps.items() if step.ended == "completed"}
        driver.activate(events, activation, self._now())
        if then is not None:
            then(driver)
        self._carry_out(driver)

    def _input(self, driver: Driver, give: Callable[[Driver], None]) -> None:
        """Give an input to `driver`, if it is still the owner."""
        if driver is self._driver:
            self._guarded(lambda: self._give(driver, give))

    def _give(self, driver: Driver, give: Callable[[Driver], None]) -> None:
        give(driver)
        self._carry_out(driver)

    def _guarded(self, do: Callable[[], None]) -> None:
        """What breaks here is no failure of the run: whoever waits for the run gets it."""
        try:
            do()
        except Exception as error:
            self.break_off(error)

    def break_off(self, error: BaseException) -> None:
        self.broken = self.broken or error
        self._leave()
        self._settle()

    def _settle(self) -> None:
        if not self.settled.done():
            self.settled.set_result(None)

    def abandon(self) -> None:
        """The environment ends."""
        self._leave()
        if not self.settled.done():
            self.settled.cancel()

    def _leave(self) -> None:
        """This activation is over."""
        self._cancel_timer()
        if self._driver is not None:
            self._driver.evict()
            self._driver = None

    # Effects -----------------------------------------------------------------------------------------------------

    def _carry_out(self, driver: Driver) -> None:
        while driver is self._driver:
            effects = driver.effects()
            if not effects:
                break
            for effect in effects:
                if driver is self._driver:
                    self._effect(driver, effect)
        if driver is self._driver:
            self._set_timer(driver)

    def _effect(self, driver: Driver, effect: Effect) -> None:
        match effect:
            case Append(events):
                if self._write(events):
                    driver.durable(events[-1].seq, self._now())
            case Dispatch(call):
                self._dispatch(driver, call)
            case CancelDispatch(position, dispatch):
                self._stop(self._epoch, position, dispatch)
            case Park(due_at):
                self._leave()
                self._park(due_at)
            case Pause(event):
                self.paused = event
                self._stop_all()
                self._leave()
                self._settle()
            case Finish(event):
                self._stop_all()
                self._leave()
                self._settle()
                if isinstance(event, RunFailed):
                    run_has_failed(self.created, event, self._env.codec)

    def _write(self, events: tuple[Event, ...]) -> bool:
        """Make events durable; False where the owner dies by it, after a prefix of them."""
        have = len(self.store.durable)
        survive = len(events) if self.crash_at is None else min(len(events), self.crash_at - have)
        self.store.append(events[:survive])
        self.store.sync()
        if self.crash_at is None or have + survive < self.crash_at:
            return True
        self.crash_at = None
        self._crash()
        return False

    def _park(self, due_at: float) -> None:
        self._parked_until = due_at
        self._timer = self._loop.call_at(self._env.loop_time(due_at), self._guarded, lambda: self._activate("wake"))

    def _set_timer(self, driver: Driver) -> None:
        self._cancel_timer()
        due = driver.next_due
        if due is not None:
            self._timer = self._loop.call_at(
                self._env.loop_time(due), self._input, driver, lambda d: d.tick(max(due, self._now()))
            )

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _now(self) -> float:
        return self._env.clock()

    # Crashes -----------------------------------------------------------------------------------------------------

    def _crash(self) -> None:
        """The owner dies, and what it has running dies with it."""
        self.crashes += 1
        self._leave()
        dying = [running.task for running in self._running.values()]
        for task in dying:
            task.cancel()
        self._loop.create_task(self._recover(dying))

    async def _recover(self, dying: list[asyncio.Task[None]]) -> None:
        if dying:
            await asyncio.wait(dying, timeout=_UNWIND_S)
        events = self.store.events()
        failed = {(e.position, e.attempt) for e in events if isinstance(e, AttemptFailed)}
        for event in events:
            if isinstance(event, AttemptsFailed):
                failed |= {(event.position, attempt) for attempt in range(event.first, event.last + 1)}
        self._env.injected.give_back(self.run_id, lambda position, attempt: (position, attempt) in failed)
        last = events[-1]
        if isinstance(last, TERMINAL):
            self._settle()
        elif isinstance(last, RunPaused):
            self.paused = last
            self._settle()
        elif isinstance(last, RunParked):
            self._park(last.due_at)
        else:
            charged = any(isinstance(event, RunActivated) for event in events)
            self._guarded(lambda: self._activate("recovery", charged=charged))

    # Steps -------------------------------------------------------------------------------------------------------

    def _dispatch(self, driver: Driver, call: StepCall) -> None:
        if call.position in self.store.completed:
            raise AssertionError(f"run {self.run_id}: completed step {call.step} ({call.position}) is executed again")
        key = (self._epoch, call.position, call.dispatch)
        running = self._running[key] = _Running(call, self._loop.create_task(self._execute(driver, call, key)))
        running.task.add_done_callback(lambda _: self._running.pop(key, None))

    async def _execute(self, driver: Driver, call: StepCall, key: tuple[int, str, int]) -> None:
        def report(event: AttemptNote) -> None:
            if not isinstance(event, StepStarted) or call.executor == "task":
                self._input(driver, lambda d: d.record(event, self._now()))

        env = self._env
        try:
            step = load_step(call.code, env.blobs.get_blob, env.codec.decode)
            guard = env.guard(call)
        except Exception as error:
            info = env.codec.encode_error(error, "permanent")
            outcome = Outcome(call.position, call.dispatch, "failed", call.first_attempt, error=info, why="code")
            outcome.started_at = outcome.ended_at = self._now()
        else:
            # sync code runs to its end in one go: nothing can interrupt it but its own timeout
            interrupt = self._running[key].interrupt = Interrupt() if step.is_async else None
            try:
                outcome = await execute_call_async(
                    call,
                    env.injected.watched(step, self.run_id, call.position),
                    env.codec,
                    report=report,
                    interrupt=interrupt,
                    breaker=guard,
                    wait_max_s=WAIT_MAX_S,
                    worker="test",
                    node="test",
                    clock=env.clock,
                    rng=env.rng,
                    sleep=env.step_sleep,
                    settle=env.settle,
                    owns_loop=True,
                )
            except asyncio.CancelledError:
                raise
            except Exception as error:
                if driver is self._driver:
                    self.break_off(error)
                return
        self._input(driver, lambda d: d.outcome(outcome, self._now()))

    def _stop(self, epoch: int, position: str, dispatch: int) -> None:
        running = self._running.get((epoch, position, dispatch))
        if running is None:
            return
        if running.interrupt is not None:
            running.interrupt.cancel()
        else:
            running.task.cancel()

    def _stop_all(self) -> None:
        for key in list(self._running):
            self._stop(*key)

    def running(self) -> list[StepCall]:
        """The step calls that are being executed."""
        return [running.call for running in self._running.values()]

    # Its end -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise what keeps the run from an end.

        Raises:
            NonDeterminismError, RunPausedError: it is paused.
            Exception: what broke here.
        """
        if self.broken is not None:
            raise self.broken
        if self.paused is not None:
            if self.paused.reason == "nondeterminism":
                raise NonDeterminismError(self.paused.message, run_id=self.run_id, **self.paused.details)
            raise RunPausedError(self.paused.message, run_id=self.run_id, reason=self.paused.reason)
