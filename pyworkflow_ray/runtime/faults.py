"""Ray's infrastructure errors, translated: who was lost, and whether the step or run is charged for it.

Pure but for ray's exception types. Called by `hosts` (a step's worker) and `controller` (a run actor).
"""

from __future__ import annotations

from typing import Literal

from ray import exceptions as rx

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
