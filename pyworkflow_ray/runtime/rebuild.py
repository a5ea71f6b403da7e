"""A restarted controller finds its runs again: living run actors through the anchors, the rest in the storage.

Called by `controller`, in a thread of its own, before it hands anything out. What an earlier controller handed out and
nobody is seen to have is never handed out again: such a run is taken up by the next epoch, and a late first hand-out is
fenced.

Faults: anchors or run actors that died, are dying or are stopped: every question has a time limit.
"""

from __future__ import annotations

import functools
import logging
import random
import time
from typing import TYPE_CHECKING, Any

import ray

from pyworkflow_ray.errors import StorageError
from pyworkflow_ray.resilience.retry import spread
from pyworkflow_ray.runtime.messages import ANCHOR, NAMESPACE, Assignment, Doing
from pyworkflow_ray.runtime.pool import Slot
from pyworkflow_ray.runtime.taking import enlist, standing

if TYPE_CHECKING:
    from pyworkflow_ray.runtime.dispatcher import Dispatcher, Known

log = logging.getLogger("pyworkflow_ray.controller")

_ANCHOR_S = 5.0
_ACTOR_S = 3.0


def anchors(storage_id: str) -> list[Any]:
    """Handles of the storage's anchors."""
    prefix = f"{ANCHOR}:{storage_id}:"
    found = []
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == NAMESPACE and entry["name"].startswith(prefix):
            try:
                found.append(ray.get_actor(entry["name"], namespace=NAMESPACE))
            except ValueError:
                continue
    return found


def lease_of_anchors(controller: Dispatcher) -> str | None:
    """The lease that the anchors hold: it may be newer than the one this actor was made with."""
    refs = [anchor.lease.remote() for anchor in anchors(controller.config.storage_id)]
    for lease in _answers(refs, _ANCHOR_S):
        if lease:
            return str(lease)
    return None


def rebuild(controller: Dispatcher) -> None:
    """Fill the books of `controller`."""
    began = time.monotonic()
    living = 0
    for anchor in anchors(controller.config.storage_id):
        answer = _answers([anchor.survey.remote()], _ANCHOR_S)
        if not answer:
            continue
        environment, incarnation, listed = answer[0]
        with controller.lock:
            pool = controller.pool_locked(environment)
            pool.incarnation = incarnation
        handles = dict(listed)
        for doing in _answers([handle.doing.remote() for handle in handles.values()], _ACTOR_S):
            _adopt(controller, pool, handles[doing.key], doing)
            living += 1
    with controller.lock:
        in_hand = set(controller.runs)
    taken = _from_storage(controller, in_hand)
    log.info(
        "controller restarted: %d run actors with %d runs, %d runs from the storage, %.2f s",
        living, len(in_hand), taken, time.monotonic() - began,
    )  # fmt: skip


def _adopt(controller: Dispatcher, pool: Any, handle: Any, doing: Doing) -> None:
    from pyworkflow_ray.runtime.dispatcher import Known

    with controller.lock:
        slot = pool.slots.get(doing.key)
        if slot is None:
            slot = pool.slots[doing.key] = Slot(doing.key, handle, pool.incarnation)
        slot.batch = {}
        if doing.run_id is not None:
            doing.queued.insert(0, Assignment(doing.run_id, cause="recovery"))
        for assignment in doing.queued:
            slot.batch[assignment.run_id] = assignment
            controller.runs[assignment.run_id] = Known(assignment.run_id, pool, "running", slot)
        for report in doing.done:  # told to a controller that is gone; `execute` tells it again, but clients wait
            known = controller.runs.setdefault(report.run_id, Known(report.run_id, pool, "running", slot))
            known.slot = slot
        controller.hand_out_locked(pool, slot, [])


def _from_storage(controller: Dispatcher, in_hand: set[str]) -> int:
    mine = controller.lease.id if controller.lease is not None else ""
    taken = 0
    overdue: list[tuple[Known, float]] = []
    for run_id in controller.storage.unfinished():
        with controller.lock:
            if run_id in in_hand or run_id in controller.runs:
                continue
        try:
            if controller.storage.owner(run_id).lease != mine:
                continue
            history = controller.storage.read_run(run_id)
            if history.finished:
                controller.storage.unlist_finished(run_id)
                continue
        except StorageError as error:
            log.error("run %s can't be read and was left alone: %s", run_id, error)
            continue
        _take(controller, history.events, run_id, overdue)
        taken += 1
    with controller.lock:
        for (known, due_at), after_s in zip(overdue, spread(len(overdue), random.Random()), strict=True):
            controller.after_locked(after_s, functools.partial(controller.due, known, due_at))
    return taken


def _take(controller: Dispatcher, events: list[Any], run_id: str, overdue: list[tuple[Known, float]]) -> None:
    """Take one run into the books; parked ones that fell due meanwhile go to `overdue`."""
    from pyworkflow_ray.runtime.dispatcher import Known

    state, due_at = standing(events)
    if state not in ("parked", "paused"):
        enlist(controller, events, Assignment(run_id, cause="recovery", charged=False))
        return
    with controller.lock:
        if run_id in controller.runs:
            return
        known = Known(run_id, controller.pool_locked(events[0].environment), state, due_at=due_at)
        controller.runs[run_id] = known
        if due_at is not None and due_at <= time.time():
            overdue.append((known, due_at))
        elif due_at is not None:
            controller.at_locked(due_at, lambda: controller.due(known, due_at))


def _answers(refs: list[Any], timeout_s: float) -> list[Any]:
    """The answers that come in time."""
    if not refs:
        return []
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
    answers = []
    for ref in done:
        try:
            answers.append(ray.get(ref, timeout=1.0))
        except Exception as error:
            log.debug("no answer: %s", error)
    return answers
