"""What must be durable before a step begins: the barrier of steps with `durability="relaxed"`. Pure.

Called by `driver`. Rules:

* A step is dispatched when everything recorded before it is durable. A relaxed one waits only for the barrier: the
  newest record that is not a relaxed step's own beginning, attempt or completion.
* So of a chain of relaxed steps each begins as soon as the one before has ended, while their records are on their way;
  whatever else the run does (a step that is not relaxed, the run's end, parking, a pause, a compensation, a timer that
  fired) is recorded, raises the barrier, and happens only when all of it is durable.
* After a crash relaxed steps whose completion was not durable are executed again, perhaps with other arguments: that
  is what their author has said to be harmless.
"""

from __future__ import annotations

from pyworkflow_ray.engine.commands import Dispatch, Effect
from pyworkflow_ray.engine.events import (
    AttemptFailed,
    AttemptsCounted,
    Event,
    RunActivated,
    StepCompleted,
    StepDispatched,
    StepScheduled,
    StepStarted,
)
from pyworkflow_ray.engine.history import History

_OWN = (StepScheduled, StepDispatched, StepStarted, AttemptFailed, AttemptsCounted, StepCompleted)


def passes(event: Event, history: History) -> bool:
    """Whether relaxed steps may begin before this event, which `history` has, is durable."""
    if isinstance(event, RunActivated):
        return True  # that this owner exists; the journal fences one that should not
    if not isinstance(event, _OWN):
        return False
    step = history.steps.get(event.position)
    return step is not None and step.event.policy.durability == "relaxed" and not step.event.compensates


def is_relaxed(effect: Effect) -> bool:
    """Whether this effect waits for the barrier alone. (A compensation raised the barrier when it was scheduled.)"""
    if not isinstance(effect, Dispatch):
        return False
    return effect.call.policy.durability == "relaxed"
