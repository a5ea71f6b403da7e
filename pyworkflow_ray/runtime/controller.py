"""The controller: one detached, restartable actor a storage. It decides everything and owns nothing that may not die.

Called by clients (`submit`, `watch`, control calls) and by run actors (`progress`); calls anchors and run actors,
never waiting for them with its lock held. Rules:

* A run is acknowledged when its first file is durable, and an anchor holds the lease by then.
* Epoch 0 is handed out once. Whoever does not know whether that has happened opens the next epoch.
* A run actor's death is noticed by the end of its `execute` call; its run goes on at once on another warm actor.

Faults: SIGKILL at any instant; Ray restarts it, and `rebuild` finds the living run actors through the anchors and the
rest in the storage. Answers of calls may be lost: every call may be made again. Callbacks of Ray's futures come on
Ray's threads: they take the lock for a moment and never wait for a call.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import exceptions as rx

from pyworkflow_ray.engine.events import CodeEnvironment, RunCreated
from pyworkflow_ray.errors import FencedError, RunExistsError, StorageError
from pyworkflow_ray.execution.environment import python_version
from pyworkflow_ray.runtime import faults, rebuild, taking
from pyworkflow_ray.runtime.anchor import Anchor
from pyworkflow_ray.runtime.messages import (
    NAMESPACE,
    Assignment,
    News,
    RunReport,
    RuntimeConfig,
    Submitted,
    anchor_name,
)
from pyworkflow_ray.runtime.pool import Pool, Slot
from pyworkflow_ray.runtime.process import enter_process
from pyworkflow_ray.runtime.submission import difference
from pyworkflow_ray.storage.lease import Lease

log = logging.getLogger("pyworkflow_ray.controller")

GROUPS = {"submit": 4, "watch": 16, "control": 4}
_KEPT_NEWS = 100_000
_TICK_S = 1.0  # the clock may jump: due times are compared so often
_START_FAILURES = 4


@dataclass(slots=True, eq=False)
class Known:
    """An unfinished run of this lease. state: "queued", "running", "parked", "paused" or "waiting" (to be tried again).
    cancel: a cancel that the run has not been told of yet."""

    run_id: str
    pool: Pool
    state: str = "queued"
    slot: Slot | None = None
    due_at: float | None = None
    cancel: tuple[str | None] | None = None
    failures: int = 0


class Controller:
    """See the module. Public methods are called through Ray, each in a thread of its group."""

    def __init__(self, config: RuntimeConfig, lease_id: str, environment: CodeEnvironment, cpus: int) -> None:
        self.config = config
        self.me = uuid.uuid4().hex
        self.process = enter_process(config)
        self.storage = self.process.storage
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.pools: dict[str, Pool] = {}
        self.runs: dict[str, Known] = {}
        self.cpus = cpus
        self.lease: Lease | None = None
        self._news: deque[tuple[str, str]] = deque(maxlen=_KEPT_NEWS)
        self._told = 0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_count = 0
        self._draining = False
        with warnings.catch_warnings():  # Ray's own call to a name it has deprecated
            warnings.simplefilter("ignore")
            self._rebuilt = not ray.get_runtime_context().was_current_actor_reconstructed
        self._timer_wake = threading.Condition(self.lock)
        if self._rebuilt:
            self.lease = self._hold(lease_id)
            with self.lock:
                self.pool_locked(environment)
        else:
            threading.Thread(target=self._rebuild, args=(lease_id,), name="rebuild", daemon=True).start()
        threading.Thread(target=self._timer_loop, name="timers", daemon=True).start()

    def _hold(self, lease_id: str) -> Lease:
        try:
            return Lease.join(self.storage, lease_id)
        except FencedError:  # somebody proved that nobody held it any more, and may have taken our runs
            return Lease.join(self.storage)

    def _rebuild(self, lease_id: str) -> None:
        try:
            self.lease = self._hold(rebuild.lease_of_anchors(self) or lease_id)
            rebuild.rebuild(self)
        except Exception:
            log.exception("rebuilding failed; runs that were not found are taken up by recover()")
        with self.lock:
            self._rebuilt = True
            self.changed.notify_all()
            for pool in self.pools.values():
                self.pump_locked(pool)

    def _settled_lease(self) -> Lease:
        with self.lock:
            self.changed.wait_for(lambda: self.lease is not None, timeout=60.0)
            if self.lease is None:
                raise StorageError("the controller could not get its lease", path=self.storage.root)
            return self.lease

    # Called by clients ------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="submit")
    def submit(self, events: list[RunCreated]) -> list[Submitted]:
        """Make the runs, durably, and hand them out. Made again with the same events it makes nothing new."""
        lease = self._settled_lease()
        with self.lock:
            if self._draining:
                raise StorageError("the runtime is shutting down: no run is started", path=self.storage.root)
            for environment in {event.environment.key: event.environment for event in events}.values():
                pool = self.pool_locked(environment)
                self.changed.wait_for(lambda pool=pool: pool.held, timeout=60.0)  # type: ignore[misc]
                if not pool.held:
                    raise StorageError("no anchor holds the lease: is Ray out of resources?", path=self.storage.root)
        made = self.storage.create_runs(events, lease=lease.id)
        answers = [
            Submitted(event.run_id, "created", event.run_uid) if new else self._existing(event)
            for event, new in zip(events, made, strict=True)
        ]
        with self.lock:
            touched = {}
            for event, new in zip(events, made, strict=True):
                if new:
                    pool = self.pool_locked(event.environment)
                    self.runs[event.run_id] = Known(event.run_id, pool)
                    pool.queue.append(Assignment(event.run_id, first=True))
                    touched[event.environment.key] = pool
            for pool in touched.values():
                self.pump_locked(pool)
        return answers

    def _existing(self, event: RunCreated) -> Submitted:
        try:
            old = self.storage.read_run(event.run_id).events[0]
        except Exception as error:
            return Submitted(event.run_id, "refused", error=error)
        assert isinstance(old, RunCreated)
        if old.run_uid == event.run_uid:
            return Submitted(event.run_id, "created", old.run_uid)  # our own answer was lost
        why = difference(old, event)
        if why is None:
            return Submitted(event.run_id, "exists", old.run_uid)
        text = f"run {event.run_id!r} exists, and {why}. Choose another run_id, or get it: pw.get_run({event.run_id!r})"
        return Submitted(event.run_id, "refused", error=RunExistsError(text, run_id=event.run_id))

    @ray.method(concurrency_group="watch")
    def watch(self, cursor: tuple[str, int] | None, timeout_s: float) -> News:
        """What became of runs since `cursor`; waits up to `timeout_s` for something."""
        with self.lock:
            if cursor is None or cursor[0] != self.me or self._told - cursor[1] > len(self._news):
                return News((self.me, self._told), [], reset=True)
            if cursor[1] == self._told:
                self.changed.wait_for(lambda: self._told > cursor[1], timeout=timeout_s)
            new = self._told - cursor[1]
            if new > len(self._news):
                return News((self.me, self._told), [], reset=True)
            changes = [self._news[i] for i in range(len(self._news) - new, len(self._news))]
            return News((self.me, self._told), changes)

    @ray.method(concurrency_group="control")
    def states(self, run_ids: list[str] | None = None) -> dict[str, str]:
        """State of the unfinished runs of this lease ("queued", "running", "parked", "paused", "waiting")."""
        with self.lock:
            chosen = self.runs if run_ids is None else {r: self.runs[r] for r in run_ids if r in self.runs}
            return {run_id: known.state for run_id, known in chosen.items()}

    @ray.method(concurrency_group="control")
    def cancel(self, run_id: str, reason: str | None) -> str:
        """Ask for a run to be cancelled: "asked", "ended" (it has ended before), or raises why it can't be."""
        with self.lock:
            known = self.runs.get(run_id)
            if known is None:
                return taking.take_up(self, run_id, "cancel", cancel=(reason,))
            known.cancel = (reason,)
            self.deliver_cancel_locked(known)
            return "asked"

    @ray.method(concurrency_group="control")
    def resume(self, run_id: str) -> str:
        """A paused run goes on, a failed one from its failed step; others are left alone ("nothing")."""
        return taking.resume(self, run_id)

    @ray.method(concurrency_group="control")
    def wake(self, run_id: str) -> str:
        """Retries that the run waits for happen now."""
        with self.lock:
            known = self.runs.get(run_id)
            if known is None:
                return "nothing"
            if known.state == "parked":
                self.enqueue_locked(known, Assignment(run_id, cause="wake", wake=True))
            elif known.slot is not None:
                known.slot.handle.wake.remote(run_id)
            return "asked"

    @ray.method(concurrency_group="control")
    def recover(self, steal: bool) -> list[str]:
        """Take up the unfinished runs that no living owner holds. Their ids."""
        return taking.recover(self, steal)

    @ray.method(concurrency_group="control")
    def ready(self) -> dict[str, Any]:
        """Answers once it works: lease, pid, and what its pools hold."""
        lease = self._settled_lease()
        import os

        with self.lock:
            pools = {
                key: {
                    "actors": len(p.slots),
                    "idle": sum(s.idle for s in p.slots.values()),
                    "busy": p.busy(),
                    "waiting": p.waiting(),
                    "held": p.held,
                }
                for key, p in self.pools.items()
            }
            return {"lease": lease.id, "pid": os.getpid(), "rebuilt": self._rebuilt, "pools": pools, "me": self.me}

    @ray.method(concurrency_group="control")
    def drain(self, timeout_s: float) -> bool:
        """No new starts, no new steps; True once all steps that run have ended."""
        with self.lock:
            self._draining = True
            slots = [slot for pool in self.pools.values() for slot in pool.slots.values() if slot.executing]
            refs = [slot.handle.drain.remote(timeout_s) for slot in slots]
        done = True
        for ref in refs:
            try:
                done = bool(ray.get(ref, timeout=timeout_s + 2.0)) and done
            except Exception:
                done = False
        return done

    # Called by run actors ---------------------------------------------------------------------------------------

    @ray.method(concurrency_group="control")
    def progress(self, key: str, reports: list[RunReport]) -> None:
        """A batch takes long: what is done of it, and what the run actor gives back untouched."""
        with self.lock:
            for pool in self.pools.values():
                slot = pool.slots.get(key)
                if slot is not None:
                    for report in reports:
                        self.report_locked(pool, slot, report)
                    self.pump_locked(pool)

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
        pool.anchor = make_anchor(self.config, env, lease, self.cpus, pool.least)
        pool.anchor.hold.remote(lease).future().add_done_callback(lambda f: self._anchor_holds(pool, f))

    def _anchor_holds(self, pool: Pool, future: Any) -> None:
        with self.lock:
            if future.exception() is None:
                pool.incarnation = future.result()
                pool.held = True
                self.changed.notify_all()
                self.refresh_locked(pool)
            else:
                log.debug("anchor does not answer yet: %s", faults.first_line(future.exception()))
                self.after_locked(0.2, lambda: self._anchor_again(pool, future.exception()))

    def _anchor_again(self, pool: Pool, error: BaseException) -> None:
        with self.lock:
            if isinstance(error, rx.ActorDiedError):  # for good, not restarting: #44083 hands out such handles
                self.make_anchor_locked(pool)
            else:
                lease = self.lease.id if self.lease is not None else ""
                pool.anchor.hold.remote(lease).future().add_done_callback(lambda f: self._anchor_holds(pool, f))

    def refresh_locked(self, pool: Pool) -> None:
        """Ask the anchor for its run actors, adopt those that are new to us."""
        pool.anchor.actors.remote().future().add_done_callback(lambda f: self._listed(pool, f))

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
        pool.anchor.hold.remote(lease).future().add_done_callback(lambda f: self._anchor_holds(pool, f))

    def adopt_locked(self, pool: Pool, key: str, handle: Any) -> None:
        if key in pool.slots:
            return
        slot = pool.slots[key] = Slot(key, handle)
        handle.ready.remote().future().add_done_callback(lambda f: self._actor_ready(pool, slot, f))

    def _actor_ready(self, pool: Pool, slot: Slot, future: Any) -> None:
        with self.lock:
            error = future.exception()
            if error is None:
                pool.failures = 0
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
                self._no_environment_locked(pool, error)
            self.after_locked(min(5.0, 0.1 * 2.0**pool.failures) + 0.01, lambda: self._pump(pool))

    def _no_environment_locked(self, pool: Pool, error: BaseException) -> None:
        waiting = [*pool.urgent, *pool.queue]
        pool.urgent.clear()
        pool.queue.clear()
        for assignment in waiting:
            self.pause_here(assignment, f"its code environment can't be had here: {faults.first_line(error)}")

    def pause_here(self, assignment: Assignment, why: str) -> None:
        """Pause a run that no run actor can take."""
        report = taking.pause_run(self, assignment, why)
        with self.lock:
            known = self.runs.get(assignment.run_id)
            if known is not None:
                self.report_locked(known.pool, None, report)

    def grow_locked(self, pool: Pool) -> None:
        missing = pool.missing(time.monotonic()) if pool.held and not self._draining else 0
        if missing <= 0:
            return
        pool.asked += missing
        pool.anchor.make.remote(missing).future().add_done_callback(lambda f: self._made(pool, missing, f))

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
        if not self._rebuilt or self._draining:
            return
        if pool.environment.python != python_version() and pool.waiting():
            error = RuntimeError(f"it needs Python {pool.environment.python}, this cluster runs {python_version()}")
            self.after_locked(0.0, lambda: self._no_environment(pool, error))
            return
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

    def _no_environment(self, pool: Pool, error: BaseException) -> None:
        with self.lock:
            self._no_environment_locked(pool, error)

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
        ref.future().add_done_callback(lambda f: self._executed(pool, slot, f))

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
        lost = list((slot.batch or {}).values())
        slot.batch = {}
        log.info("a run actor was lost with %d runs: %s", len(lost), faults.first_line(error))
        charged = faults.lost_actor_is_charged(error)
        pool.anchor.incarnation.remote().future().add_done_callback(
            lambda f: self._resume_lost(pool, lost, charged, f)
        )

    def _resume_lost(self, pool: Pool, lost: list[Assignment], charged: bool, future: Any) -> None:
        """The anchor has said whether it was its death: then nobody is charged."""
        with self.lock:
            failed = future.exception()
            if failed is not None:
                charged = False
                self.after_locked(0.2, lambda: self._anchor_again(pool, failed))
            elif future.result() != pool.incarnation:
                charged = False
                self.anchor_changed_locked(pool, future.result())
            for before in lost:
                known = self.runs.get(before.run_id)
                if known is not None:
                    again = Assignment(before.run_id, cause="recovery", charged=charged)
                    again.cancel, again.resets = before.cancel, before.resets
                    if before.resets:
                        again.cause = "resume"
                    self.enqueue_locked(known, again, urgent=True)
            self.pump_locked(pool)

    def report_locked(self, pool: Pool, slot: Slot | None, report: RunReport) -> None:
        """What a run actor says of one run. Said twice it changes nothing."""
        assignment = slot.batch.pop(report.run_id, None) if slot is not None and slot.batch else None
        known = self.runs.get(report.run_id)
        if known is None or (slot is not None and known.slot is not slot):
            return
        known.slot = None
        match report.what:
            case "finished" | "fenced" | "damaged":
                self.runs.pop(report.run_id)
                self.tell_locked(report.run_id, report.status or report.what)
            case "parked":
                known.state, known.due_at, known.failures = "parked", report.due_at, 0
                self.tell_locked(report.run_id, "parked")
                self.at_locked(report.due_at or time.time(), lambda: self._due(known, report.due_at))
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

    def _again(self, known: Known, charged: bool) -> None:
        with self.lock:
            if self.runs.get(known.run_id) is known and known.state == "waiting":
                self.enqueue_locked(known, Assignment(known.run_id, cause="recovery", charged=charged))

    def _due(self, known: Known, due_at: float | None) -> None:
        with self.lock:
            if self.runs.get(known.run_id) is known and known.state == "parked" and known.due_at == due_at:
                self.enqueue_locked(known, Assignment(known.run_id, cause="wake"))

    def tell_locked(self, run_id: str, what: str) -> None:
        self._news.append((run_id, what))
        self._told += 1
        self.changed.notify_all()

    # Timers -----------------------------------------------------------------------------------------------------

    def after_locked(self, seconds: float, act: Callable[[], None]) -> None:
        self.at_locked(time.time() + seconds, act)

    def at_locked(self, due_at: float, act: Callable[[], None]) -> None:
        self._timer_count += 1
        heapq.heappush(self._timers, (due_at, self._timer_count, act))
        self._timer_wake.notify()

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


def make_anchor(config: RuntimeConfig, environment: CodeEnvironment, lease: str, cpus: int, actors: int) -> Any:
    """The anchor of this environment: made, or the one that is there."""
    options: dict[str, Any] = {"runtime_env": environment.runtime_env} if environment.runtime_env else {}
    cls = ray.remote(max_concurrency=2)(Anchor)
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
