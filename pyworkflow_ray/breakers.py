"""The breakers of a running cluster, or as a storage keeps them, for people: which there are, and to steer them.

Called by the dashboard; calls `runtime.breaker_admin`, and the storage where there is no cluster. A breaker in code is
a `CircuitBreaker`; this is for who has only its name, "payments", or of a key of it "payments[host-7]".

Faults: no cluster runs (ConfigurationError), a breaker's actor does not answer (left out of the list, and named), what
is kept of a breaker is damaged, or by a newer version (left out: its holder tells of it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pyworkflow_ray.breaker import BreakerSnapshot, snapshot_of
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.resilience.breaker import BreakerEvent, BreakerState
from pyworkflow_ray.resilience.breaker_settings import BreakerSettings, full_name

if TYPE_CHECKING:
    from pyworkflow_ray.storage.port import StoragePort

Steer = Literal["open", "close", "reset"]
_EVENTS: dict[str, BreakerEvent] = {
    "open": BreakerEvent.FORCE_OPEN,
    "close": BreakerEvent.FORCE_CLOSED,
    "reset": BreakerEvent.RESET,
}


def connect(address: str | None = None, options: dict[str, Any] | None = None) -> None:
    """Connect this process to a Ray cluster that runs; never start one.

    Args:
        address: As in Ray; None: `RAY_ADDRESS`, else a cluster that runs on this machine.
        options: Of `ray.init`.

    Raises:
        ConfigurationError: none runs, or nobody answers at the address.
    """
    from pyworkflow_ray.runtime import breaker_admin

    breaker_admin.connect(address, options)


def list_breakers(answer_s: float = 15.0) -> tuple[list[BreakerSnapshot], list[str]]:
    """All breakers and keys that processes of the cluster have used, and the names of those that do not answer.

    answer_s: how long each may take to answer.
    """
    from pyworkflow_ray.runtime import breaker_admin

    rows, silent = breaker_admin.rows(answer_s=answer_s)
    return [snapshot_of(full_name(row.name, row.key), row.key, row.view, row.settings) for row in rows], silent


def steer(name: str, how: Steer) -> BreakerSnapshot:
    """Force a breaker, or a key of one, open or closed, or reset it, in all processes; returns it as it then is.

    Raises:
        PyWorkflowError: no such breaker is in the cluster, or its actor does not answer.
    """
    from pyworkflow_ray.runtime import breaker_admin

    row = breaker_admin.force(name, _EVENTS[how])
    return snapshot_of(full_name(row.name, row.key), row.key, row.view, row.settings)


def kept_breakers(storage: StoragePort, now: float) -> list[tuple[BreakerSnapshot, float]]:
    """The breakers as the storage keeps them over a restart, each with its age in seconds at `now` (UNIX time).

    What has happened since then, in a cluster that nobody here can reach, is not in it. Of a bucket: none.
    """
    from pyworkflow_ray.storage.breaker_states import kept_breakers as kept
    from pyworkflow_ray.storage.storage import Storage

    found: list[tuple[BreakerSnapshot, float]] = []
    for name, states, at in kept(storage.root) if isinstance(storage, Storage) else ():
        age_s = max(0.0, now - at)
        try:
            found += [(_kept(name, key, state, age_s), age_s) for key, state in states]
        except (ConfigurationError, KeyError, TypeError, ValueError):
            continue  # a newer version kept it
    return sorted(found, key=lambda one: one[0].name)


def _kept(name: str, key: str | None, state: dict[str, Any], age_s: float) -> BreakerSnapshot:
    rest, configured = state.get("open_for_s"), state.get("configured")
    return BreakerSnapshot(
        name=full_name(name, key),
        key=key,
        state=BreakerState(state["state"]),
        reason=str(state.get("reason", "")),
        generation=int(state.get("generation", 0)),
        failures=int(state.get("failures", 0)),
        calls=0,
        failure_rate=None,
        slow_call_rate=None,
        retry_after=None if rest is None else max(0.0, float(rest) - age_s),
        probing=len(state.get("permits", ())),
        successes=int(state.get("successes", 0)),
        ramp=None,
        nodes={},
        settings={} if configured is None else BreakerSettings.from_options(configured).as_options(),
    )
