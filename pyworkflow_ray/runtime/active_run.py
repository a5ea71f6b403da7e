"""One run in a run actor: the shell round the engine's driver. Records, then acts.

Made by `run_actor`, which holds the lock for every call here; calls the journal, the driver, and hands step calls to
whoever executes them. Knows no ray.

Faults: another owner has taken the run over (it stops at once and says nothing more); the disk refuses (nothing more is
acknowledged, the run is given back to be tried again in a new epoch); our own code breaks (the same, and charged).
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from pyworkflow_ray.engine.calls import Codec, Outcome, StepCall
from pyworkflow_ray.engine.commands import Append, CancelDispatch, Dispatch, Effect, Finish, Limits, Park, Pause
from pyworkflow_ray.engine.driver import Driver
from pyworkflow_ray.engine.events import (
    AttemptNote,
    Event,
    RunActivated,
    RunCompleted,
    RunCreated,
    RunFailed,
    RunPaused,
)
from pyworkflow_ray.errors import FencedError, StorageError
from pyworkflow_ray.execution.hooks import run_has_failed
from pyworkflow_ray.observability.narrate import Narrator
from pyworkflow_ray.runtime.messages import Assignment, RunReport
from pyworkflow_ray.storage.port import JournalPort

log = logging.getLogger("pyworkflow_ray.run")

_MEASURED = 1_000  # commits of one activation
_TOLD_BYTES = 4096  # a larger result is read from the storage by whoever wants it


class Executor(Protocol):
    """Who executes the step calls of a run."""

    def dispatch_locked(self, call: StepCall) -> None: ...

    def withdraw_locked(self, position: str, dispatch: int) -> None: ...

    def look_again(self) -> None:
        """Call `confirm_locked` soon; called on any thread, without the lock."""


class ActiveRun:
    """One activation of one run. `report` is None while it goes on."""

    def __init__(
        self,
        assignment: Assignment,
        journal: JournalPort,
        events: list[Event],
        executor: Executor,
        *,
        who: tuple[str, str],
        measure: bool = False,
    ) -> None:
        self.assignment = assignment
        self.run_id = assignment.run_id
        self.epoch = journal.epoch
        self.report: RunReport | None = None
        self._journal = journal
        self._events = events
        self._executor = executor
        self._worker, self._node = who
        self._appends: deque[Future[int]] = deque()  # not durable yet, in order
        self._narrator = Narrator(self.created, log)
        self._commits: list[float] | None = [] if measure else None  # seconds that commits took
        self._driver: Driver | None = None
        self._codec: Codec | None = None

    @property
    def created(self) -> RunCreated:
        first = self._events[0]
        assert isinstance(first, RunCreated)
        return first

    @property
    def lost_without_a_word(self) -> int:
        """How many owners in a row died before they recorded anything, for which the run is charged."""
        last = next((e.epoch for e in reversed(self._events) if isinstance(e, RunActivated)), 0)
        return self.epoch - last if self.assignment.charged else 0

    def begin_locked(self, flow: Callable[..., Any], codec: Codec, lease: str, limits: Limits) -> None:
        """Replay the history and go on from its end."""
        given = self.assignment
        driver = Driver(flow, codec, limits=limits, rng=random.Random(), log=log.warning)
        self._driver, self._codec = driver, codec
        events, self._events = self._events, self._events[:1]
        self._narrator.remember(events)
        now = time.time()

        def begin() -> None:
            if given.pause and given.cancel is None:
                driver.pause(now)
            driver.activate(events, self._activation(events, lease), now)
            if given.cancel is not None:
                driver.cancel(given.cancel[0], now)
            elif given.wake:
                driver.wake(now)

        self._guarded(begin)

    def _activation(self, events: list[Event], lease: str) -> RunActivated:
        given = self.assignment
        return RunActivated(
            epoch=self.epoch,
            cause=given.cause,
            charged=given.charged and was_lost(events),
            lease=lease,
            node=self._node,
            worker=self._worker,
            resets=given.resets,
        )

    def pause_locked(self, reason: Any, message: str, lease: str) -> None:
        """The run can't be driven here: it waits for a person."""
        seq = self._events[-1].seq
        now = time.time()
        activation = self._activation(self._events, lease).model_copy(update={"seq": seq + 1, "at": now})
        event = RunPaused(seq=seq + 2, at=now, reason=reason, message=message)

        def pause() -> None:
            self._journal.append([activation, event]).result()
            self._end(RunReport(self.run_id, "paused", message=message, epoch=self.epoch))

        self._guarded(pause)

    # Inputs -----------------------------------------------------------------------------------------------------

    def outcome_locked(self, outcome: Outcome) -> None:
        self._input(lambda driver, now: driver.outcome(outcome, now))

    def record_locked(self, event: AttemptNote) -> None:
        self._input(lambda driver, now: driver.record(event, now))

    def lost_locked(self, position: str, dispatch: int, *, cause: str, charged: bool, message: str) -> None:
        self._input(
            lambda driver, now: driver.lost(position, dispatch, cause=cause, charged=charged, now=now, message=message)
        )

    def tick_locked(self) -> None:
        self._input(lambda driver, now: driver.tick(now))

    def cancel_locked(self, reason: str | None) -> None:
        self._input(lambda driver, now: driver.cancel(reason, now))

    def wake_locked(self) -> None:
        self._input(lambda driver, now: driver.wake(now))

    def pause_by_hand_locked(self) -> None:
        self._input(lambda driver, now: driver.pause(now))

    def confirm_locked(self) -> None:
        """Appends that have become durable meanwhile, or have failed."""
        self._input(lambda driver, now: self._confirm(driver, now))

    @property
    def is_unconfirmed(self) -> bool:
        """Whether appends are on their way."""
        return bool(self._appends) and self.report is None

    def _confirm(self, driver: Driver, now: float) -> None:
        while self._appends and self._appends[0].done():
            driver.durable(self._appends.popleft().result(), now)

    def started_at(self, position: str) -> float | None:
        """When the attempt that runs now is known to have begun."""
        step = self._driver.history.steps.get(position) if self._driver is not None else None
        return step.started_at if step is not None else None

    def attempt_now(self, call: StepCall) -> tuple[int, int]:
        """(number of the attempt that runs now, retries used before it), as far as they were reported."""
        step = self._driver.history.steps.get(call.position) if self._driver is not None else None
        if step is None:
            return call.first_attempt, call.retries_used
        running = step.attempt + 1 if step.knows(step.attempt) else step.attempt
        return max(running, call.first_attempt), step.retries_used

    def due_in_s(self) -> float | None:
        """Seconds until `tick_locked` must be called; None: never by itself."""
        due = self._driver.next_due if self._driver is not None else None
        return None if due is None else max(0.0, due - time.time())

    def leave_locked(self) -> None:
        """The actor lets go of the run without a word: the next epoch goes on."""
        self._end(RunReport(self.run_id, "fenced", epoch=self.epoch))

    # Effects ----------------------------------------------------------------------------------------------------

    def _input(self, handle: Callable[[Driver, float], None]) -> None:
        driver = self._driver
        if driver is None or self.report is not None:
            return
        self._guarded(lambda: handle(driver, time.time()))

    def _guarded(self, handle: Callable[[], None]) -> None:
        try:
            handle()
            self._carry_out_all()
        except FencedError:
            log.info("run %s: another owner has it now; epoch %d stops here", self.run_id, self.epoch)
            self._end(RunReport(self.run_id, "fenced", epoch=self.epoch))
        except (StorageError, OSError) as error:
            self._end(RunReport(self.run_id, "broken", message=str(error), epoch=self.epoch))
        except Exception as error:
            log.exception("run %s: the runtime itself failed", self.run_id)
            message = f"{type(error).__name__}: {error}"
            self._end(RunReport(self.run_id, "broken", message=message, epoch=self.epoch, charged=True))

    def _carry_out_all(self) -> None:
        driver = self._driver
        while driver is not None and self.report is None:
            effects = driver.effects()
            if not effects:
                return
            for effect in effects:
                self._carry_out(driver, effect)

    def _carry_out(self, driver: Driver, effect: Effect) -> None:
        match effect:
            case Append(events):
                for event in events:
                    self._narrator.tell(event)
                append = self._journal.append(list(events)) if self._commits is None else self._timed(events)
                self._appends.append(append)
                if not append.done():  # a bucket: what waits for it comes out by `confirm_locked`
                    append.add_done_callback(lambda _: self._executor.look_again())
                self._confirm(driver, time.time())
            case Dispatch(call):
                self._executor.dispatch_locked(call)
            case CancelDispatch(position, dispatch):
                self._executor.withdraw_locked(position, dispatch)
            case Park(due_at):
                self._end(RunReport(self.run_id, "parked", due_at=due_at, epoch=self.epoch))
            case Pause(event):
                log.warning("%s", event.message)
                self._end(RunReport(self.run_id, "paused", message=event.message, epoch=self.epoch))
            case Finish(event):
                self._tell_of_failure(event)
                status, result = status_of_end(event), small_result(event)
                self._end(RunReport(self.run_id, "finished", status=status, epoch=self.epoch, result=result))

    def _timed(self, events: Any) -> Future[int]:
        began, commits = time.perf_counter(), self._commits
        append = self._journal.append(list(events))
        if commits is not None and len(commits) < _MEASURED:
            append.add_done_callback(lambda _: commits.append(time.perf_counter() - began))
        return append

    def _tell_of_failure(self, event: Event) -> None:
        created = self._events[0]
        if isinstance(event, RunFailed) and isinstance(created, RunCreated) and self._codec is not None:
            run_has_failed(created, event, self._codec)

    def _end(self, report: RunReport) -> None:
        if self.report is not None:
            return
        self.report = report
        report.commits = self._commits or []
        if self._driver is not None:
            self._driver.evict()
        try:
            if report.what == "finished":
                self._journal.finish()
            else:
                self._journal.close()
        except (StorageError, OSError) as error:
            log.warning("run %s has ended, but its journal could not be put away: %s", self.run_id, error)


def status_of_end(event: Event) -> str:
    """Status of a run whose terminal event this is."""
    if isinstance(event, RunCompleted):
        return "completed"
    return "failed" if isinstance(event, RunFailed) else "cancelled"


def small_result(event: Event) -> bytes | None:
    """The result of a completed run, as its journal holds it, where it is small enough to be told with its end."""
    if isinstance(event, RunCompleted) and event.result.size <= _TOLD_BYTES:
        return event.result.model_dump_json().encode()
    return None


def was_lost(events: list[Event]) -> bool:
    """Whether the last activation ended without a word: it neither parked nor paused."""
    for event in reversed(events):
        if event.type in ("run_parked", "run_paused"):
            return False
        if isinstance(event, RunActivated):
            return True
    return False
