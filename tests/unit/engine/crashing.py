"""One run on a virtual clock and a store in memory, whose owner dies after a chosen event.

Driver, machine, codec and the execution of steps are those of production; simulated are time, the store, and deaths.

`crash_everywhere` kills the owner after each event in turn, and compares each ending with the one that had no crash.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from pyworkflow_ray.engine.calls import StepCall
from pyworkflow_ray.engine.commands import Append, CancelDispatch, Dispatch, Finish, Limits, Park, Pause
from pyworkflow_ray.engine.driver import Driver
from pyworkflow_ray.engine.events import Event, RunActivated, RunCancelled, RunCompleted, RunFailed
from pyworkflow_ray.execution.interrupt import Interrupt
from pyworkflow_ray.execution.worker import execute_call
from pyworkflow_ray.testing.simulator import START_AT, Simulator


class Crash(BaseException):
    """The owner is dead."""


@dataclass
class World:
    """What the run meets.

    Args:
        steps: All steps it may call.
        crash_after: The owner dies when the history has so many events; None: never.
        cancel_when: The run is cancelled once its history is so.
        never: Names of steps whose execution never ends.
        lose: Whether the worker of a call dies before it says a word.
        wait_max_s: A longer wait for the next attempt gives the worker back.
        seed: The order in which calls end, and with `crash` the events after which the owner dies, by chance.
    """

    steps: Iterable[Any]
    crash_after: int | None = None
    cancel_when: Callable[[list[Event]], bool] = lambda events: False
    never: frozenset[str] = frozenset()
    lose: Callable[[StepCall], bool] = lambda call: False
    wait_max_s: float = 0.0
    seed: int | None = None
    crash: float = 0.0
    created: dict[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)


class Waits(Interrupt):
    """Waits between the attempts of a chunk's items take no time but the run's own."""

    def __init__(self, run: CrashingRun) -> None:
        super().__init__()
        self._run = run

    def wait(self, seconds: float) -> bool:
        self._run.now += seconds
        return False


class CrashingRun:
    """See the module. `executed`: (step, position, dispatch) of each executed call, over all epochs."""

    def __init__(self, flow: Any, world: World, args: tuple[Any, ...] = ()) -> None:
        simulator = Simulator(flow, {}, args=args)
        self.codec = simulator.codec
        self.events: list[Event] = simulator.store.events()
        self.events[0] = self.events[0].model_copy(update=world.created)
        self.flow = getattr(flow, "fn", flow)
        self.world = world
        self.definitions = {s.definition.name: s.definition for s in world.steps}
        self.now = START_AT
        self.executed: list[tuple[str, str, int]] = []
        self.first: tuple[str, list[str]] = ("start", [])
        self.crashes = 0
        self.most_waiting = 0
        self.ended: Event | None = None
        self.paused: Event | None = None
        self.waiting: deque[StepCall] = deque()
        self.asked = False
        self.rng = random.Random(world.seed)

    def run(self) -> CrashingRun:
        (cause, resets), epoch = self.first, sum(e.type == "run_activated" for e in self.events)
        while self.ended is None and self.paused is None:
            self.driver = Driver(
                self.flow, self.codec, limits=self.world.limits, rng=random.Random(0), log=lambda line: None
            )
            self.waiting.clear()
            try:
                activation = RunActivated(
                    epoch=epoch,
                    cause=cause,  # type: ignore[arg-type]
                    charged=cause == "recovery",
                    resets=resets,
                )
                self.driver.activate(list(self.events), activation, self.now)
                cause = self._own()
            except Crash:
                self.crashes += 1
                cause = "recovery"
                self.asked = any(e.type == "run_cancel_requested" for e in self.events)
            finally:
                self.driver.evict()
            epoch += 1
            if any(e.type == "run_activated" and e.resets == resets for e in self.events):  # type: ignore[attr-defined]
                resets = []
        return self

    def _own(self) -> str:
        """Drive until the run ends, pauses or parks."""
        for _ in range(100_000):
            parked = self._act()
            if self.ended is not None or self.paused is not None:
                return ""
            if parked is not None:
                self.now = max(self.now, parked)
                return "wake"
            if not self.asked and self.world.cancel_when(self.events):
                self.asked = True
                self.driver.cancel("enough", self.now)
            elif self.waiting:
                if self.world.seed is not None:
                    self.waiting.rotate(self.rng.randrange(len(self.waiting)))
                self._execute(self.waiting.popleft())
            else:
                due = self.driver.next_due
                if due is None:
                    raise AssertionError(f"the run hangs after {[e.type for e in self.events[-5:]]}")
                self.now = max(self.now, due)
                self.driver.tick(self.now)
        raise AssertionError("the run does not end")

    def _act(self) -> float | None:
        parked = None
        while effects := self.driver.effects():
            for effect in effects:
                match effect:
                    case Append(events):
                        for event in events:
                            self._store(event)
                        self.most_waiting = max(self.most_waiting, len(self.waiting))
                        self.driver.durable(self.events[-1].seq, self.now)
                    case Dispatch(call):
                        self.waiting.append(call)
                    case CancelDispatch(position, dispatch):
                        self.waiting = deque(
                            c for c in self.waiting if (c.position, c.dispatch) != (position, dispatch)
                        )
                    case Park(due_at):
                        parked = due_at
                    case Pause(event):
                        self.paused = event
                    case Finish(event):
                        self.ended = event
        return parked

    def _store(self, event: Event) -> None:
        assert event.seq == len(self.events), f"{event.type} has seq {event.seq}, not {len(self.events)}"
        self.events.append(type(event).model_validate_json(event.model_dump_json()))
        if len(self.events) == self.world.crash_after or self.rng.random() < self.world.crash:
            raise Crash

    def _execute(self, call: StepCall) -> None:
        if call.step in self.world.never:
            return
        self.executed.append((call.step, call.position, call.dispatch))
        if self.world.lose(call):
            self.driver.lost(call.position, call.dispatch, cause="worker_died", charged=True, now=self.now)
            return
        definition = self.definitions[call.step]
        self.now += 0.001
        outcome = execute_call(
            call,
            definition,
            self.codec,
            report=lambda event: self.driver.record(event, self.now),
            interrupt=Waits(self),
            wait_max_s=self.world.wait_max_s,
            clock=lambda: self.now,
            kill_stuck=False,
        )
        self.driver.outcome(outcome, self.now)

    # What the tests ask -----------------------------------------------------------------------------------------

    def types(self) -> list[str]:
        return [e.type for e in self.events]

    def steps(self, how: str = "step_scheduled") -> list[str]:
        """Short names of the steps that have such an event, in order."""
        names = {e.position: e.step for e in self.events if e.type == "step_scheduled"}  # type: ignore[attr-defined]
        found = [names[e.position] for e in self.events if e.type == how]  # type: ignore[attr-defined]
        return [name.rpartition(":")[2].rpartition(".")[2] for name in found]

    def ending(self) -> tuple[Any, ...]:
        """How it ended: comparable between runs."""
        match self.ended:
            case RunCompleted():
                return ("completed", repr(self.codec.decode(self.ended.result)))
            case RunFailed():
                error = self.codec.decode_error(self.ended.error)
                # an attempt that a crash lost has a number too: the notes of attempts differ
                notes = [n for n in getattr(error, "__notes__", ()) if not n.startswith("attempt ")]
                return ("failed", type(error).__name__, str(error), tuple(notes))
            case RunCancelled():
                error = None if self.ended.error is None else self.codec.decode_error(self.ended.error)
                return ("cancelled", self.ended.reason, repr(error))
        return ("paused", getattr(self.paused, "message", None))


def crash_everywhere(
    flow: Any, make_world: Callable[[], World], args: tuple[Any, ...] = ()
) -> tuple[CrashingRun, list[CrashingRun]]:
    """The run without a crash, and one for each event with a crash after it; each must end like the first."""
    calm = CrashingRun(flow, make_world(), args).run()
    crashed = []
    for number in range(2, len(calm.events)):
        world = make_world()
        world.crash_after = number
        run = CrashingRun(flow, world, args).run()
        assert run.crashes == 1, f"no crash struck after event {number}"
        assert run.ending() == calm.ending(), f"a crash after event {number} ({calm.events[number - 1].type})"
        crashed.append(run)
    return calm, crashed
