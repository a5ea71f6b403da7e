"""Ray's infrastructure errors, translated: who was lost, and whether the step or run is charged for it.

Pure but for ray's exception types. Called by `hosts` (a step's worker) and `controller` (a run actor).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from ray import exceptions as rx

from pyworkflow_ray.runtime.process import BlindNodeError

LostCause = Literal["worker_died", "out_of_memory", "node_lost", "timeout_kill"]

_NODE_WORDS = ("node died", "node is dead", "node has died", "terminated unexpectedly", "preempted", "drained")


def lost_step(error: BaseException) -> tuple[LostCause, bool]:
    """(cause, charged) of a step whose host ended with `error`.

    A lost node is charged: it may be the step's doing (memory). A drained or preempted one is not.
    """
    text = str(error).lower()
    if isinstance(error, rx.OutOfMemoryError):
        return "out_of_memory", True
    if isinstance(error, (rx.NodeDiedError, rx.LocalRayletDiedError)):
        return "node_lost", not ("preempt" in text or "drain" in text)
    return "worker_died", True


def is_permanent(error: BaseException) -> bool:
    """Errors that no second try can help: the step can't be executed with these options."""
    return isinstance(error, (rx.RuntimeEnvSetupError, rx.TaskUnschedulableError, rx.AuthenticationError))


def blind_node(error: BaseException | None) -> BlindNodeError | None:
    """What a host says whose node does not reach the storage."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BlindNodeError) else None


def environment_error(error: BaseException, runtime_env: Mapping[str, Any]) -> str:
    """Why Ray could not build `runtime_env`, on one line and with what it names."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines[1:] if re.match(r"[A-Za-z_.]*(Error|Exception)\b", line)]
    why = causes[-1] if causes else lines[0] if lines else type(error).__name__
    named = ", ".join(f"{name}={runtime_env[name]}" for name in ("working_dir", "py_modules") if name in runtime_env)
    return f"{why.rstrip('.')}{f' ({named})' if named else ''}"


def lost_actor_is_charged(error: BaseException) -> bool:
    """Whether a run is charged for the loss of its actor: not when the whole node went, or its anchor."""
    if getattr(error, "preempted", False):
        return False
    text = str(error).lower()
    return not any(word in text for word in (*_NODE_WORDS[:3], "owner has died"))


def first_line(error: BaseException) -> str:
    """One line for people, without Ray's advice."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}".strip()
