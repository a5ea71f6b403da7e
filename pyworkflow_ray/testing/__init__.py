"""Test workflows without Ray: virtual time, injected failures, a crash after every event.

    from pyworkflow_ray.testing import WorkflowEnv

    async def test_the_order_survives_every_crash():
        async with WorkflowEnv() as env:
            env.fail(charge, times=2)
            assert await env.crash_everywhere(checkout, "order-42") == "paid"

The pytest fixture `workflow_env` is an environment that is entered. Importing this loads no Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyworkflow_ray.execution.plain import waits_removed as no_waits
    from pyworkflow_ray.testing.environment import WorkflowEnv
    from pyworkflow_ray.testing.handles import EnvRunHandle
    from pyworkflow_ray.testing.problems import DeadlockError, RealWaitError, RunPausedError

__all__ = ["DeadlockError", "EnvRunHandle", "RealWaitError", "RunPausedError", "WorkflowEnv", "no_waits"]

_HOMES = {
    "DeadlockError": ("pyworkflow_ray.testing.problems", "DeadlockError"),
    "EnvRunHandle": ("pyworkflow_ray.testing.handles", "EnvRunHandle"),
    "RealWaitError": ("pyworkflow_ray.testing.problems", "RealWaitError"),
    "RunPausedError": ("pyworkflow_ray.testing.problems", "RunPausedError"),
    "WorkflowEnv": ("pyworkflow_ray.testing.environment", "WorkflowEnv"),
    "no_waits": ("pyworkflow_ray.execution.plain", "waits_removed"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, attribute = _HOMES[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
