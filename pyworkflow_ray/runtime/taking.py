"""Runs that the controller does not know yet, or no more: recover, resume, cancel of others' runs, pausing here.

Called by `controller`, whose lock guards its books; reads and writes the storage without holding it.
"""

from __future__ import annotations

import functools
import logging
import random
import time
from typing import TYPE_CHECKING

from pyworkflow_ray.engine.events import (
    Event,
    RunActivated,
    RunCreated,
    RunFailed,
    RunParked,
    RunPaused,
    StepScheduled,
)
from pyworkflow_ray.engine.history import failed_positions
from pyworkflow_ray.errors import FencedError, RunError, StorageError
from pyworkflow_ray.resilience.retry import spread
from pyworkflow_ray.runtime.active_run import ActiveRun
from pyworkflow_ray.runtime.messages import Assignment, Cause, RunReport
from pyworkflow_ray.storage.journal import RETIRED
from pyworkflow_ray.storage.lease import Orphan, Orphans, orphans
from pyworkflow_ray.storage.port import JournalPort, StoragePort

if TYPE_CHECKING:
    from pyworkflow_ray.runtime.dispatcher import Dispatcher

log = logging.getLogger("pyworkflow_ray.controller")

_REPORT_S = 10.0  # a report follows its event within milliseconds, if its actor lives


def standing(events: list[Event]) -> tuple[str, float | None]:
    """How an unfinished run stands by its events: "parked" with its due time, "paused", "pending" or "running"."""
    for event in reversed(events):
        if isinstance(event, RunParked):
            return "parked", event.due_at
        if isinstance(event, RunPaused):
            return "paused", None
        if isinstance(event, RunActivated):
            return "running", None
    return "pending", None


def activate(storage: StoragePort, given: Assignment, lease: str) -> tuple[JournalPort, list[Event]]:
    """Open the run's next epoch for the owner `lease`, which does not take back what was stolen from it.

    Raises:
        FencedError: another owner, who may live, has the run. StorageError and others: as `Storage.activate`.
    """
    after = given.after
    if after is None and not given.first:
        owner = storage.owner(given.run_id)
        if owner.lease not in ("", RETIRED, lease) and owner.lease not in storage.lease_states(declare=False).dead:
            raise FencedError(f"run {given.run_id!r} was taken by another owner (lease {owner.lease[:8]})")
        after = owner.epoch  # exactly the next one: whoever takes the run between our look and our claim wins
    journal, events = storage.activate(given.run_id, lease, first=given.first, after=after)
    return journal, events


def recover(controller: Dispatcher, steal: bool) -> list[str]:
    """Take up what nobody holds, or with `steal` what any other lease holds. A paused run waits for a person still."""
    found = orphans(controller.storage)
    if steal:
        _add_held(controller, found)
    for run_id, why in found.damaged.items():
        log.error("run %s is damaged and was left alone: %s", run_id, why)
    taken = []
    overdue: list[tuple[list[Event], Assignment]] = []
    for orphan in found.runs:
        with controller.lock:
            if orphan.run_id in controller.runs:
                continue
        try:
            history = controller.storage.read_run(orphan.run_id)
        except StorageError as error:
            log.error("run %s can't be read and was left alone: %s", orphan.run_id, error)
            continue
        state, due_at = standing(history.events)
        if state == "paused":
            continue
        assignment = Assignment(orphan.run_id, cause="recovery", after=orphan.epoch)
        if state == "parked" and (due_at or 0.0) <= time.time():
            overdue.append((history.events, assignment))
        else:
            enlist(controller, history.events, assignment)
        taken.append(orphan.run_id)
    with controller.lock:
        for (events, assignment), after_s in zip(overdue, spread(len(overdue), random.Random()), strict=True):
            controller.after_locked(after_s, functools.partial(enlist, controller, events, assignment))
    return taken


def _add_held(controller: Dispatcher, found: Orphans) -> None:
    """Runs of other, living owners too. The next epoch is ours at once, whenever a run actor of ours is free: from here
    on their appends are refused, and they stop."""
    mine = controller.lease.id if controller.lease is not None else ""
    for run_id, lease in found.held.items():
        if lease == mine:
            continue
        try:
            if standing(controller.storage.read_run(run_id).events)[0] == "paused":
                continue
            owner = controller.storage.owner(run_id)
            journal, _ = controller.storage.activate(run_id, mine, after=owner.epoch)
            journal.close()
        except FencedError:
            continue  # somebody was faster
        except StorageError as error:
            found.damaged[run_id] = str(error)
            continue
        log.warning("run %s is taken from its owner (lease %s), which may live", run_id, lease[:8])
        found.runs.append(Orphan(run_id, journal.epoch, mine))


def enlist(controller: Dispatcher, events: list[Event], assignment: Assignment) -> None:
    """Take a run into the books and let it wait for a run actor."""
    from pyworkflow_ray.runtime.dispatcher import Known

    created = events[0]
    assert isinstance(created, RunCreated)
    with controller.lock:
        if assignment.run_id in controller.runs:
            return
        known = Known(assignment.run_id, controller.pool_locked(created.environment))
        known.cancel = assignment.cancel
        controller.runs[assignment.run_id] = known
        controller.enqueue_locked(known, assignment, urgent=assignment.cause == "recovery")


