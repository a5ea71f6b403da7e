"""The book of runs and pools, and what happens to them: runs are handed to run actors, and come back or are lost.

Base of `controller.Controller`, which adds what clients call. Calls anchors and run actors; decisions about one pool
are `pool`'s. One lock guards everything (methods named `_locked`); callbacks of Ray's futures come on Ray's threads,
take it for a moment, and never wait for a call.

Faults: a run actor dies (its `execute` ends with an error; its run goes on at once on another), an anchor dies (its run
actors die with it, nobody is charged), a run actor does not start, the clock jumps.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import exceptions as rx

from pyworkflow_ray.engine.events import CodeEnvironment
from pyworkflow_ray.execution.environment import python_version
from pyworkflow_ray.runtime import faults, taking
from pyworkflow_ray.runtime.anchor import Anchor
from pyworkflow_ray.runtime.answers import Answers
from pyworkflow_ray.runtime.messages import NAMESPACE, Assignment, RunReport, RuntimeConfig, anchor_name
from pyworkflow_ray.runtime.nodes import fate
from pyworkflow_ray.runtime.packages import restore
from pyworkflow_ray.runtime.pool import Pool, Slot
from pyworkflow_ray.runtime.process import enter_process
from pyworkflow_ray.runtime.typed_ray import as_actor
from pyworkflow_ray.storage.port import LeasePort

log = logging.getLogger("pyworkflow_ray.controller")

KEPT_NEWS = 100_000
_KEPT_RESULTS = 4_000
_TICK_S = 1.0  # the clock may jump: due times are compared so often
_START_FAILURES = 4
_FRESH = "PYWORKFLOW_RUNTIME_ENV_TRY"  # a node's agent remembers for 10 minutes what it could not build: this differs


@dataclass(slots=True, eq=False)
class Known:
    """An unfinished run of this lease. state: "queued", "running", "parked", "paused" or "waiting" (to be tried again).
    cancel: a cancel that the run has not been told of yet. wake, pause: it was to be woken, or paused, as it went into
    parking."""

    run_id: str
    pool: Pool
    state: str = "queued"
    slot: Slot | None = None
    due_at: float | None = None
    cancel: tuple[str | None] | None = None
    wake: bool = False
    pause: bool = False
    failures: int = 0


class Dispatcher:
    """See the module."""

    def __init__(self, config: RuntimeConfig, cpus: int) -> None:
        self.config = config
        self.cpus = cpus
        self.me = uuid.uuid4().hex
        self.process = enter_process(config)
        self.storage = self.process.storage
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.pools: dict[str, Pool] = {}
        self.runs: dict[str, Known] = {}
        self.lease: LeasePort | None = None
        self.rebuilt = True
        self.draining = False
        self.news: deque[tuple[str, str]] = deque(maxlen=KEPT_NEWS)
        self.results: OrderedDict[str, bytes] = OrderedDict()  # of runs that completed lately
        self.told = 0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_count = 0
        self._timer_wake = threading.Condition(self.lock)
        self.then = Answers().then
        threading.Thread(target=self._timer_loop, name="timers", daemon=True).start()

    # Pools ------------------------------------------------------------------------------------------------------

    def pool_locked(self, environment: CodeEnvironment) -> Pool:
        """The pool of this environment; its anchor is made, or found, where it is new."""
        pool = self.pools.get(environment.key)
        if pool is None:
            most = self.config.pool_max or max(2, self.cpus)
            pool = Pool(environment, min(self.config.pool_min, most), most)
            self.pools[environment.key] = pool
            self.make_anchor_locked(pool)
        return pool

    def make_anchor_locked(self, pool: Pool) -> None:
        env = pool.environment
        lease = self.lease.id if self.lease is not None else ""
        pool.broken = ""
        restore(env, self.storage)
        pool.anchor = make_anchor(self.config, env, lease, self.cpus, pool.least, pool.fresh)
        self.then(pool.anchor.hold.remote(lease), lambda f: self._anchor_holds(pool, f))

    def _anchor_holds(self, pool: Pool, future: Any) -> None:
        with self.lock:
            error = future.exception()
            if error is None:
                pool.incarnation = future.result()
                pool.held = True
                self.changed.notify_all()
                self.refresh_locked(pool)
            elif faults.is_permanent(error):  # Ray can't build the runtime_env: the next run of it is another try
                pool.broken = faults.environment_error(error, pool.environment.runtime_env)
                pool.fresh = f"{time.time():.3f}"
                self.changed.notify_all()
                self._no_environment_locked(pool, pool.broken)
            else:
                log.debug("anchor does not answer yet: %s", faults.first_line(error))
                self.after_locked(0.2, lambda: self._anchor_again(pool, error))

    def _anchor_again(self, pool: Pool, error: BaseException) -> None:
        with self.lock:
            if isinstance(error, rx.ActorDiedError):  # for good, not restarting: #44083 hands out such handles
                self.make_anchor_locked(pool)
            else:
                lease = self.lease.id if self.lease is not None else ""
                self.then(pool.anchor.hold.remote(lease), lambda f: self._anchor_holds(pool, f))

    def refresh_locked(self, pool: Pool) -> None:
        """Ask the anchor for its run actors, adopt those that are new to us."""
        self.then(pool.anchor.actors.remote(), lambda f: self._listed(pool, f))

    def _listed(self, pool: Pool, future: Any) -> None:
        with self.lock:
            if future.exception() is not None:
                self.after_locked(0.2, lambda: self._anchor_again(pool, future.exception()))
                return
            incarnation, listed = future.result()
            if incarnation != pool.incarnation:
                self.anchor_changed_locked(pool, incarnation)
                return
            for key, handle in listed:
                self.adopt_locked(pool, key, handle)
            self.pump_locked(pool)

    def anchor_changed_locked(self, pool: Pool, incarnation: str) -> None:
        """The anchor was restarted: its run actors died with it. Those that execute tell so themselves."""
        pool.incarnation, pool.held = incarnation, False
        for slot in [slot for slot in pool.slots.values() if not slot.executing]:
            pool.slots.pop(slot.key)
        lease = self.lease.id if self.lease is not None else ""
        self.then(pool.anchor.hold.remote(lease), lambda f: self._anchor_holds(pool, f))

    def adopt_locked(self, pool: Pool, key: str, handle: Any) -> None:
        if key in pool.slots:
            return
        slot = pool.slots[key] = Slot(key, handle, pool.incarnation)
        self.then(handle.ready.remote(), lambda f: self._actor_ready(pool, slot, f))

    def _actor_ready(self, pool: Pool, slot: Slot, future: Any) -> None:
        with self.lock:
            error = future.exception()
            if error is None:
                pool.failures = 0
                slot.node = future.result()
                if slot.batch is None:
                    slot.batch = {}
                    slot.since = time.monotonic()
                self.pump_locked(pool)
                return
            pool.slots.pop(slot.key, None)
            pool.anchor.drop.remote(slot.key)
            pool.failures += 1
            pool.grow_after = time.monotonic() + min(5.0, 0.1 * 2.0**pool.failures)
            log.warning("a run actor did not start: %s", faults.first_line(error))
            if pool.failures >= _START_FAILURES and not pool.slots:
                self._no_environment_locked(pool, faults.first_line(error))
            self.after_locked(min(5.0, 0.1 * 2.0**pool.failures) + 0.01, lambda: self._pump(pool))

    def _no_environment_locked(self, pool: Pool, why: str) -> None:
        waiting = [*pool.urgent, *pool.queue]
        pool.urgent.clear()
        pool.queue.clear()
        for assignment in waiting:
            self.pause_here(assignment, f"its code environment can't be had here: {why}")

    def pause_here(self, assignment: Assignment, why: str) -> None:
        """Pause a run that no run actor can take."""
        report = taking.pause_run(self, assignment, why)
        with self.lock:
            known = self.runs.get(assignment.run_id)
            if known is not None:
                self.report_locked(known.pool, None, report)

    def grow_locked(self, pool: Pool) -> None:
        missing = pool.missing(time.monotonic()) if pool.held and not self.draining else 0
        if missing <= 0:
            return
        pool.asked += missing
        self.then(pool.anchor.make.remote(missing), lambda f: self._made(pool, missing, f))

    def _made(self, pool: Pool, asked: int, future: Any) -> None:
        with self.lock:
            pool.asked -= asked
            if future.exception() is not None:
                self.after_locked(0.2, lambda: self._anchor_again(pool, future.exception()))
                return
            for key, handle in future.result():
                self.adopt_locked(pool, key, handle)

    # Handing out ------------------------------------------------------------------------------------------------

    def enqueue_locked(self, known: Known, assignment: Assignment, *, urgent: bool = False) -> None:
        """Let a run wait for a run actor."""
        if known.cancel is not None and assignment.cancel is None:
            assignment.cancel = known.cancel
        known.state, known.slot, known.due_at = "queued", None, None
        (known.pool.urgent if urgent else known.pool.queue).append(assignment)
        self.pump_locked(known.pool)

    def _pump(self, pool: Pool) -> None:
        with self.lock:
            self.pump_locked(pool)

    def pump_locked(self, pool: Pool) -> None:
        """Give waiting runs to idle run actors; make more where they are missing."""
        if not self.rebuilt or self.draining:
            return
        if pool.environment.python != python_version() and pool.waiting():
            why = f"it needs Python {pool.environment.python}, this cluster runs {python_version()}"
            self.after_locked(0.0, lambda: self._no_environment(pool, why))
            return
        if pool.broken and pool.waiting():
            self.make_anchor_locked(pool)
        while pool.waiting():
            slot = pool.take_idle()
            if slot is None:
                break
            self.hand_out_locked(pool, slot, pool.next_batch())
        self.grow_locked(pool)
        contended = sum(p.busy() for p in self.pools.values()) > self.cpus
        if contended != pool.contended:
            pool.contended = contended
            for slot in pool.slots.values():
                if slot.executing:
                    slot.handle.contend.remote(contended)

    def _no_environment(self, pool: Pool, why: str) -> None:
        with self.lock:
            self._no_environment_locked(pool, why)

    def hand_out_locked(self, pool: Pool, slot: Slot, batch: list[Assignment]) -> None:
        """The one place where assignments leave. Empty: ask for the reports that another controller did not get."""
        slot.batch = slot.batch or {}
        slot.executing, slot.size, slot.since = True, len(batch), time.monotonic()
        for assignment in batch:
            slot.batch[assignment.run_id] = assignment
            known = self.runs.get(assignment.run_id)
            if known is not None:
                known.state, known.slot = "running", slot
        ref = slot.handle.execute.remote(self.me, pool.contended, batch)
        self.then(ref, lambda f: self._executed(pool, slot, f))

    def _executed(self, pool: Pool, slot: Slot, future: Any) -> None:
        error = future.exception()
        reports = [] if error is not None else future.result()
        with self.lock:
            slot.executing = False
            now = time.monotonic()
            if error is None:
                for report in reports:
                    self.report_locked(pool, slot, report)
                pool.took(now - slot.since, slot.size)
                slot.since = now
                for left in list((slot.batch or {}).values()):  # handed out, and never heard of: not certain
                    self.report_locked(pool, slot, RunReport(left.run_id, "broken", message="no report"))
                slot.batch = {}
                self.pump_locked(pool)
                return
            self._slot_died_locked(pool, slot, error)

    def _slot_died_locked(self, pool: Pool, slot: Slot, error: BaseException) -> None:
        pool.slots.pop(slot.key, None)
        pool.anchor.drop.remote(slot.key)
        lost = list((slot.batch or {}).values())
        slot.batch = {}
        log.info("a run actor was lost with %d runs: %s", len(lost), faults.first_line(error))
        charged = faults.lost_actor_is_charged(error)
        if not (lost and charged and slot.node):
            self._ask_anchor_locked(pool, slot, lost, charged)
            return
        look = threading.Thread(target=self._look_at_node, args=(pool, slot, lost), name="node's fate", daemon=True)
        look.start()

    def _look_at_node(self, pool: Pool, slot: Slot, lost: list[Assignment]) -> None:
        """A thread of its own: it may wait for a second, and nobody is charged for a node's end."""
        try:
            charged = fate(slot.node) == "lives"
        except Exception:
            log.exception("what became of node %s could not be found out: its runs are charged", slot.node[:12])
            charged = True
        with self.lock:
            self._ask_anchor_locked(pool, slot, lost, charged)

    def _ask_anchor_locked(self, pool: Pool, slot: Slot, lost: list[Assignment], charged: bool) -> None:
        made_by = slot.incarnation
        self.then(pool.anchor.incarnation.remote(), lambda f: self._resume_lost(pool, lost, charged, made_by, f))

    def _resume_lost(self, pool: Pool, lost: list[Assignment], charged: bool, made_by: str, future: Any) -> None:
        """The anchor has said whether it was its death: then nobody is charged.

        It is compared with the incarnation that made the run actor: the pool may have heard of the newer one already.
        """
        with self.lock:
            failed = future.exception()
            if failed is not None:
                charged = False
                self.after_locked(0.2, lambda: self._anchor_again(pool, failed))
            elif future.result() != made_by:
                charged = False
                if future.result() != pool.incarnation:
                    self.anchor_changed_locked(pool, future.result())
            for before in lost:
                known = self.runs.get(before.run_id)
                if known is not None:
                    again = Assignment(before.run_id, cause="recovery", charged=charged)
                    again.cancel, again.resets = before.cancel, before.resets
                    again.wake, again.pause = before.wake, before.pause
                    if before.resets:
                        again.cause = "resume"
                    self.enqueue_locked(known, again, urgent=True)
            self.pump_locked(pool)

    def report_locked(self, pool: Pool, slot: Slot | None, report: RunReport) -> None:
        """What a run actor says of one run. Said twice it changes nothing."""
        self.commits_took(report.commits)
        assignment = slot.batch.pop(report.run_id, None) if slot is not None and slot.batch else None
        known = self.runs.get(report.run_id)
        if known is None or (slot is not None and known.slot is not slot):
            return
        known.slot = None
        match report.what:
            case "finished" | "fenced" | "damaged":
                self.runs.pop(report.run_id)
                self.results.pop(report.run_id, None)
                if report.result is not None:
                    self.results[report.run_id] = report.result
                    if len(self.results) > _KEPT_RESULTS:
                        self.results.popitem(last=False)
                self.tell_locked(report.run_id, report.status or report.what)
            case "parked":
                known.state, known.due_at, known.failures = "parked", report.due_at, 0
                self.tell_locked(report.run_id, "parked")
                self.at_locked(report.due_at or time.time(), lambda: self.due(known, report.due_at))
                if known.pause:
                    self.pause_locked(known)
                elif known.wake:
                    self.wake_locked(known)
            case "paused":
                known.state = "paused"
                self.tell_locked(report.run_id, "paused")
            case "unstarted" if assignment is not None:
                known.state = "queued"
                pool.queue.appendleft(assignment)
            case _:
                known.state = "waiting"
                known.failures += 1
                delay = min(10.0, 0.1 * 2.0**known.failures)
                log.warning("run %s goes on in %.1f s: %s", report.run_id, delay, report.message)
                self.after_locked(delay, lambda: self._again(known, report.charged))
        if known.cancel is not None and known.state in ("parked", "paused", "queued"):
            self.deliver_cancel_locked(known)

    def commits_took(self, seconds: list[float]) -> None:
        """For the metrics, which `controller` adds."""

    def deliver_cancel_locked(self, known: Known) -> None:
        reason = known.cancel
        if reason is None:
            return
        if known.state in ("parked", "paused"):
            self.enqueue_locked(known, Assignment(known.run_id, cause="cancel", cancel=reason))
        elif known.state == "queued":
            for assignment in (*known.pool.queue, *known.pool.urgent):
                if assignment.run_id == known.run_id:
                    assignment.cancel = reason
        elif known.slot is not None:
            known.slot.handle.cancel.remote(known.run_id, reason[0])

    def wake_locked(self, known: Known) -> None:
        """Retries that the run waits for happen now."""
        if known.state == "parked":
            known.wake = False
            self.enqueue_locked(known, Assignment(known.run_id, cause="wake", wake=True))
        elif known.slot is not None:
            self.then(known.slot.handle.wake.remote(known.run_id), lambda f: self._woken(known, f))
        else:
            for assignment in (*known.pool.queue, *known.pool.urgent):
                if assignment.run_id == known.run_id:
                    assignment.wake = True

    def _woken(self, known: Known, future: Any) -> None:
        """Where the run actor had the run no longer it had just parked it: its log says so before its report does."""
        with self.lock:
            if self.runs.get(known.run_id) is not known or (future.exception() is None and future.result()):
                return
            if known.state == "parked":
                self.wake_locked(known)
            else:
                known.wake = True  # its report is still to come

    def pause_locked(self, known: Known) -> None:
        """The run pauses for a person, once what runs has ended."""
        if known.state == "parked":
            known.pause = False
            self.enqueue_locked(known, Assignment(known.run_id, cause="wake", pause=True))
        elif known.slot is not None:
            self.then(known.slot.handle.pause.remote(known.run_id), lambda f: self._paused(known, f))
        else:
            for assignment in (*known.pool.queue, *known.pool.urgent):
                if assignment.run_id == known.run_id:
                    assignment.pause = True

    def _paused(self, known: Known, future: Any) -> None:
        """As `_woken`: the run actor may just have parked the run."""
        with self.lock:
            if self.runs.get(known.run_id) is not known or (future.exception() is None and future.result()):
                return
            if known.state == "parked":
                self.pause_locked(known)
            else:
                known.pause = True

    def _again(self, known: Known, charged: bool) -> None:
        with self.lock:
            if self.runs.get(known.run_id) is known and known.state == "waiting":
                self.enqueue_locked(known, Assignment(known.run_id, cause="recovery", charged=charged))

    def due(self, known: Known, due_at: float | None) -> None:
        with self.lock:
            if self.runs.get(known.run_id) is known and known.state == "parked" and known.due_at == due_at:
                self.enqueue_locked(known, Assignment(known.run_id, cause="wake"))

    def tell_locked(self, run_id: str, what: str) -> None:
        self.news.append((run_id, what))
        self.told += 1
        self.changed.notify_all()

    # Timers -----------------------------------------------------------------------------------------------------

    def after_locked(self, seconds: float, act: Callable[[], None]) -> None:
        self.at_locked(time.time() + seconds, act)

    def at_locked(self, due_at: float, act: Callable[[], None]) -> None:
        self._timer_count += 1
        heapq.heappush(self._timers, (due_at, self._timer_count, act))
        self._timer_wake.notify()

    def next_timer_locked(self) -> tuple[int, float | None]:
        """How many timers are set, and when the first is due."""
        return len(self._timers), self._timers[0][0] if self._timers else None

    def _timer_loop(self) -> None:
        next_look = time.monotonic() + 10.0
        while True:
            with self.lock:
                due = self._timers[0][0] - time.time() if self._timers else _TICK_S
                if due > 0:
                    self._timer_wake.wait(min(due, _TICK_S))
                acts = []
                while self._timers and self._timers[0][0] <= time.time():
                    acts.append(heapq.heappop(self._timers)[2])
            for act in acts:
                try:
                    act()
                except Exception:
                    log.exception("a timer failed; going on")
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + 10.0
                self._let_go()

    def _let_go(self) -> None:
        with self.lock:
            for pool in self.pools.values():
                for slot in pool.surplus(time.monotonic()):
                    pool.slots.pop(slot.key)
                    pool.anchor.drop.remote(slot.key)


def make_anchor(
    config: RuntimeConfig, environment: CodeEnvironment, lease: str, cpus: int, actors: int, fresh: str = ""
) -> Any:
    """The anchor of this environment: made, or the one that is there. fresh: of a try after one that failed."""
    env = environment.runtime_env
    if fresh:
        env = {**env, "env_vars": {**(env.get("env_vars") or {}), _FRESH: fresh}}
    options: dict[str, Any] = {"runtime_env": env} if env else {}
    cls = as_actor(Anchor, max_concurrency=2)
    with contextlib.suppress(ValueError):
        return ray.get_actor(anchor_name(config.storage_id, environment.key), namespace=NAMESPACE)
    return cls.options(
        name=anchor_name(config.storage_id, environment.key),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        **options,
    ).remote(config, environment, lease, cpus, actors)
