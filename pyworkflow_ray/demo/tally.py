"""What the event log says about the orders: completed, failed, retried, recovered, and which kills it bears witness to.

Called by `main` when all is done; calls the events' types only. Pure: events in, figures out. Nothing here counts along
while the demo runs, so a demo that lost something can't hide it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pyworkflow_ray.engine.events import (
    AttemptFailed,
    AttemptsFailed,
    Event,
    RunActivated,
    RunCancelled,
    RunCompleted,
    RunCreated,
    RunFailed,
    StepCompleted,
    StepLost,
    StepStarted,
)

Role = Literal["run actor", "step worker", "controller"]


@dataclass(frozen=True)
class Kill:
    """One SIGKILL that was sent.

    at: UNIX time just before it. gone: the process was seen to end. replaced: another process was seen to take its
    place; looked at for the controller only, whose death leaves no trace in the log of a run.
    """

    role: Role
    pid: int
    at: float
    gone: bool
    replaced: bool = False


@dataclass
class Tally:
    """Figures from the event logs of all runs.

    completed: order id to amount. failed: order id to the type of the error. unfinished: order ids without an end.
    retries: failed attempts that another attempt followed. recoveries: run actors lost with a run in hand, and step
    workers lost with a step; a step lost with its run actor counts once, and a run that had not begun was not lost.
    twice: steps completed more than once, as "run/position". seconds: from the first run's creation to the last run's
    end.
    """

    completed: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    retries: int = 0
    recoveries: int = 0
    twice: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def orders(self) -> int:
        return len(self.completed) + len(self.failed) + len(self.unfinished)


def _order(created: RunCreated) -> tuple[str, str]:
    for payload in [*created.kwargs.values(), *created.args]:
        if isinstance(payload.data, dict) and "order_id" in payload.data:
            return str(payload.data["order_id"]), str(payload.data["amount"])
    raise ValueError(f"run {created.run_id} has no order among its arguments")


def tally(histories: Iterable[Sequence[Event]]) -> Tally:
    """Read the histories of all runs of the demo; each begins with its `run_created`."""
    result = Tally()
    began: list[float] = []
    ended: list[float] = []
    for history in histories:
        created, last = history[0], history[-1]
        if not isinstance(created, RunCreated):
            raise ValueError(f"a history begins with {created.type}, not with run_created")
        began.append(created.at)
        ended.append(last.at)
        order_id, amount = _order(created)
        end = next((event for event in history if isinstance(event, (RunCompleted, RunFailed, RunCancelled))), None)
        if isinstance(end, RunCompleted):
            result.completed[order_id] = amount
        elif isinstance(end, RunFailed):
            result.failed[order_id] = end.error.type
        else:
            result.unfinished.append(order_id)
        done: set[str] = set()
        begun = False
        for event in history:
            if isinstance(event, AttemptFailed) and event.delay_s is not None:
                result.retries += 1
            elif isinstance(event, AttemptsFailed):
                result.retries += len(event.attempts)
            elif isinstance(event, RunActivated):
                result.recoveries += begun and event.cause == "recovery"
                begun = True
            elif isinstance(event, StepLost):
                result.recoveries += event.cause != "run_actor_lost"
            elif isinstance(event, StepCompleted):
                if event.position in done:
                    result.twice.append(f"{created.run_id}/{event.position}")
                done.add(event.position)
    if began:
        result.seconds = max(ended) - min(began)
    return result


def pid_of(worker: str) -> int | None:
    """The process id in a worker's name, "pid@node"; None where there is none."""
    text = worker.partition("@")[0]
    return int(text) if text.isdecimal() else None


def witnessed(kill: Kill, histories: Mapping[str, Sequence[Event]]) -> bool:
    """Whether the kill struck: the process is gone, and the log (or the controller's successor) shows the loss."""
    if not kill.gone:
        return False
    if kill.role == "controller":
        return kill.replaced
    return any(_witnesses(kill, history) for history in histories.values())


def _witnesses(kill: Kill, history: Sequence[Event]) -> bool:
    owner: int | None = None
    workers: dict[tuple[str, int], int | None] = {}
    for event in history:
        if isinstance(event, StepStarted):
            workers[event.position, event.dispatch] = pid_of(event.worker)
        lost: int | None = None
        if isinstance(event, RunActivated):
            if kill.role == "run actor" and event.cause == "recovery":
                lost = owner
            owner = pid_of(event.worker)
        elif isinstance(event, StepLost) and kill.role == "step worker":
            lost = workers.get((event.position, event.dispatch))
        if lost == kill.pid and event.at >= kill.at:
            return True
    return False
