"""A cluster of processes around one breaker, on a network that delays, loses, repeats and reorders. A seed decides all.

Runs the production code, `Truth` and `Mirror`; what is simulated is what lies between them: the clocks (each process
has its own), the network, calls to a service that breaks down and heals, processes that die with a permit in hand, and
a holder of the truth that is restarted with its state from storage, or with nothing. The rules of the transport are
those of `runtime.breaker_channel`: one message under way a process, sent again when its answer stays out, an answer
that comes after that is not heard.

    python tests/simulation/breaker_cluster.py SEED
"""

from __future__ import annotations

import heapq
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyworkflow_ray.resilience.breaker import (
    PERMIT_LEASE_S,
    Answer,
    BreakerEvent,
    BreakerSettings,
    BreakerState,
    View,
)
from pyworkflow_ray.resilience.mirror import Message, Mirror, Reply, Report
from pyworkflow_ray.resilience.truth import Truth

PROCESSES, NODES = 50, 5
TROUBLE_S, QUIET_S = 120.0, 150.0  # faults strike in the first part; in the second the service is well
ANSWER_S = 3.0  # after which a message is sent again
CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


def some_settings(rng: random.Random) -> BreakerSettings:
    by_rate = rng.random() < 0.5
    return BreakerSettings(
        failure_threshold=rng.choice([1, 3, 10]),
        failure_rate=rng.choice([0.3, 0.6]) if by_rate else None,
        minimum_calls=rng.choice([1, 10]),
        window=rng.choice([20, 10.0]),
        recovery_timeout=rng.choice([0.5, 3.0]),
        min_nodes=rng.choice([1, 1, 2, 3]),
        half_open_max_calls=rng.choice([1, 1, 2, 5]),
        success_threshold=rng.choice([1, 2, 4]),
        recovery_backoff=rng.choice([1.0, 2.0]),
        max_recovery_timeout=8.0,
        ramp=rng.choice([None, None, 5.0]),
    )


@dataclass
class Call:
    number: str
    answer: Answer
    ended: bool = False


@dataclass
class Process:
    name: str
    node: str
    clock: float  # what its monotonic clock was at 0
    mirror: Mirror
    lives: bool = True
    sent: int = 0  # tries of the message under way; the answer of an earlier one is not heard
    waits: bool = False
    calls: dict[str, Call] = field(default_factory=dict)


