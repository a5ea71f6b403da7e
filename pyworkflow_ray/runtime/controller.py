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

import logging
import os
import threading
import warnings
from collections import OrderedDict
from typing import Any

import ray

from pyworkflow_ray.engine.events import CodeEnvironment, RunCreated
from pyworkflow_ray.errors import (
    ConfigurationError,
    FencedError,
    RunExistsError,
    RunNotFoundError,
    StorageError,
    TooManyRunsError,
)
from pyworkflow_ray.runtime import rebuild, taking
from pyworkflow_ray.runtime.dispatcher import KEPT_NEWS, Dispatcher, Known
from pyworkflow_ray.runtime.gauges import watch_gauges
from pyworkflow_ray.runtime.messages import Assignment, Cursor, News, RunReport, RuntimeConfig, Submitted
from pyworkflow_ray.runtime.observer import ObserverProcess
from pyworkflow_ray.runtime.submission import difference
from pyworkflow_ray.runtime.upkeep import Upkeep
from pyworkflow_ray.runtime.vitals import Vitals, vitals_of
from pyworkflow_ray.storage.port import LeasePort

log = logging.getLogger("pyworkflow_ray.controller")

_GATHERED = 64  # news that are worth a message at once
ENDS = frozenset({"completed", "failed", "cancelled"})
GROUPS = {"submit": 4, "watch": 16, "control": 4}


