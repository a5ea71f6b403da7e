"""The run actor: drives one run at a time, a batch after another, and hands its steps to step hosts.

Made by an anchor, called by the controller (`execute`, and the control calls), by step hosts (`step_done`, `attend`);
calls `active_run` (the engine's shell) and `hosts`. Threads: one executes batches (and local steps), a few serve hosts
and control calls, one handles deaths and deadlines. One lock guards all state; it is held for a commit (a write and an
fdatasync) and never while code of a step runs.

Faults: SIGKILL at any instant (the controller sees the death, another actor goes on by the next epoch); a controller
that dies and comes back as another (reports are kept until a controller has them); step hosts that die.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from pyworkflow_ray.engine.calls import Outcome, StepCall
from pyworkflow_ray.engine.commands import Limits
from pyworkflow_ray.engine.events import AttemptNote
from pyworkflow_ray.engine.logs import filter_replayed_lines
from pyworkflow_ray.engine.pausing import lost_too_often
from pyworkflow_ray.errors import ConfigurationError, CorruptJournalError, FencedError, RunNotFoundError, StorageError
from pyworkflow_ray.execution.freshness import note, refresh
from pyworkflow_ray.execution.interrupt import Interrupt
from pyworkflow_ray.execution.records import FAST_S
from pyworkflow_ray.observability.otel_settings import signals
from pyworkflow_ray.runtime import faults
from pyworkflow_ray.runtime.active_run import ActiveRun
from pyworkflow_ray.runtime.hosts import Host, Hosts
from pyworkflow_ray.runtime.line import Exchange
from pyworkflow_ray.runtime.local_steps import run_together
from pyworkflow_ray.runtime.messages import NAMESPACE, ActorSpec, Assignment, Doing, RunReport, controller_name
from pyworkflow_ray.runtime.nodes import was_drained
from pyworkflow_ray.runtime.packages import enter
from pyworkflow_ray.runtime.process import enter_process
from pyworkflow_ray.runtime.step_host import run_call
from pyworkflow_ray.runtime.stuck import stuck_outcome
from pyworkflow_ray.runtime.taking import activate
from pyworkflow_ray.runtime.typed_ray import living_nodes

log = logging.getLogger("pyworkflow_ray.run_actor")

GROUPS = {"run": 1, "steps": 4, "control": 4}
_PROGRESS_S = 0.05  # a batch that takes longer is reported on, and what has not begun is given back
_TOLD_S = 5.0  # the controller may be gone: it will find the runs in the storage
_IDLE_WAIT_S = 30.0


class RunActor:
    """See the module. Methods are called through Ray, each in the thread of its concurrency group."""

    def __init__(self, spec: ActorSpec) -> None:
        self._spec = spec
        self._broken: Exception | None = None
        self._active: ActiveRun | None = None
        try:
            self._start(spec)
        except Exception as error:  # told by `ready`: an actor whose constructor raises dies with a page of traces
            self._broken = error

    def _start(self, spec: ActorSpec) -> None:
        enter(spec.environment)
        self._process = enter_process(spec.config)
        self._measure = bool(signals(dict(spec.config.telemetry)).metrics)
        self._kept = self._process.shared.keep_here()
        self._lease = self._process.storage.join_lease(spec.lease)
        filter_replayed_lines()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._queue: deque[Assignment] = deque()
        self._reports: list[RunReport] = []
        self._caller = ""
        self._batch_began: float | None = None
        self._draining = False
        self._local_calls: deque[StepCall] = deque()
        self._interrupts: dict[tuple[str, int], Interrupt] = {}
        self._is_local_busy = False  # this actor's own thread executes a local call
        self._helpers = ThreadPoolExecutor(64, thread_name_prefix="local-step")
        self._inbox: queue.SimpleQueue[tuple[str, BaseException | None] | None] = queue.SimpleQueue()
        self._me: Any = None
        self._controller: Any = None
        self._told: Any = None  # the last `progress`
        self._exchange = Exchange(self._process.node, step_done=self._step_done, attend=self._attend)
        self._lost_on: dict[tuple[str, str], str] = {}  # run and position of a step to the node that it was lost on
        self._hosts = Hosts(
            self._lock,
            spec.config,
            spec.environment,
            actor=self._handle_of_me,
            address=self._exchange.address,
            on_death=lambda host_id, error: self._inbox.put((host_id, error)),
        )
        threading.Thread(target=self._watch_loop, name="watch", daemon=True).start()

    def __repr__(self) -> str:
        active = self._active
        return f"RunActor({active.run_id if active is not None else 'idle'})"

    # Called by the controller -----------------------------------------------------------------------------------

    @ray.method(concurrency_group="run")
    def execute(self, caller: str, contended: bool, batch: list[Assignment]) -> list[RunReport]:
        """Drive each run of `batch` until it ends, parks or pauses. Returns a report a run, and those that a
        controller before this caller has not had."""
        with self._lock:
            self._hosts.contended = contended
            if caller == self._caller:
                self._reports = []
            self._caller = caller
            self._queue.extend(batch)
        begun = False
        while True:
            with self._lock:
                if not self._queue or self._draining:
                    self._batch_began = None
                    break
                assignment = self._queue.popleft()
                if not begun:  # not before: however slow this thread is, the first of a batch is never given back
                    begun, self._batch_began = True, time.monotonic()
                    self._inbox.put(None)  # the watch thread reports on it in time
            report = self._drive(assignment)
            with self._lock:
                self._reports.append(report)
        if self._told is not None:  # what was given back stands in that message only: it must come before this answer
            ray.wait([self._told], timeout=_TOLD_S)
            self._told = None
        with self._lock:
            return list(self._reports)

    @ray.method(concurrency_group="control")
    def ready(self) -> str:
        """The id of its node; raises what kept it from starting."""
        if self._broken is not None:
            raise self._broken
        return str(ray.get_runtime_context().get_node_id())

    @ray.method(concurrency_group="control")
    def doing(self) -> Doing:
        with self._lock:
            active = self._active
            return Doing(
                self._spec.key,
                os.getpid(),
                active.run_id if active is not None else None,
                active.epoch if active is not None else -1,
                list(self._queue),
                list(self._reports),
            )

    @ray.method(concurrency_group="control")
    def contend(self, contended: bool) -> None:
        """Whether runs of other actors wait for CPUs: hosts then give theirs back after a while."""
        self._hosts.contended = contended

    @ray.method(concurrency_group="control")
    def cancel(self, run_id: str, reason: str | None) -> bool:
        """Cancel the run where this actor has it; False where it has not."""
        with self._lock:
            if self._active is not None and self._active.run_id == run_id and self._active.report is None:
                self._active.cancel_locked(reason)
                self._settle_locked()
                return True
            for assignment in self._queue:
                if assignment.run_id == run_id:
                    assignment.cancel = (reason,)
                    return True
        return False

    @ray.method(concurrency_group="control")
    def wake(self, run_id: str) -> bool:
        """Retries that the run waits for happen now; False where this actor has not, or no longer, the run."""
        with self._lock:
            if self._active is not None and self._active.run_id == run_id and self._active.report is None:
                self._active.wake_locked()
                self._settle_locked()
                return True
            for assignment in self._queue:
                if assignment.run_id == run_id:
                    assignment.wake = True
                    return True
        return False

    @ray.method(concurrency_group="control")
    def pause(self, run_id: str) -> bool:
        """The run pauses for a person, once what runs has ended; False where this actor has not, or no longer, the
        run."""
        with self._lock:
            if self._active is not None and self._active.run_id == run_id and self._active.report is None:
                self._active.pause_by_hand_locked()
                self._settle_locked()
                return True
            for assignment in self._queue:
                if assignment.run_id == run_id:
                    assignment.pause = True
                    return True
        return False

    @ray.method(concurrency_group="control")
    def drain(self, timeout_s: float) -> bool:
        """Begin nothing more; True once no step runs, False after `timeout_s`. The run itself stays where it is."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._draining = True
            self._queue.clear()
            self._hosts.drop_calls_locked()
            self._local_calls.clear()
            while self._hosts.executing_locked() or self._interrupts:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 0.1))
            if self._active is not None:
                self._active.leave_locked()
                self._changed.notify_all()
        return True

    # Called by step hosts, through the line -----------------------------------------------------------------------

    @ray.method(concurrency_group="steps")
    def step_done(self, host_id: str, outcome: Outcome | None, node: str = "") -> StepCall | None:
        return self._step_done(host_id, outcome, node)

    @ray.method(concurrency_group="control")
    def attend(self, host_id: str, position: str, dispatch: int, notes: list[AttemptNote]) -> bool:
        return self._attend(host_id, position, dispatch, notes)

    @ray.method(concurrency_group="control")
    def keep_object(self, digest: str, box: list[Any], size: int) -> None:
        """Hold the reference to a large buffer that a step has made, as long as the run is here."""
        self._kept.keep(digest, box, size)

    @ray.method(concurrency_group="control")
    def lend_object(self, digest: str) -> list[Any] | None:
        return self._kept.lend(digest)

    def _step_done(self, host_id: str, outcome: Outcome | None, node: str = "") -> StepCall | None:
        """Take the outcome of the host's last call, give it the next one; None: it shall end."""
        with self._lock:
            if outcome is not None:
                self._outcome_locked(host_id, outcome)
            call = self._hosts.next_locked(host_id, node)
            self._hosts.balance_locked()
            return call

    def _attend(self, host_id: str, position: str, dispatch: int, notes: list[AttemptNote]) -> bool:
        """Attempts of the call that a host executes. Returns whether it shall stop."""
        with self._lock:
            host = self._hosts.get_locked(host_id)
            if host is None or host.call is None:
                return host is None
            if host.call.position != position or host.call.dispatch != dispatch:
                return False
            active = self._active
            if active is not None and active.run_id == host.call.run_id and active.epoch == host.call.epoch:
                for event in notes:
                    active.record_locked(event)
                if notes:
                    self._changed.notify_all()  # there may be a new thing to wait for
            return host.stop

    def _outcome_locked(self, host_id: str, outcome: Outcome) -> None:
        host = self._hosts.get_locked(host_id)
        if host is None or host.call is None:
            return
        call, host.call = host.call, None
        active = self._active
        if active is None or (call.run_id, call.epoch) != (active.run_id, active.epoch) or host.stop:
            self._changed.notify_all()
            return
        active.outcome_locked(outcome)
        if active.report is not None or self._local_calls or self._draining or active.due_in_s() is not None:
            self._changed.notify_all()

    # One run ----------------------------------------------------------------------------------------------------

    def _drive(self, given: Assignment) -> RunReport:
        try:
            run = self._activate(given)
        except FencedError:
            return RunReport(given.run_id, "fenced")
        except (CorruptJournalError, RunNotFoundError) as error:
            log.error("%s", error)
            return RunReport(given.run_id, "damaged", message=str(error))
        except (StorageError, OSError) as error:
            return RunReport(given.run_id, "broken", message=str(error))
        with self._lock:
            self._active = run
            self._begin_locked(run)
            self._hosts.balance_locked()
            while run.report is None:
                if self._local_calls and not self._draining:
                    self._local_locked()
                    continue
                wait = run.due_in_s()
                if wait is not None and wait <= 0:
                    run.tick_locked()
                    self._hosts.balance_locked()
                    continue
                self._changed.wait(_IDLE_WAIT_S if wait is None else min(wait, _IDLE_WAIT_S))
            self._local_calls.clear()
            self._hosts.drop_calls_locked()
            self._hosts.stop_all_locked(run.run_id)
            for interrupt in self._interrupts.values():
                interrupt.cancel()
            self._active = None
            self._lost_on.clear()
            self._kept.clear()
            self._changed.notify_all()
            return run.report

    def _activate(self, given: Assignment) -> ActiveRun:
        journal, events = activate(self._process.storage, given, self._lease.id)
        who = (self._process.worker, self._process.node)
        return ActiveRun(given, journal, events, self, who=who, measure=self._measure)

    def _begin_locked(self, run: ActiveRun) -> None:
        lost = run.lost_without_a_word
        if lost > run.created.max_recoveries:  # what kills it may be its code: before that is loaded
            run.pause_locked("max_recoveries", lost_too_often(run.created, lost), self._lease.id)
            return
        try:
            codec = self._process.codec
            refresh()
            flow = self._process.load_workflow(run.created.code)
            note()
        except Exception as error:
            gone = enter(self._spec.environment)  # asked now: this actor may be older than the loss
            missing = f" Missing import roots: {', '.join(gone)}." if gone else ""
            reason = "environment" if gone or not isinstance(error, ConfigurationError) else "code"
            message = (
                f"run {run.run_id!r} is paused: the code of workflow {run.created.workflow!r} can't be loaded: {error}."
                f"{missing} Restore it, then: pyworkflow-ray runs resume {run.run_id}"
            )
            run.pause_locked(reason, message, self._lease.id)
            return
        run.begin_locked(flow.fn, codec, self._lease.id, Limits())

    def _handle_of_me(self) -> Any:
        if self._me is None:
            self._me = ray.get_runtime_context().current_actor
        return self._me

    def _settle_locked(self) -> None:
        self._hosts.balance_locked()
        self._changed.notify_all()

    # Executor of the active run ---------------------------------------------------------------------------------

    def dispatch_locked(self, call: StepCall) -> None:
        if self._draining:
            return
        if call.executor == "local":
            self._local_calls.append(call)
        else:
            self._hosts.offer_locked(call, self._lost_on.pop((call.run_id, call.position), ""))

    def look_again(self) -> None:
        self._inbox.put(None)

    def withdraw_locked(self, position: str, dispatch: int) -> None:
        for call in self._local_calls:
            if (call.position, call.dispatch) == (position, dispatch):
                self._local_calls.remove(call)
                return
        interrupt = self._interrupts.get((position, dispatch))
        if interrupt is not None:
            interrupt.cancel()
            return
        if self._hosts.withdraw_locked(position, dispatch) is not None:
            self._inbox.put(None)

    def _local_locked(self) -> None:
        """Execute the first local call in this thread, others in helpers; the lock is released meanwhile."""
        call = self._local_calls.popleft()
        self._interrupts[call.position, call.dispatch] = Interrupt()
        self._offload_locked()
        self._is_local_busy = True
        self._lock.release()
        try:
            self._local_call(call)
        finally:
            self._lock.acquire()
            self._is_local_busy = False

    def _offload_locked(self) -> None:
        """Local calls that this actor's own thread has no time for."""
        if not self._local_calls:
            return
        calls = []
        while self._local_calls:
            call = self._local_calls.popleft()
            interrupt = self._interrupts[call.position, call.dispatch] = Interrupt()
            calls.append((call, interrupt))
        self._helpers.submit(
            run_together,
            calls,
            self._process,
            apart=self._local_apart,
            report=self._local_attempt,
            done=self._local_done,
        )

    def _local_apart(self, call: StepCall) -> None:
        self._helpers.submit(self._local_call, call)

    def _local_call(self, call: StepCall) -> None:
        interrupt = self._interrupts[call.position, call.dispatch]

        def report(note: AttemptNote) -> None:
            self._local_attempt(call, note)

        # the start of a local attempt is told by its end
        outcome = run_call(call, self._process, report=report, interrupt=interrupt, starts=False, gather_s=FAST_S)
        self._local_done(call, outcome)

    def _local_attempt(self, call: StepCall, note: AttemptNote) -> None:
        with self._lock:
            if self._is_active(call):
                self._active.record_locked(note)  # type: ignore[union-attr]

    def _local_done(self, call: StepCall, outcome: Outcome) -> None:
        with self._lock:
            self._interrupts.pop((call.position, call.dispatch), None)
            if self._is_active(call):
                self._active.outcome_locked(outcome)  # type: ignore[union-attr]
                self._hosts.balance_locked()
                if self._is_local_busy:  # what follows from it need not wait for the call of that thread
                    self._offload_locked()
            self._changed.notify_all()

    def _is_active(self, call: StepCall) -> bool:
        active = self._active
        return active is not None and (active.run_id, active.epoch) == (call.run_id, call.epoch)

    # Deaths and deadlines ---------------------------------------------------------------------------------------

    def _watch_loop(self) -> None:
        while True:
            try:
                self._watch_once()
            except Exception:
                log.exception("watching step hosts failed; going on")
                time.sleep(0.1)

    def _watch_once(self) -> None:
        with self._lock:
            kill_at = self._hosts.next_kill_locked()
            report_at = None if self._batch_began is None else self._batch_began + _PROGRESS_S
        due = min((at for at in (kill_at, report_at) if at is not None), default=None)
        try:
            item = self._inbox.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
        except queue.Empty:
            item = None
        with self._lock:
            if item is not None:
                self._host_ended_locked(*item)
            if self._active is not None and self._active.is_unconfirmed:
                self._active.confirm_locked()
                self._settle_locked()
            doomed = self._hosts.due_kills_locked()
            if self._batch_began is not None and time.monotonic() >= self._batch_began + _PROGRESS_S:
                self._batch_began = None
                self._give_back_locked()
        for ref in doomed:
            ray.cancel(ref, force=True)

    def _give_back_locked(self) -> None:
        """The batch takes long: report what is done, and give back what has not begun, for others may be idle."""
        unstarted = [RunReport(a.run_id, "unstarted") for a in self._queue if a.cancel is None]
        self._queue = deque(a for a in self._queue if a.cancel is not None)
        if not unstarted and not self._reports:
            return
        try:
            if self._controller is None:
                name = controller_name(self._spec.config.storage_id)
                self._controller = ray.get_actor(name, namespace=NAMESPACE)
            self._told = self._controller.progress.remote(self._spec.key, [*self._reports, *unstarted])
        except Exception as error:  # it restarts: it will find the runs in the storage
            log.debug("progress could not be reported: %s", error)
            self._controller = None

    def _host_ended_locked(self, host_id: str, error: BaseException | None) -> None:
        host = self._hosts.get_locked(host_id)
        if host is None:
            return
        blind = faults.blind_node(error)
        if blind is not None and self._hosts.shun_locked(blind.node):
            log.error("%s. No step is executed there", blind)
        if error is not None and faults.is_permanent(error):
            for call in self._hosts.refuse_locked(host):
                self._refused_locked(call, error)
        self._hosts.remove_locked(host_id)
        had, active = host.call, self._active
        if had is not None and active is not None and self._is_active(had) and not host.stop:
            self._lost_locked(active, host, had, error)
        self._settle_locked()

    def _lost_locked(self, active: ActiveRun, host: Host, call: StepCall, error: BaseException | None) -> None:
        timed_out = self._timed_out(active, host, call)
        if timed_out is not None:
            active.outcome_locked(timed_out)
            return
        cause, charged = ("worker_died", True) if error is None else faults.lost_step(error)
        message = "" if error is None else faults.first_line(error)
        if host.node and len(living_nodes()) > 1:
            self._lost_on[call.run_id, call.position] = host.node  # another node may do better
        charged = charged and not (host.node and was_drained(host.node))
        active.lost_locked(call.position, call.dispatch, cause=cause, charged=charged, message=message)

    def _timed_out(self, active: ActiveRun, host: Host, call: StepCall) -> Outcome | None:
        """The outcome of an attempt that was stuck beyond its timeout, so that its worker ended itself."""
        if call.chunk is not None and call.chunk.count > 1:
            return None  # which item of a chunk was stuck is not known: it is lost, and executed again in parts
        policy = call.policy
        began = max(host.handed_wall, active.started_at(call.position) or 0.0)
        ends_at = (
            None if policy.total_timeout_s is None else (call.began_at or host.handed_wall) + policy.total_timeout_s
        )
        limits = [ends_at, None if policy.timeout_s is None else began + policy.timeout_s]
        over_at = min((at for at in limits if at is not None), default=None)
        if over_at is None or time.time() < over_at:
            return None
        attempt, retries_used = active.attempt_now(call)
        return stuck_outcome(call, self._process, attempt, retries_used, began, over_at, ends_at)

    def _refused_locked(self, call: StepCall, error: BaseException) -> None:
        if self._active is None or not self._is_active(call):
            return
        now = time.time()
        info = self._process.failure(error, "permanent")
        self._active.outcome_locked(
            Outcome(call.position, call.dispatch, "failed", call.first_attempt, error=info, why="code", ended_at=now)
        )
