"""The client: one a process and storage. Reaches the controller, makes it where there is none, waits for runs.

Called by the api (`runs.py`) through `connect`, `current` and `shutdown`; calls `embedded` and the controller;
`following` waits for runs. Threads: the api's.

Faults: a controller that is killed and comes back (every call is made again, each may be repeated without harm); runs
that another Ray owns (they are looked up in the storage); a Ray that was shut down under us.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Literal

import ray
from ray import exceptions as rx

from pyworkflow_ray.engine.events import CodeEnvironment, RunCreated
from pyworkflow_ray.errors import PyWorkflowError, StorageError
from pyworkflow_ray.observability.otel_settings import travelling
from pyworkflow_ray.runtime.breaker_actor import keep_in
from pyworkflow_ray.runtime.controller import GROUPS, Controller
from pyworkflow_ray.runtime.dispatcher import make_anchor
from pyworkflow_ray.runtime.embedded import ensure_ray
from pyworkflow_ray.runtime.following import Follower
from pyworkflow_ray.runtime.messages import NAMESPACE, Cursor, News, RuntimeConfig, Submitted, controller_name
from pyworkflow_ray.runtime.nodes import check_nodes
from pyworkflow_ray.runtime.packages import capture, job_attributes
from pyworkflow_ray.runtime.process import make_codec, set_log_level
from pyworkflow_ray.runtime.typed_ray import as_actor, cluster_resources
from pyworkflow_ray.storage.codec_mark import make_mark, refuse_clear, refuse_keys
from pyworkflow_ray.storage.port import LeasePort, StoragePort, open_storage

log = logging.getLogger("pyworkflow_ray")

_CALL_AGAIN_S = 60.0  # how long a controller may be away before a call gives up
_LOOK_S = 0.25
_SUBMITTED_AT_ONCE = 200
_AWAY = (rx.ActorUnavailableError, rx.ActorDiedError, rx.GetTimeoutError)


class Client:
    """See the module."""

    def __init__(
        self, storage: StoragePort, config: RuntimeConfig, environment: CodeEnvironment, *, owns_ray: bool
    ) -> None:
        self.storage = storage
        self.config = config
        self.environment = environment
        self.owns_ray = owns_ray
        self.attributes = job_attributes()  # of every run that this process starts
        self.codec = make_codec(storage, config)
        keep_in(storage.root)
        self._controller: Any = None
        self._closed = False
        self._lending: threading.Thread | None = None
        self._cpus = max(1, int(cluster_resources().get("CPU", 1)))
        self._controller = self._find_or_make()
        self.follower = Follower(storage, watch=self._watch, states=self._states)

    # The controller ---------------------------------------------------------------------------------------------

    def _find_or_make(self) -> Any:
        name = controller_name(self.storage.storage_id)
        try:
            return ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            pass
        lease = self.storage.join_lease()  # held until the actors hold it: it must not look dead meanwhile
        cpus = self._cpus
        anchor = make_anchor(self.config, self.environment, lease.id, cpus, self.config.pool_min)
        controller = (
            as_actor(Controller, concurrency_groups=GROUPS)
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=0,
            )
            .remote(self.config, lease.id, self.environment, cpus)
        )
        refs = [controller.ready.remote(), anchor.lease.remote()]
        self._lending = threading.Thread(target=self._let_go, args=(lease, refs), name="lease", daemon=True)
        self._lending.start()
        return controller

    def _let_go(self, lease: LeasePort, refs: list[Any]) -> None:
        """Hold the lease until the actors do, or this process ends."""
        deadline = time.monotonic() + 120.0
        try:
            while not self._closed and time.monotonic() < deadline:
                if len(ray.wait(refs, num_returns=len(refs), timeout=_LOOK_S)[0]) == len(refs):
                    break
        except Exception as error:
            log.debug("the controller has not answered: %s", error)
        lease.close()

    def call(self, method: str, *args: Any, timeout_s: float = _CALL_AGAIN_S) -> Any:
        """Call the controller, again while it is away. The method must bear being called twice.

        Raises:
            StorageError: it did not come back in time.
            Whatever the method raised.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return ray.get(getattr(self._controller, method).remote(*args), timeout=timeout_s)
            except rx.RayTaskError as error:
                cause = error.cause
                raise cause if isinstance(cause, PyWorkflowError) else error from None
            except _AWAY as error:
                if time.monotonic() >= deadline or not ray.is_initialized():
                    raise StorageError(
                        f"the controller of {self.storage.root} does not answer: {type(error).__name__}. Runs are "
                        "durable; another process goes on with recover()",
                        path=self.storage.root,
                    ) from None
                if isinstance(error, rx.ActorDiedError):
                    self._controller = self._find_or_make()
                time.sleep(0.05)

    def submit(self, events: list[RunCreated]) -> list[Submitted]:
        """Make the runs durable. In order of `events`."""
        refuse_clear(self.storage, self.config.codec)
        answers: list[Submitted] = []
        for start in range(0, len(events), _SUBMITTED_AT_ONCE):
            part = events[start : start + _SUBMITTED_AT_ONCE]
            run_ids = [event.run_id for event in part]
            unbroken = self.follower.announce(run_ids)
            try:
                made = self.call("submit", part)
                self.follower.submitted([answer.run_id for answer in made if answer.what == "created"], unbroken)
                answers += made
            finally:
                self.follower.withdraw(run_ids)
        return answers

    def _watch(self, cursor: Cursor | None, timeout_s: float, gather_s: float) -> Future[News]:
        self._needs_ray()
        news: Future[News] = self._controller.watch.remote(cursor, timeout_s, gather_s).future()
        return news

    def _states(self, run_ids: list[str]) -> dict[str, str]:
        self._needs_ray()
        states: dict[str, str] = ray.get(self._controller.states.remote(run_ids), timeout=10.0)
        return states

    def _needs_ray(self) -> None:
        if not ray.is_initialized():  # asked, it would start a cluster
            raise ConnectionError("Ray has been shut down")

    # End --------------------------------------------------------------------------------------------------------

    def close(self, drain_timeout_s: float) -> None:
        """Let go. A Ray that we started is drained and ended; any other goes on without us."""
        if self._closed:
            return
        if self.owns_ray and ray.is_initialized():
            try:
                self.call("drain", drain_timeout_s, timeout_s=drain_timeout_s + 5.0)
            except Exception as error:
                log.debug("draining: %s", error)
        self._closed = True
        self.follower.close()
        if self._lending is not None:
            self._lending.join(4 * _LOOK_S)
        if self.owns_ray and ray.is_initialized():
            ray.shutdown()


