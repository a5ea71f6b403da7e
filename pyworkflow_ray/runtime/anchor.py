"""The anchor: a detached actor without logic that creates and lists the run actors of one code environment.

Called by the controller only. It owns the run actors (they are not detached): all runs and steps of an anchor share
one pool of Ray's workers, and the controller can die while runs go on. It holds the lease's lock, and nothing that
could go wrong.

Faults: its death takes its run actors with it (0.08 s); Ray restarts it, empty, under another `incarnation`.
"""

from __future__ import annotations

import uuid
from typing import Any

from pyworkflow_ray.engine.events import CodeEnvironment
from pyworkflow_ray.errors import FencedError
from pyworkflow_ray.runtime.messages import ActorSpec, RuntimeConfig
from pyworkflow_ray.runtime.run_actor import GROUPS, RunActor
from pyworkflow_ray.runtime.typed_ray import as_actor, as_task
from pyworkflow_ray.storage.port import open_storage


def _warm(after: object = None) -> None:
    """Starts a step worker: a run's first step then begins half a second earlier. after: what the start waits for."""


class Anchor:
    def __init__(self, config: RuntimeConfig, environment: CodeEnvironment, lease: str, warm: int, actors: int) -> None:
        self._config = config
        self._environment = environment
        self._incarnation = uuid.uuid4().hex
        self._actors: dict[str, Any] = {}
        self._lease: Any = None
        self._lease_id = ""
        warm_up = as_task(_warm, num_cpus=1, max_retries=0, enable_task_events=False)
        self._warming = [warm_up.remote()]
        try:
            self.hold(lease)
        except FencedError:
            return  # this anchor was restarted and its lease given up meanwhile: the controller brings another
        # A start is a second of a CPU's work. The first run needs one actor and one worker: the rest come after them.
        for _, actor in self.make(actors)[:1]:
            self._warming += [warm_up.remote(actor.ready.remote()) for _ in range(warm - 1)]

    def hold(self, lease: str) -> str:
        """Hold the shared lock of this lease from now on. Returns the incarnation."""
        if lease != self._lease_id:
            self._lease = open_storage(self._config.storage, create=False).join_lease(lease)
            self._lease_id = lease
        return self._incarnation

    def incarnation(self) -> str:
        return self._incarnation

    def lease(self) -> str:
        return self._lease_id

    def survey(self) -> tuple[CodeEnvironment, str, list[tuple[str, Any]]]:
        """All that a restarted controller asks for: environment, incarnation, run actors."""
        return self._environment, self._incarnation, list(self._actors.items())

    def make(self, count: int) -> list[tuple[str, Any]]:
        """Create so many run actors; they may still be starting when this returns."""
        made = []
        for _ in range(count):
            key = f"{self._environment.key[:8]}-{uuid.uuid4().hex[:8]}"
            spec = ActorSpec(key, self._config, self._environment, self._lease_id)
            handle = (
                as_actor(RunActor, concurrency_groups=GROUPS)
                .options(num_cpus=0, max_restarts=0, enable_task_events=False)
                .remote(spec)
            )
            self._actors[key] = handle
            made.append((key, handle))
        return made

    def actors(self) -> tuple[str, list[tuple[str, Any]]]:
        """(incarnation, every run actor that this one has made and not dropped)."""
        return self._incarnation, list(self._actors.items())

    def drop(self, key: str) -> None:
        """Forget a run actor; it ends when nobody else holds its handle."""
        self._actors.pop(key, None)
