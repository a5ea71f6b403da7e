"""The step host: one Ray task that pulls step calls of one run actor, executes each, and ends when there are none.

Submitted by `hosts` (in the run actor); calls the run actor back through a `line`, `execution.code` to load the step
and `execution.worker` to run it on this process's main thread, where a signal can interrupt it.

Faults: this process may die at any moment (the run actor sees it by the task's end); the run actor may die (Ray then
ends this task, and the line raises); a step may be stuck where nothing but the end of the process helps.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from pyworkflow_ray.engine.calls import Outcome, StepCall
from pyworkflow_ray.engine.events import AttemptNote, CodeEnvironment
from pyworkflow_ray.execution.definitions import StepDefinition
from pyworkflow_ray.execution.freshness import note, refresh
from pyworkflow_ray.execution.interrupt import Interrupt
from pyworkflow_ray.execution.records import FAST_S, Records
from pyworkflow_ray.execution.worker import execute_call
from pyworkflow_ray.runtime.line import Address, Line, open_line
from pyworkflow_ray.runtime.messages import RuntimeConfig
from pyworkflow_ray.runtime.packages import enter
from pyworkflow_ray.runtime.process import Process, enter_process, node_id

_LOOK_S = 0.25  # between two questions whether the step shall stop


def host_steps(
    actor: Any, address: Address | None, host_id: str, config: RuntimeConfig, environment: CodeEnvironment
) -> int:
    """Body of the Ray task. Returns how many calls it executed."""
    enter(environment)
    refresh()
    process = enter_process(config)
    process.shared.keep_in(actor)
    watch = _watch_of_this_process()
    line = open_line(actor, address, process.node)
    executed, node = 0, node_id()
    done: Outcome | None = None
    try:
        while True:
            call = line.next(host_id, done, "" if executed else node)
            if call is None:
                return executed
            done = _execute(line, host_id, call, process, watch)
            executed += 1
            note()
    finally:
        line.close()


def _execute(line: Line, host_id: str, call: StepCall, process: Process, watch: _Watch) -> Outcome:
    interrupt = Interrupt()
    watch.begin(line, host_id, call, interrupt)
    # Stuck code holds the GIL: the watching thread may never run again.
    at_once = call.policy.timeout_s is not None or call.policy.total_timeout_s is not None

    def report(note: AttemptNote) -> None:
        # not waited for: what gets lost with this process is recorded as unknown
        line.note(host_id, call.position, call.dispatch, [note])

    try:
        gather_s = 0.0 if at_once else math.inf
        return run_call(call, process, report=report, interrupt=interrupt, gather_s=gather_s, hold=watch.hold)
    finally:
        watch.end()


def run_call(
    call: StepCall,
    process: Process,
    *,
    report: Callable[[AttemptNote], None],
    interrupt: Interrupt,
    starts: bool = True,
    gather_s: float = 0.0,
    hold: Callable[[Records], None] | None = None,
) -> Outcome:
    """Load the step's code and execute the call; code that can't be loaded is a failed outcome. Never raises."""
    loaded = load_call(call, process)
    if isinstance(loaded, Outcome):
        return loaded
    step, guard = loaded
    return execute_call(
        call,
        step,
        process.codec,
        report=report,
        interrupt=interrupt,
        breaker=guard,
        wait_max_s=process.config.worker_wait_max_s,
        worker=process.worker,
        node=process.node,
        starts=starts,
        gather_s=gather_s,
        hold=hold,
    )


def load_call(call: StepCall, process: Process) -> tuple[StepDefinition, Any] | Outcome:
    """The call's step and its breaker, or the outcome that says why they can't be had. Never raises."""
    started_at = time.time()
    try:
        return process.load_step(call.code), process.guard(call)
    except Exception as error:
        return Outcome(
            position=call.position,
            dispatch=call.dispatch,
            status="failed",
            attempt=call.first_attempt,
            error=process.failure(error, "permanent"),
            why="code",
            started_at=started_at,
            ended_at=time.time(),
            worker=process.worker,
            node=process.node,
        )


class _Watch:
    """One thread a worker process: streams attempts to the run actor and asks it whether the step shall stop.

    A call that is over within 50 ms costs no message of its own, and does not wake the thread either while it is up
    for one of the calls just before. `begin` and `end` are called by the main thread.
    """

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._call: StepCall | None = None
        self._line: Line | None = None
        self._host_id = ""
        self._interrupt: Interrupt | None = None
        self._records: Records | None = None
        self._next_look = 0.0
        self._asleep = False  # until it is notified
        self._thread = threading.Thread(target=self._loop, name="pyworkflow-ray-watch", daemon=True)
        self._thread.start()

    def begin(self, line: Line, host_id: str, call: StepCall, interrupt: Interrupt) -> None:
        with self._wake:
            self._call, self._line, self._host_id, self._interrupt = call, line, host_id, interrupt
            self._records = None
            self._next_look = time.monotonic() + FAST_S
            if self._asleep:
                self._wake.notify()

    def hold(self, records: Records) -> None:
        """The records of the call that has begun."""
        self._records = records

    def end(self) -> None:
        with self._wake:
            self._call = self._line = self._interrupt = self._records = None

    def _has_call(self) -> bool:
        return self._call is not None

    def _loop(self) -> None:
        while True:
            with self._wake:
                if self._call is None and not self._wake.wait_for(self._has_call, FAST_S):
                    self._asleep = True
                    self._wake.wait_for(self._has_call)
                    self._asleep = False
                wait = self._next_look - time.monotonic()
                if wait > 0:
                    self._wake.wait(wait)
                    continue
                call, line, interrupt = self._call, self._line, self._interrupt
                records = self._records
                self._next_look = time.monotonic() + _LOOK_S
            if call is None or line is None or interrupt is None:
                continue
            try:
                notes = [] if records is None else records.take()
                stop = line.attend(self._host_id, call.position, call.dispatch, notes)
            except Exception:  # the run actor is gone: nobody wants the outcome, and Ray ends this process soon
                stop = True
            if stop:
                with self._wake:
                    if self._call is call:
                        interrupt.cancel()


_watch: tuple[int, _Watch] | None = None


def _watch_of_this_process() -> _Watch:
    global _watch
    if _watch is None or _watch[0] != os.getpid():
        _watch = (os.getpid(), _Watch())
    return _watch[1]
