"""The step hosts of one run actor: which calls wait, which host has which call, who is to be stopped.

Called by `run_actor`, under its lock (methods named `_locked`); submits `step_host` tasks. A call is bound to a host
only when a host asks for one: hosts that still queue for a CPU hold nothing, and whoever is free first goes on.

Faults: a host's process dies (its task ends with an error: `on_death` is called on one of Ray's threads); a host never
starts (no CPU is free: its call waits, or another host takes it); its options can't be met (told as a death).
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pyworkflow_ray.engine.calls import StepCall
from pyworkflow_ray.engine.events import CodeEnvironment
from pyworkflow_ray.runtime.line import Address
from pyworkflow_ray.runtime.messages import RuntimeConfig
from pyworkflow_ray.runtime.step_host import host_steps
from pyworkflow_ray.runtime.typed_ray import as_task

LINGER_S = 0.02  # how long an idle host waits for the next call before it gives its CPU back
SLICE_S = 0.25  # how long a host may go on while others wait for a CPU
CANCEL_GRACE_S = 2.0
_MAX_LINGERING = 2  # they hold threads of the actor that other hosts need


@dataclass(slots=True)
class Host:
    """One submitted host task. `node`: where it is, once it has asked for a call. `call`: what it executes now, since
    `handed_at` (monotonic; `handed_wall` UNIX)."""

    host_id: str
    shape: str
    ref: Any
    born: float | None = None
    node: str = ""
    call: StepCall | None = None
    handed_at: float = 0.0
    handed_wall: float = 0.0
    stop: bool = False
    kill_at: float | None = None
    killed: bool = False


@dataclass(slots=True)
class _Shape:
    options: dict[str, Any]
    calls: deque[StepCall] = field(default_factory=deque)
    coming: int = 0  # hosts submitted that have not asked for a call yet
    lingering: int = 0
    arrived: threading.Condition | None = None


class Hosts:
    """See the module. `most` bounds the host tasks of one shape that exist at a time."""

    def __init__(
        self,
        lock: threading.RLock,
        config: RuntimeConfig,
        environment: CodeEnvironment,
        *,
        actor: Callable[[], Any],
        address: Address | None,
        on_death: Callable[[str, BaseException | None], None],
        most: int = 64,
    ) -> None:
        self._lock = lock
        self._config = config
        self._environment = environment
        self._actor = actor
        self._address = address
        self._on_death = on_death
        self._most = most
        self._shapes: dict[str, _Shape] = {}
        self._hosts: dict[str, Host] = {}
        self._made = 0
        self._blind: set[str] = set()
        self.contended = False

    # Calls ------------------------------------------------------------------------------------------------------

    def offer_locked(self, call: StepCall, avoid: str = "") -> None:
        """Queue a call. `balance_locked` then makes sure that somebody comes for it, from another node than `avoid`
        where there is one."""
        shape = self._shape(call, avoid)
        shape.calls.append(call)
        if shape.lingering and shape.arrived is not None:
            shape.arrived.notify()

    def next_locked(self, host_id: str, node: str = "") -> StepCall | None:
        """The next call for this host, or None: it shall end. May wait for a moment, with the lock released."""
        host = self._hosts.get(host_id)
        if host is None:
            return None  # taken for dead: whatever it had has been given up
        shape = self._shapes[host.shape]
        if host.born is None:
            host.born, host.node = time.monotonic(), node
            shape.coming -= 1
        host.call, host.stop, host.kill_at = None, False, None
        if self.contended and time.monotonic() - host.born > SLICE_S:
            self._end(host)
            return None
        if not shape.calls and shape.lingering < _MAX_LINGERING:
            if shape.arrived is None:
                shape.arrived = threading.Condition(self._lock)
            shape.lingering += 1
            try:
                shape.arrived.wait_for(lambda: bool(shape.calls) or host_id not in self._hosts, LINGER_S)
            finally:
                shape.lingering -= 1
        if not shape.calls or host_id not in self._hosts:
            self._end(host)
            return None
        host.call = shape.calls.popleft()
        host.handed_at, host.handed_wall = time.monotonic(), time.time()
        return host.call

    def _end(self, host: Host) -> None:
        self._hosts.pop(host.host_id, None)
        self.balance_locked()

    def balance_locked(self) -> None:
        """Submit hosts for calls that nobody will come for."""
        for key, shape in self._shapes.items():
            wanted = len(shape.calls) - shape.coming - shape.lingering
            if wanted <= 0:
                continue
            have = sum(1 for host in self._hosts.values() if host.shape == key)
            for _ in range(min(wanted, self._most - have)):
                self._submit(key, shape)

    def withdraw_locked(self, position: str, dispatch: int) -> Host | None:
        """Stop a dispatch: dropped where it still waits; a host that executes it is told, by force after a grace."""
        for shape in self._shapes.values():
            for call in shape.calls:
                if call.position == position and call.dispatch == dispatch:
                    shape.calls.remove(call)
                    return None
        for host in self._hosts.values():
            if host.call is not None and host.call.position == position and host.call.dispatch == dispatch:
                host.stop = True
                host.kill_at = time.monotonic() + CANCEL_GRACE_S
                return host
        return None

    def drop_calls_locked(self) -> None:
        """Nobody wants the waiting calls any more: their run has left this actor."""
        for shape in self._shapes.values():
            shape.calls.clear()

    def stop_all_locked(self, run_id: str) -> None:
        """The run has left this actor: what its hosts still execute is stopped."""
        now = time.monotonic()
        for host in self._hosts.values():
            if host.call is not None and host.call.run_id == run_id and not host.stop:
                host.stop, host.kill_at = True, now + CANCEL_GRACE_S

    # Hosts ------------------------------------------------------------------------------------------------------

    def get_locked(self, host_id: str) -> Host | None:
        return self._hosts.get(host_id)

    def executing_locked(self, run_id: str | None = None) -> int:
        return sum(1 for h in self._hosts.values() if h.call is not None and run_id in (None, h.call.run_id))

    def remove_locked(self, host_id: str) -> Host | None:
        """The host is gone. Gives it back with the call it had."""
        host = self._hosts.pop(host_id, None)
        if host is not None:
            shape = self._shapes[host.shape]
            if host.born is None:
                shape.coming -= 1
            self.balance_locked()
        return host

    def refuse_locked(self, host: Host) -> list[StepCall]:
        """The options of this host can't be met: all calls that wait for such hosts, to be failed."""
        shape = self._shapes[host.shape]
        calls = list(shape.calls)
        shape.calls.clear()
        return calls

    def next_kill_locked(self) -> float | None:
        """When the next unanswered stop runs out (monotonic)."""
        return min((h.kill_at for h in self._hosts.values() if h.kill_at is not None and not h.killed), default=None)

    def due_kills_locked(self) -> list[Any]:
        """Refs of the host tasks whose grace is over."""
        now = time.monotonic()
        due = [h for h in self._hosts.values() if h.kill_at is not None and h.kill_at <= now and not h.killed]
        for host in due:
            host.killed = True
        return [host.ref for host in due]

    def _shape(self, call: StepCall, avoid: str = "") -> _Shape:
        key = _shape_key(call.ray_options) + avoid
        shape = self._shapes.get(key)
        if shape is None:
            options = _task_options(call.ray_options)
            shape = self._shapes[key] = _Shape(_elsewhere(options, avoid) if avoid else options)
        return shape

    def shun_locked(self, node_id: str) -> bool:
        """No more hosts on a node that does not reach the storage; True: it was not known before."""
        known = node_id in self._blind
        self._blind.add(node_id)
        return not known

    def _submit(self, key: str, shape: _Shape) -> None:
        self._made += 1
        host_id = f"h{self._made}"
        options = _never_on(shape.options, self._blind) if self._blind else shape.options
        task = as_task(host_steps, **{**options, "name": f"steps:{host_id}"})
        host = Host(host_id, key, None)
        try:
            host.ref = task.remote(self._actor(), self._address, host_id, self._config, self._environment)
        except Exception as error:  # options that Ray refuses as it reads them
            self._hosts[host_id] = host
            shape.coming += 1
            self._on_death(host_id, error)
            return
        self._hosts[host_id] = host
        shape.coming += 1
        host.ref.future().add_done_callback(lambda future: self._ended(host_id, future))

    def _ended(self, host_id: str, future: Any) -> None:
        # on one of Ray's threads: never blocks
        self._on_death(host_id, future.exception())