# One client a process ---------------------------------------------------------------------------------------------

_connecting = threading.RLock()
_current: Client | None = None


def current() -> Client | None:
    """The client of this process, if there is one that is still good."""
    client = _current
    return client if client is not None and not client._closed and ray.is_initialized() else None


def connect(
    storage: str | os.PathLike[str],
    *,
    address: str | None = None,
    allow_pickle: bool = True,
    codec: str | None = None,
    redact: tuple[str, ...] = (),
    max_payload_bytes: int | None = None,
    pool_min: int = 1,
    pool_max: int | None = None,
    max_pending: int | None = None,
    worker_wait_max_s: float = 1.0,
    log_level: str = "INFO",
    log_format: Literal["text", "json"] = "text",
    compact_after_s: float = 3600.0,
    compact_above_bytes: int = 256 * 2**20,
    compact_failed_after_s: float | None = None,
    retain: Mapping[str, float] | None = None,
    alert_webhook: str | None = None,
    alert_struggling_after: int = 3,
    ray_options: dict[str, Any] | None = None,
) -> Client:
    """The client of this process, made at the first call: Ray found or started, controller and anchor found or made."""
    global _current
    with _connecting:
        found = current()
        if found is not None:
            return found
        set_log_level(log_level)
        opened = open_storage(storage)
        make_mark(opened, codec)
        owns_ray = ensure_ray(address, ray_options)
        check_nodes(opened.root, opened.storage_id)
        config = RuntimeConfig(
            storage=opened.root,
            storage_id=opened.storage_id,
            allow_pickle=allow_pickle,
            codec=codec,
            redact=redact,
            max_payload_bytes=max_payload_bytes,
            pool_min=pool_min,
            pool_max=pool_max,
            max_pending=max_pending,
            worker_wait_max_s=worker_wait_max_s,
            log_level=log_level,
            log_format=log_format,
            embedded=owns_ray,
            compact_after_s=compact_after_s,
            compact_above_bytes=compact_above_bytes,
            compact_failed_after_s=compact_failed_after_s,
            retain=tuple(sorted((retain or {}).items())),
            telemetry=travelling(os.environ),
            alert_webhook=alert_webhook,
            alert_struggling_after=alert_struggling_after,
        )
        environment = capture(opened)
        if codec is not None:
            refuse_keys(environment.runtime_env.get("env_vars", {}))
        _current = Client(opened, config, environment, owns_ray=owns_ray)
        return _current


def disconnect(drain_timeout_s: float = 10.0) -> None:
    """End the client of this process, if there is one."""
    global _current
    with _connecting:
        client, _current = _current, None
        if client is not None:
            client.close(drain_timeout_s)
