"""The few calls of Ray whose published types are narrower than what they take. Called by this room only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import ray
from ray._private import state


def as_actor(cls: type, **options: Any) -> Any:
    """`ray.remote(**options)(cls)`."""
    remote = cast(Any, ray.remote)
    return remote(**options)(cls) if options else remote(cls)


def as_task(fn: Callable[..., Any], **options: Any) -> Any:
    """`ray.remote(fn).options(**options)`."""
    return cast(Any, ray.remote)(fn).options(**options)


def cluster_resources() -> dict[str, float]:
    return dict(cast(Any, ray.cluster_resources)())


def all_nodes() -> list[dict[str, Any]]:
    """Those that have left the cluster too."""
    return list(cast(Any, ray.nodes)())


def living_nodes() -> list[dict[str, Any]]:
    return [node for node in all_nodes() if node.get("Alive")]


def draining_nodes() -> set[str]:
    """Ids of the nodes that are being drained. Ray has no public call for it."""
    return set(cast(Any, state.state).get_draining_nodes())