_NODE_LABEL = "ray.io/node-id"  # Ray labels each node so
_PLAIN = {"max_retries": 0, "retry_exceptions": False, "enable_task_events": False}


def _task_options(given: dict[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in given.items() if name != "ray_remote_args" and value is not None}
    options.update(given.get("ray_remote_args") or {})
    strategy = options.get("scheduling_strategy")
    if isinstance(strategy, dict):  # as it is recorded
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(**strategy)
    return {"num_cpus": 1, **options, **_PLAIN}


def _elsewhere(options: dict[str, Any], node_id: str) -> dict[str, Any]:
    """The same, by preference on another node; what the user said of nodes comes first."""
    selector = options.get("label_selector") or {}
    if "scheduling_strategy" in options or "fallback_strategy" in options or _NODE_LABEL in selector:
        return options
    return {
        **options,
        "label_selector": {**selector, _NODE_LABEL: f"!{node_id}"},
        "fallback_strategy": [{"label_selector": selector}],
    }


def _never_on(options: dict[str, Any], node_ids: set[str]) -> dict[str, Any]:
    """The same, never on these nodes; where the user has named nodes, what they said stands."""
    selector = options.get("label_selector") or {}
    if "scheduling_strategy" in options or selector.get(_NODE_LABEL, "!")[0] != "!":
        return options
    never = f"!in({','.join(sorted(node_ids))})"
    fallbacks = options.get("fallback_strategy")
    return {
        **options,
        "label_selector": {**selector, _NODE_LABEL: never},
        **({"fallback_strategy": [{"label_selector": {**(f.get("label_selector") or {}), _NODE_LABEL: never}}
                                  for f in fallbacks]} if fallbacks else {}),
    }  # fmt: skip


def _shape_key(given: dict[str, Any]) -> str:
    if not given:
        return ""
    return json.dumps(given, sort_keys=True, default=repr)
