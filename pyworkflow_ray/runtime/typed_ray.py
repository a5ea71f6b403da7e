"""The few calls of Ray whose published types are narrower than what they take. Called by this room only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import ray


def as_actor(cls: type, **options: Any) -> Any:
    """`ray.remote(**options)(cls)`."""
    remote = cast(Any, ray.remote)
    return remote(**options)(cls) if options else remote(cls)


def as_task(fn: Callable[..., Any], **options: Any) -> Any:
    """`ray.remote(fn).options(**options)`."""
    return cast(Any, ray.remote)(fn).options(**options)


def cluster_resources() -> dict[str, float]:
    return dict(cast(Any, ray.cluster_resources)())


def living_nodes() -> list[dict[str, Any]]:
    return [node for node in cast(Any, ray.nodes)() if node.get("Alive")]