def take_up(controller: Dispatcher, run_id: str, cause: Cause, *, cancel: tuple[str | None] | None = None) -> str:
    """Take a run up that is not in the books. "ended" where there is nothing to take.

    Raises:
        RunNotFoundError, StorageError: as `read_run`.
        RunError: another, living Ray owns it.
    """
    history = controller.storage.read_run(run_id)
    if history.finished:
        return "ended"
    check_owner(controller, run_id, history.lease)
    assignment = Assignment(run_id, cause=cause, cancel=cancel, after=history.epoch)
    enlist(controller, history.events, assignment)
    return "asked"


def pause(controller: Dispatcher, run_id: str) -> str:
    """See `Controller.pause`, of a run that is not in the books."""
    history = controller.storage.read_run(run_id)
    if history.finished or standing(history.events)[0] == "paused":
        return "nothing"
    check_owner(controller, run_id, history.lease)
    enlist(controller, history.events, Assignment(run_id, cause="recovery", pause=True, after=history.epoch))
    return "asked"


def check_owner(controller: Dispatcher, run_id: str, lease: str) -> None:
    mine = controller.lease.id if controller.lease is not None else ""
    if lease in ("", RETIRED, mine) or lease in controller.storage.lease_states(declare=True).dead:
        return
    raise RunError(
        f"run {run_id!r} is owned by another Ray that lives (lease {lease[:8]}): ask there, or stop it and recover()",
        run_id=run_id,
    )


def resume(controller: Dispatcher, run_id: str) -> str:
    """See `Controller.resume`."""
    _await_report(controller, run_id)
    with controller.lock:
        known = controller.runs.get(run_id)
        if known is not None:
            if known.state != "paused":
                return "nothing"
            controller.enqueue_locked(known, Assignment(run_id, cause="resume"))
            return "asked"
    history = controller.storage.read_run(run_id)
    if isinstance(history.events[-1], RunFailed) and (
        history.lease == RETIRED or controller.storage.is_retired(run_id)
    ):
        raise RunError(
            f"run {run_id!r} failed and was compacted since (compact_failed_after, retain): it can't go on. Start it "
            f"anew: pyworkflow-ray runs rerun {run_id}",
            run_id=run_id,
        )
    if not history.finished:
        if standing(history.events)[0] != "paused":
            return "nothing"
        check_owner(controller, run_id, history.lease)
        enlist(controller, history.events, Assignment(run_id, cause="resume", after=history.epoch))
        return "asked"
    ended = next((e for e in reversed(history.events) if isinstance(e, RunFailed)), None)
    if ended is None or history.events[-1] is not ended:
        return "nothing"
    if any(isinstance(event, StepScheduled) and event.compensates for event in history.events):
        raise RunError(
            f"run {run_id!r} failed and its compensations have run: what its steps did is undone, so it can't go on "
            f"from there. Start it anew: pyworkflow-ray runs rerun {run_id}",
            run_id=run_id,
        )
    resets = failed_positions(history.events)
    if not resets:
        raise RunError(
            f"run {run_id!r} failed in the workflow's own code ({ended.error.type}: {ended.error.message}), not in a "
            "step: there is no step to go on from. Correct the code, then start it anew: "
            f"pyworkflow-ray runs rerun {run_id}",
            run_id=run_id,
        )
    enlist(controller, history.events, Assignment(run_id, cause="resume", resets=resets, after=history.epoch))
    return "asked"


def _await_report(controller: Dispatcher, run_id: str) -> None:
    """Where the log says that the run paused or ended and its run actor's report has not come yet: wait for that."""

    def reported() -> bool:
        known = controller.runs.get(run_id)
        return known is None or known.slot is None

    with controller.lock:
        if reported():
            return
    history = controller.storage.read_run(run_id)
    if history.finished or standing(history.events)[0] == "paused":
        with controller.lock:
            controller.changed.wait_for(reported, timeout=_REPORT_S)


class _Nobody:
    def dispatch_locked(self, call: object) -> None:
        raise AssertionError("a run that is paused dispatches nothing")

    def withdraw_locked(self, position: str, dispatch: int) -> None:
        pass

    def look_again(self) -> None:
        pass


def pause_run(controller: Dispatcher, given: Assignment, why: str) -> RunReport:
    """Pause a run from here, by an epoch of its own: no run actor can take it."""
    lease = controller.lease.id if controller.lease is not None else ""
    try:
        journal, events = activate(controller.storage, given, lease)
        who = (controller.process.worker, controller.process.node)
        run = ActiveRun(given, journal, events, _Nobody(), who=who)
        message = f"run {given.run_id!r} is paused: {why}. Then: pyworkflow-ray runs resume {given.run_id}"
        run.pause_locked("environment", message, lease)
        assert run.report is not None
        return run.report
    except FencedError:
        return RunReport(given.run_id, "fenced")
    except StorageError as error:
        return RunReport(given.run_id, "damaged", message=str(error))