class Controller(Dispatcher):
    """See the module. Public methods are called through Ray, each in a thread of its group."""

    def __init__(self, config: RuntimeConfig, lease_id: str, environment: CodeEnvironment, cpus: int) -> None:
        super().__init__(config, cpus)
        self.upkeep = Upkeep(config)
        self.observer = ObserverProcess(config)
        watch_gauges(config, self.observer.say)
        self._told_at: OrderedDict[str, int] = OrderedDict()  # of ends among the news: which of them
        with warnings.catch_warnings():  # Ray's own call to a name it has deprecated
            warnings.simplefilter("ignore")
            self.rebuilt = not ray.get_runtime_context().was_current_actor_reconstructed
        if self.rebuilt:
            self.lease = self._hold(lease_id)
            with self.lock:
                self.pool_locked(environment)
        else:
            threading.Thread(target=self._rebuild, args=(lease_id,), name="rebuild", daemon=True).start()

    def _hold(self, lease_id: str) -> LeasePort:
        try:
            return self.storage.join_lease(lease_id)
        except FencedError:  # somebody proved that nobody held it any more, and may have taken our runs
            return self.storage.join_lease()

    def _rebuild(self, lease_id: str) -> None:
        try:
            self.lease = self._hold(rebuild.lease_of_anchors(self) or lease_id)
            rebuild.rebuild(self)
        except Exception:
            log.exception("rebuilding failed; runs that were not found are taken up by recover()")
        with self.lock:
            self.rebuilt = True
            self.changed.notify_all()
            for pool in self.pools.values():
                self.pump_locked(pool)

    def _settled_lease(self) -> LeasePort:
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
            if self.draining:
                raise StorageError("the runtime is shutting down: no run is started", path=self.storage.root)
            for environment in {event.environment.key: event.environment for event in events}.values():
                pool = self.pool_locked(environment)
                if pool.broken:
                    self.make_anchor_locked(pool)
                self.changed.wait_for(lambda pool=pool: pool.held or pool.broken, timeout=60.0)  # type: ignore[misc]
                if pool.broken:
                    raise ConfigurationError(f"no run is started: its code environment can't be had: {pool.broken}")
                if not pool.held:
                    raise StorageError("no anchor holds the lease: is Ray out of resources?", path=self.storage.root)
        self._refuse_too_many(events)
        self._forget_removed(events)
        if any(event.hooks.get("alert") for event in events):
            self.observer.called()
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

    def _refuse_too_many(self, events: list[RunCreated]) -> None:
        """Where runs come faster than they are executed, tell whoever brings more. Those that exist are no more."""
        limit = self.config.max_pending
        if limit is None:
            return
        with self.lock:
            pending = sum(pool.waiting() for pool in self.pools.values())
        if pending + len(events) <= limit:
            return
        new = sum(1 for event in events if not self._exists(event.run_id))
        if new and pending + new > limit:
            raise TooManyRunsError(
                f"{new} run{'s are' if new > 1 else ' is'} not started: {pending} wait for a run actor already, and "
                f"max_pending is {limit}. Nothing was written: start again later, or raise max_pending or pool_max",
                pending=pending,
                limit=limit,
            )

    def _exists(self, run_id: str) -> bool:
        try:
            self.storage.owner(run_id)
        except RunNotFoundError:
            return False
        except StorageError as error:
            log.debug("run %s: %s", run_id, error)  # creating it says what is wrong
        return True

    def _forget_removed(self, events: list[RunCreated]) -> None:
        """What is still told of an older run of an id, which retention removed, must not be taken for the new one."""
        for event in events:
            if event.run_id in self._told_at:
                try:
                    self.storage.owner(event.run_id)
                except RunNotFoundError:
                    with self.lock:
                        at = self._told_at.pop(event.run_id, self.told) - self.told - 1
                        if -len(self.news) <= at < 0:
                            self.news[at] = (event.run_id, "forgotten")
                        self.results.pop(event.run_id, None)
                except StorageError as error:
                    log.debug("run %s: %s", event.run_id, error)  # creating it says what is wrong

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
    def watch(self, cursor: Cursor | None, timeout_s: float, gather_s: float) -> News:
        """What became of runs since `cursor`; waits up to `timeout_s` for something, then `gather_s` for more."""
        with self.lock:
            if cursor is None or cursor[0] != self.me or self.told - cursor[1] > len(self.news):
                return News((self.me, self.told), [], reset=True)
            if cursor[1] == self.told:
                self.changed.wait_for(lambda: self.told > cursor[1], timeout=timeout_s)
            if gather_s and self.told > cursor[1]:
                self.changed.wait_for(lambda: self.told > cursor[1] + _GATHERED, timeout=gather_s)
            new = self.told - cursor[1]
            if new > len(self.news):
                return News((self.me, self.told), [], reset=True)
            changes = [self.news[i] for i in range(len(self.news) - new, len(self.news))]
            told = [
                (run_id, what, self.results.get(run_id) if what == "completed" else None) for run_id, what in changes
            ]
            return News((self.me, self.told), told)

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
            self.wake_locked(known)
            return "asked"

    @ray.method(concurrency_group="control")
    def pause(self, run_id: str) -> str:
        """The run pauses for a person, once what runs has ended; "nothing" where it has ended or is paused."""
        with self.lock:
            known = self.runs.get(run_id)
            if known is not None:
                self.pause_locked(known)
                return "asked" if known.state != "paused" else "nothing"
        return taking.pause(self, run_id)

    @ray.method(concurrency_group="control")
    def recover(self, steal: bool) -> list[str]:
        """Take up the unfinished runs that no living owner holds. Their ids."""
        return taking.recover(self, steal)

    @ray.method(concurrency_group="control")
    def ready(self) -> dict[str, Any]:
        """Answers once it works: lease, pid, and what its pools hold."""
        lease = self._settled_lease()
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
            return {"lease": lease.id, "pid": os.getpid(), "rebuilt": self.rebuilt, "pools": pools, "me": self.me}

    @ray.method(concurrency_group="control")
    def vitals(self) -> Vitals:
        """How it does: for `pw.health()`."""
        return vitals_of(self)

    @ray.method(concurrency_group="control")
    def drain(self, timeout_s: float) -> bool:
        """No new starts, no new steps; True once all steps that run have ended."""
        with self.lock:
            self.draining = True
            slots = [slot for pool in self.pools.values() for slot in pool.slots.values() if slot.executing]
            refs = [slot.handle.drain.remote(timeout_s) for slot in slots]
        done = True
        for ref in refs:
            try:
                done = bool(ray.get(ref, timeout=timeout_s + 2.0)) and done
            except Exception:
                done = False
        self.observer.end()
        return done

    def tell_locked(self, run_id: str, what: str) -> None:
        super().tell_locked(run_id, what)
        self.observer.tell(run_id)
        if what in ENDS:
            self.upkeep.ended()
            self._told_at[run_id] = self.told
            if len(self._told_at) > KEPT_NEWS:
                self._told_at.popitem(last=False)

    def commits_took(self, seconds: list[float]) -> None:
        if seconds:
            self.observer.say({"commits": seconds})

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