class BreakerCluster:
    """`run()` raises AssertionError where an invariant does not hold. struck: how often each fault did."""

    def __init__(self, seed: int, settings: BreakerSettings | None = None) -> None:
        self.rng = random.Random(seed)
        self.settings = settings or some_settings(self.rng)
        self.loss = self.rng.choice([0.0, 0.02, 0.2])
        self.restarts = self.rng.random() < 0.4
        self.struck: Counter[str] = Counter()
        self.t = 0.0
        self.events: list[tuple[float, int, Callable[[], Any]]] = []
        self.numbers = itertools.count()
        self.clock = self.rng.uniform(0, 1e6)
        self.truth = Truth(self.settings, "lineage")
        self.kept: tuple[dict[str, Any], float] | None = None
        self.incarnation = 0
        self.counted: set[str] = set()
        self.granted: dict[int, int] = {}  # permit: generation, of this incarnation
        self.signs: dict[int, float] = {}  # permit: when its holder was last heard of
        self.failing_nodes: set[str] = set()  # whose failures arrived in this generation
        self.phases: list[tuple[int, BreakerState]] = []
        self.seen: set[str] = set()  # ends of calls that have arrived
        self.ill = [(a, a + self.rng.uniform(2, 20)) for a in (self.rng.uniform(0, TROUBLE_S - 20) for _ in range(4))]
        self.processes = [self.new_process(n) for n in range(PROCESSES)]

    def new_process(self, n: int) -> Process:
        name, node, clock = f"p{next(self.numbers)}", f"node{n % NODES}", self.rng.uniform(0, 1e6)
        process = Process(name, node, clock, Mirror(name, self.settings, now=clock + self.t, node=node))
        self.after(self.rng.random(), lambda: self.work(process))
        self.send(process)
        return process

    # Time and network -----------------------------------------------------------------------------------------------

    def after(self, seconds: float, act: Callable[[], Any]) -> None:
        heapq.heappush(self.events, (self.t + seconds, next(self.numbers), act))

    def travel(self, act: Callable[[], Any], *, lossy: bool = True) -> None:
        """One way through the network: soon, late, never, or twice."""
        if lossy and self.rng.random() < self.loss:
            self.struck["lost"] += 1
            return
        slow = self.rng.random() < 0.03
        self.struck["delayed"] += slow
        self.after(self.rng.uniform(0, 5.0 if slow else 0.02), act)
        if lossy and self.rng.random() < self.loss:
            self.struck["repeated"] += 1
            self.after(self.rng.uniform(0, 6.0), act)

    def run(self) -> BreakerCluster:
        for at in (self.rng.uniform(5, TROUBLE_S) for _ in range(3 if self.restarts else 0)):
            self.after(at, self.restart)
        for at in (self.rng.uniform(0, TROUBLE_S) for _ in range(60)):
            self.after(at, self.kill_one)
        while self.events and self.events[0][0] < TROUBLE_S + QUIET_S:
            self.t, _, act = heapq.heappop(self.events)
            act()
        self.converge()
        return self

    def restart(self) -> None:
        """The truth's holder dies. A new one begins with what was kept, on another clock, or with nothing."""
        self.struck["restart"] += 1
        self.incarnation += 1
        self.clock = self.rng.uniform(0, 1e6)
        self.truth = Truth(self.settings, "lineage")
        self.counted, self.granted, self.signs = set(), {}, {}
        if self.kept is not None and self.rng.random() < 0.5:
            saved, at = self.kept
            self.truth.restore(saved, self.t - at, self.clock + self.t)
        for process in self.processes:
            self.after(self.rng.uniform(0, 0.5), lambda p=process: (p.mirror.look(), self.send(p)))  # type: ignore[misc]

    def kill_one(self) -> None:
        n = self.rng.randrange(PROCESSES)
        probing = [i for i, p in enumerate(self.processes) for c in p.calls.values() if c.answer.permit and not c.ended]
        if probing and self.rng.random() < 0.7:
            n = self.rng.choice(probing)
            self.struck["killed with a permit"] += 1
        self.processes[n].lives = False
        self.processes[n] = self.new_process(n)

    # A process ------------------------------------------------------------------------------------------------------

    def now(self, process: Process) -> float:
        return process.clock + self.t

    def work(self, process: Process) -> None:
        """Call the service, again and again."""
        if not process.lives or self.t > TROUBLE_S + QUIET_S - 20:
            return
        self.after(self.rng.expovariate(1.0), lambda: self.work(process))
        answer = process.mirror.check(self.now(process))
        number = f"{process.name}.{next(self.numbers)}"
        if answer is None:
            process.mirror.ask(("asked", number))
            self.send(process)
        else:
            self.answered(process, number, answer)

    def answered(self, process: Process, number: str, answer: Answer) -> None:
        if not answer.admitted:
            self.struck["refused"] += 1
            return
        process.calls[number] = call = Call(number, answer)
        hangs = self.rng.random() < 0.02
        self.after(self.rng.uniform(15, 40) if hangs else self.rng.uniform(0.01, 0.5), lambda: self.end(process, call))
        if answer.permit is not None:
            self.after(PERMIT_LEASE_S / 3, lambda: self.renew(process, call))

    def renew(self, process: Process, call: Call) -> None:
        if process.lives and not call.ended and call.answer.permit is not None:
            process.mirror.renew(call.answer.permit)
            self.send(process)
            self.after(PERMIT_LEASE_S / 3, lambda: self.renew(process, call))

    def end(self, process: Process, call: Call) -> None:
        if not process.lives:
            return
        call.ended = True
        del process.calls[call.number]
        ill = any(a <= self.t < b for a, b in self.ill)
        event = BreakerEvent.FAILURE if ill and self.rng.random() < 0.9 else BreakerEvent.SUCCESS
        if self.rng.random() < 0.05:
            event = self.rng.choice([BreakerEvent.ANSWERED, BreakerEvent.RELEASE])
        probes = call.answer.permit is not None or bool(call.answer.aside and call.answer.aside[1] is not None)
        if probes or process.mirror.matters(event, None):
            answer = call.answer
            report = Report(event, answer.generation, answer.permit, call.number, False, 1, answer.aside)
            process.mirror.report(report, ("told", call.number))
            self.send(process)

    def send(self, process: Process) -> None:
        """What has gathered, if nothing is under way."""
        if not process.waits:
            self.try_to_send(process)

    def try_to_send(self, process: Process) -> None:
        message = process.mirror.next_message()
        if message is None:
            process.waits = False
            return
        process.waits = True
        process.sent += 1
        mine = process.sent
        self.travel(lambda: self.arrive(process, message, mine))

        def again() -> None:
            if process.lives and process.sent == mine and process.waits:
                self.struck["sent again"] += 1
                self.try_to_send(process)

        self.after(ANSWER_S, again)

    def receive(self, process: Process, reply: Reply, mine: int) -> None:
        if not process.lives or process.sent != mine or not process.waits:
            return  # nobody listens for this answer any more
        process.waits = False
        for (what, number), answer in process.mirror.receive(reply, self.now(process)):
            if what == "asked":
                assert answer is not None
                self.answered(process, number, answer)
            else:
                assert number in self.seen, f"{number} was acknowledged and has never arrived"
        self.send(process)

    # The truth ------------------------------------------------------------------------------------------------------

    def arrive(self, process: Process, message: Message, mine: int) -> None:
        truth, breaker, now = self.truth, self.truth.breaker, self.clock + self.t
        probing = list(breaker.permits)
        breaker.settle(now)
        if probing and breaker.state is OPEN and not self.restarts:
            silent = max(self.t - self.signs[permit] for permit in probing)
            assert silent >= PERMIT_LEASE_S - 1e-6, f"a permit was taken away after {silent:.1f} s of silence"
        self.seen |= {report.error for report in message.reports}
        was, generation, version = breaker.state, breaker.generation, breaker.version
        permits = dict(breaker.permits)
        ended = breaker.ended

        def counting(event: BreakerEvent, at: float, **how: Any) -> bool:
            counted = ended(event, at, **how)
            if counted:
                assert how["error"] not in self.counted, f"{how['error']} was counted twice"
                self.counted.add(how["error"])
                assert how["generation"] == generation or version != breaker.version, "a late result was counted"
                if event is BreakerEvent.FAILURE:
                    self.failing_nodes.add(how["node"])
            return counted

        breaker.ended = counting  # type: ignore[method-assign]
        try:
            reply = truth.handle(message, now)
        finally:
            del breaker.ended  # type: ignore[attr-defined]
        self.look_at(message, reply, was, generation, permits, now)
        self.travel(lambda: self.receive(process, reply, mine))
        if breaker.version != version:
            self.push()
        if breaker.generation != generation:
            self.kept = (truth.save(now), self.t)

    def push(self) -> None:
        for process in self.processes:
            self.travel(lambda p=process, v=self.truth.view(self.clock + self.t): self.learn(p, v))  # type: ignore[misc]

    def learn(self, process: Process, view: View) -> None:
        before = process.mirror.known.view.version
        process.mirror.learn(view, self.now(process))
        assert process.mirror.known.view.version >= before, f"{process.name} believed what is older than it knew"

    def look_at(
        self,
        message: Message,
        reply: Reply,
        was: BreakerState,
        generation: int,
        permits: dict[int, float | None],
        now: float,
    ) -> None:
        """The invariants, after each message."""
        breaker = self.truth.breaker
        for answer in reply.answers:
            if answer.permit is not None and answer.permit not in self.granted:
                self.granted[answer.permit] = breaker.generation
                self.signs[answer.permit] = self.t
        for permit in message.renewals:
            if permit in breaker.permits:
                self.signs[permit] = self.t
        assert len(breaker.permits) <= self.settings.half_open_max_calls
        if not self.restarts:
            running = [
                call
                for process in self.processes
                for call in process.calls.values()
                if call.answer.permit is not None and call.answer.generation == breaker.generation
            ]
            assert len(running) <= self.settings.half_open_max_calls, "more probes than permits"
            for permit in breaker.permits:
                silent = self.t - self.signs[permit]
                assert silent < PERMIT_LEASE_S, f"permit {permit} is out, its holder silent for {silent:.1f} s"
            if was is HALF_OPEN and breaker.state is not HALF_OPEN:
                by = [r for r in message.reports if r.permit in permits and r.generation == generation]
                assert by, f"{was} became {breaker.state} without a probe of it"
            if was is OPEN and breaker.state is CLOSED:
                assert any(r.generation == generation + 1 for r in message.reports)
        if breaker.generation != generation:
            if was is CLOSED and breaker.state is OPEN and not self.restarts:
                assert len(self.failing_nodes) >= self.settings.min_nodes, self.failing_nodes
            self.failing_nodes = set()
            self.struck[f"{was.value} > {breaker.state.value}"] += 1

    def converge(self) -> None:
        """Once all is quiet every mirror knows the truth, everything told was heard, and the healed service is used."""
        self.loss = 0.0
        self.events = [event for event in self.events if event[0] < self.t + 60]
        heapq.heapify(self.events)
        for process in self.processes:
            self.after(40.0, lambda p=process: (p.mirror.look(), self.send(p)))  # type: ignore[misc]
        self.after(50.0, self.push)
        while self.events and self.events[0][0] < TROUBLE_S + QUIET_S + 100:
            self.t, _, act = heapq.heappop(self.events)
            act()
        truth: View = self.truth.view(self.clock + self.t)
        assert truth.state is CLOSED, f"the service is well for {QUIET_S} s, and the breaker is {truth.state}"
        for process in self.processes:
            known = process.mirror.known
            assert known.joined
            mine = known.view
            assert (mine.version, mine.generation, mine.state) == (truth.version, truth.generation, truth.state), (
                f"{process.name} knows {mine}, the truth is {truth}"
            )
            assert process.mirror.next_message() is None, f"{process.name} still has something to say"


def simulate(seed: int) -> BreakerCluster:
    """One run.

    Raises:
        AssertionError: an invariant does not hold; a note says how to see it again.
    """
    try:
        return BreakerCluster(seed).run()
    except Exception as error:
        error.add_note(f"again: python tests/simulation/breaker_cluster.py {seed}")
        raise


if __name__ == "__main__":
    print(simulate(int(sys.argv[1])).struck)
