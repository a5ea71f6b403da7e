"""How the runtime does: asked of Ray, the controller, the anchors and the run actors, for `pyworkflow_ray.health`.

Every function here may hang (a stopped process answers nobody) or raise what Ray raises: the caller gives each a thread
and a time limit. Nothing is started and nothing is changed, but that a process which has no Ray is connected to the one
that runs. `vitals_of` is the controller's own side.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray import exceptions as rx

from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.observability.health import Absent
from pyworkflow_ray.runtime.messages import NAMESPACE, Doing, controller_name
from pyworkflow_ray.runtime.rebuild import anchors as anchors_of
from pyworkflow_ray.runtime.typed_ray import cluster_resources, living_nodes

if TYPE_CHECKING:
    from pyworkflow_ray.runtime.dispatcher import Dispatcher

_NAMED = 10  # late runs that are told by name


@dataclass(slots=True)
class PoolVitals:
    """One code environment's run actors. starting: not ready yet. waiting: runs without one. failures: starts in a row
    that failed. held: its anchor holds the lease."""

    environment: str
    actors: int
    starting: int
    busy: int
    waiting: int
    most: int
    failures: int
    held: bool


@dataclass(slots=True)
class Vitals:
    """What the controller says of itself. states: how many runs stand how. timer_lag_s: of its oldest timer that is
    due. late: parked runs that are overdue, by how many seconds, the latest first."""

    pid: int
    lease: str
    rebuilt: bool
    draining: bool
    pools: list[PoolVitals]
    states: dict[str, int]
    timers: int
    timer_lag_s: float
    late: list[tuple[str, float]] = field(default_factory=list)


def vitals_of(controller: Dispatcher) -> Vitals:
    """Called in the controller."""
    now = time.time()
    with controller.lock:
        states: dict[str, int] = {}
        late = []
        for known in controller.runs.values():
            states[known.state] = states.get(known.state, 0) + 1
            if known.state == "parked" and known.due_at is not None and known.due_at < now:
                late.append((known.run_id, now - known.due_at))
        late.sort(key=lambda one: -one[1])
        count, due_at = controller.next_timer_locked()
        return Vitals(
            pid=os.getpid(),
            lease=controller.lease.id if controller.lease is not None else "",
            rebuilt=controller.rebuilt,
            draining=controller.draining,
            pools=[
                PoolVitals(
                    environment=key[:8],
                    actors=len(pool.slots),
                    starting=sum(slot.batch is None for slot in pool.slots.values()) + pool.asked,
                    busy=pool.busy(),
                    waiting=pool.waiting(),
                    most=pool.most,
                    failures=pool.failures,
                    held=pool.held,
                )
                for key, pool in controller.pools.items()
            ],
            states=states,
            timers=count,
            timer_lag_s=0.0 if due_at is None else max(0.0, now - due_at),
            late=late[:_NAMED],
        )


# Asked from outside -----------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class RayVitals:
    address: str
    nodes: int
    resources: dict[str, float]


def ask_ray(address: str | None) -> RayVitals:
    """Connect, where this process has no Ray, to the one that runs; what it has.

    Raises:
        Absent: none runs, and no address is set.
        ConfigurationError: nobody answers at the address.
    """
    if not ray.is_initialized():
        _connect(address)
    nodes = living_nodes()  # the head's process answers, or this hangs
    return RayVitals(ray.get_runtime_context().gcs_address, len(nodes), cluster_resources())


def _connect(address: str | None) -> None:
    from ray._private import services

    from pyworkflow_ray.runtime.embedded import ensure_ray

    if address == "local":
        raise Absent
    if address or os.environ.get("RAY_ADDRESS"):
        ensure_ray(address)
        return
    running: Any = services
    if not running.find_gcs_addresses():
        raise Absent
    try:
        ensure_ray("auto")
    except ConfigurationError:
        raise Absent from None


def ask_controller(storage_id: str, timeout_s: float) -> Vitals:
    """Raises Absent where there is none; what Ray raises (`GetTimeoutError` where it hangs)."""
    vitals: Vitals = ray.get(controller_of(storage_id).vitals.remote(), timeout=timeout_s)
    return vitals


def controller_of(storage_id: str) -> Any:
    try:
        return ray.get_actor(controller_name(storage_id), namespace=NAMESPACE)
    except ValueError:
        raise Absent from None


@dataclass(slots=True, frozen=True)
class AnchorVitals:
    """anchors: how many there are. silent: how many of them did not answer. actors: (key, handle) of all the others."""

    anchors: int
    silent: int
    leases: set[str]
    actors: list[tuple[str, Any]]


def ask_anchors(storage_id: str, timeout_s: float) -> AnchorVitals:
    handles = anchors_of(storage_id)
    refs = [handle.survey.remote() for handle in handles] + [handle.lease.remote() for handle in handles]
    answers = _gather(refs, timeout_s)
    surveys, leases = answers[: len(handles)], answers[len(handles) :]
    actors = [actor for survey in surveys if survey is not None for actor in survey[2]]
    return AnchorVitals(
        len(handles), sum(survey is None for survey in surveys), {lease for lease in leases if lease}, actors
    )


def ask_actors(actors: list[tuple[str, Any]], timeout_s: float) -> tuple[list[Doing], list[Any]]:
    """What the run actors do, and the handles of those that did not answer."""
    answers = _gather([handle.doing.remote() for _, handle in actors], timeout_s)
    silent = [handle for (_, handle), answer in zip(actors, answers, strict=True) if answer is None]
    return [answer for answer in answers if answer is not None], silent


def _gather(refs: list[Any], timeout_s: float) -> list[Any]:
    """The answers in order; None for one that failed, or did not come in time."""
    if not refs:
        return []
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
    there = set(done)
    answers: list[Any] = []
    for ref in refs:
        try:
            answers.append(ray.get(ref, timeout=1.0) if ref in there else None)
        except (rx.RayError, TimeoutError):
            answers.append(None)
    return answers


def process_of(handle: Any) -> str:
    """Where an actor's process is, as far as Ray's head knows: "pid 4711 on node 1a2b3c4d", or "restarting"."""
    from ray._private.state import state

    try:
        table: Any = state.actor_table(handle._actor_id.hex())
        if table.get("State") in ("RESTARTING", "PENDING_CREATION", "DEPENDENCIES_UNREADY"):
            return "restarting"
        return f"pid {table['Pid']} on node {table['Address']['NodeID'][:12]}"
    except Exception:  # Ray's private ground: no more than a courtesy to the reader
        return ""
