"""Outcomes that outlive a resume: of steps that completed after the one that is tried again had failed.

Pure. Called by `history` and `driver` (of which `KnowingDriver` is a part). A resume takes back what the body did after
a step's failure, for it may now take another way. Where it comes to the same call at the same place again, that step is
not executed a second time: its recorded completion is recorded and delivered again. Rules:

* the same call is the same step with equal arguments, by digest; arguments without one (pickles) are never held equal;
* a failure is not known in this sense: the step is tried again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pyworkflow_ray.engine.events import Event, Payload, StepCompleted, StepScheduled

if TYPE_CHECKING:
    from pyworkflow_ray.engine.history import History, StepState

Known = dict[str, tuple[StepScheduled, StepCompleted]]


def known_from(taken_back: Iterable[Event]) -> Known:
    """The completions among the events that a reset takes back, of steps whose call it takes back as well."""
    calls: dict[str, StepScheduled] = {}
    found: Known = {}
    for event in taken_back:
        if isinstance(event, StepScheduled):
            calls[event.position] = event
        elif isinstance(event, StepCompleted) and event.position in calls:
            found[event.position] = (calls[event.position], event)
    return found


def same_call(one: StepScheduled, other: StepScheduled) -> bool:
    """Whether they are the same step with arguments that are certainly equal."""
    return (
        one.step == other.step
        and len(one.args) == len(other.args)
        and one.kwargs.keys() == other.kwargs.keys()
        and all(map(_equal, one.args, other.args))
        and all(_equal(value, other.kwargs[name]) for name, value in one.kwargs.items())
    )


def _equal(one: Payload, other: Payload) -> bool:
    return one.digest is not None and (one.enc, one.cls, one.digest) == (other.enc, other.cls, other.digest)


def meet(known: Known, call: StepScheduled) -> None:
    """The body called a step at this place again: what is known of another call there is of no use."""
    found = known.get(call.position)
    if found is not None and not same_call(found[0], call):
        del known[call.position]


class KnowingDriver:
    """The part of the driver that delivers what is known."""

    _history: History

    if TYPE_CHECKING:

        def _dispatch(self, step: StepState) -> None: ...

        def _deliver(self, event: Event, now: float) -> None: ...

    def _begin(self, step: StepState) -> None:
        """Execute a step that the body has called, unless its completion is known: that is delivered by `_recall`."""
        if step.event.position not in self._history.known:
            self._dispatch(step)

    def _recall(self, now: float) -> None:
        """Deliver the completions that are known of steps which the body has called again."""
        history = self._history
        while history.known and history.ended is None:
            called = next((p for p in history.known if p in history.steps and history.steps[p].ended is None), None)
            if called is None:
                return
            self._deliver(history.known[called][1].model_copy(update={"seq": -1, "at": now}), now)
