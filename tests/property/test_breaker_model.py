"""The breaker against a second implementation, and the mirror protocol under lost, repeated and forgotten messages."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from pyworkflow_ray.resilience.breaker import Answer, Breaker, BreakerEvent, BreakerSettings, BreakerState
from pyworkflow_ray.resilience.mirror import Asker, Message, Mirror, Reply, Report
from pyworkflow_ray.resilience.truth import Truth

ENDS = st.sampled_from([BreakerEvent.SUCCESS, BreakerEvent.FAILURE, BreakerEvent.ANSWERED, BreakerEvent.RELEASE])


class Model:
    """A breaker told as a history: no table, no stored state. All is computed anew from the list of what happened."""

    def __init__(self, threshold: int, recovery: float, lease: float) -> None:
        self.threshold, self.recovery, self.lease = threshold, recovery, lease
        self.phases: list[tuple[str, float]] = [("closed", 0.0)]  # each with its beginning; its index is its generation
        self.streak: list[str] = []  # ends that were counted in the phase that runs
        self.probe: float | None = None  # until when the probe that runs may be silent

    def at(self, now: float) -> str:
        kind = self.phases[-1][0]
        if kind == "half_open" and self.probe is not None and now >= self.probe:
            self.begin("open", self.probe)
        return self.phases[-1][0]

    def begin(self, kind: str, at: float) -> None:
        self.phases.append((kind, at))
        self.streak, self.probe = [], None

    def ask(self, now: float) -> tuple[bool, bool]:
        """Admitted, and as a probe?"""
        kind = self.at(now)
        if kind == "closed":
            return True, False
        if kind == "open":
            if now - self.phases[-1][1] < self.recovery:
                return False, False
            self.begin("half_open", now)
        if self.probe is not None:
            return False, False
        self.probe = now + self.lease
        return True, True

    def end(self, event: str, phase: int, now: float) -> None:
        kind = self.at(now)
        if phase != len(self.phases) - 1:
            return
        if kind == "half_open":
            if event == "release":
                self.probe = None
            else:
                self.begin("open" if event == "failure" else "closed", now)
        elif event in ("success", "failure"):
            self.streak.append(event)
            if self.streak[-self.threshold :] == ["failure"] * self.threshold:
                self.begin("open", now)


class BreakerAgainstModel(RuleBasedStateMachine):
    calls = Bundle("calls")

    @initialize(threshold=st.integers(1, 4), recovery=st.sampled_from([0.0, 1.0, 5.0, 30.0]))
    def begin(self, threshold: int, recovery: float) -> None:
        self.now = 0.0
        self.breaker = Breaker(BreakerSettings(threshold, recovery), lease_s=10.0)
        self.model = Model(threshold, recovery, 10.0)

    @rule(seconds=st.sampled_from([0.25, 1.0, 4.0, 9.75, 10.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=calls)
    def ask(self) -> Any:
        answer = self.breaker.ask(self.now)
        assert (answer.admitted, answer.permit is not None) == self.model.ask(self.now)
        return answer if answer.admitted else None

    @rule(call=consumes(calls), event=ENDS)
    def end(self, call: Answer | None, event: BreakerEvent) -> None:
        if call is not None:
            assert call.generation is not None
            self.breaker.ended(event, self.now, generation=call.generation, permit=call.permit)
            self.model.end(event.value, call.generation, self.now)

    @rule(call=calls)
    def renew(self, call: Answer | None) -> None:
        if call is not None and call.permit is not None:
            lives = self.breaker.renew(call.permit, self.now)
            if lives:
                assert self.model.at(self.now) == "half_open"
                self.model.probe = self.now + 10.0

    @rule()
    def pass_the_state_on_to_a_restarted_process(self) -> None:
        view = self.breaker.view(self.now)
        self.breaker = Breaker(self.breaker.settings, lease_s=10.0)
        self.breaker.adopt(view, self.now)

    @invariant()
    def states_agree(self) -> None:
        if hasattr(self, "breaker"):
            view = self.breaker.view(self.now)
            assert view.state == self.model.at(self.now)
            assert view.generation == len(self.model.phases) - 1


TestBreakerAgainstModel = BreakerAgainstModel.TestCase
TestBreakerAgainstModel.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)


# The mirror protocol --------------------------------------------------------------------------------------------------


class Cluster:
    """A truth and some mirrors; every message and answer may be lost, and is then sent again."""

    def __init__(self, threshold: int, recovery: float, mirrors: int) -> None:
        self.settings = BreakerSettings(threshold, recovery)
        self.now = 0.0
        self.truth = Truth(self.settings, "lineage")
        self.mirrors = [Mirror(f"p{n}", self.settings) for n in range(mirrors)]

    def exchange(self, mirror: Mirror, losses: str = "") -> list[tuple[Any, Answer | None]]:
        """Send what has gathered; `losses` says of each try whether the message (m) or its answer (a) is lost."""
        message = mirror.next_message()
        if message is None:
            return []
        for loss in losses:
            if loss == "a":
                self.truth.handle(message, self.now)
            again = mirror.next_message()
            assert again is not None
            assert again.seq == message.seq
            message = again
        return mirror.receive(self.truth.handle(message, self.now), self.now)

    def restart(self) -> None:
        self.truth = Truth(self.settings, "lineage")


class MirrorsOfOneBreaker(RuleBasedStateMachine):
    """Whatever is lost and repeated, the truth has seen exactly the ends that mirrors told, each once, in order."""

    @initialize(threshold=st.integers(1, 4), recovery=st.sampled_from([1.0, 5.0]))
    def begin(self, threshold: int, recovery: float) -> None:
        self.cluster = Cluster(threshold, recovery, 3)
        self.oracle = Breaker(self.cluster.settings)
        self.calls: list[tuple[int, Answer]] = []
        for mirror in self.cluster.mirrors:
            self.cluster.exchange(mirror)

    @rule(seconds=st.sampled_from([0.5, 2.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.cluster.now += seconds

    @rule(n=st.integers(0, 2), losses=st.text("ma", max_size=2))
    def call(self, n: int, losses: str) -> None:
        mirror = self.cluster.mirrors[n]
        answer = mirror.check(self.cluster.now)
        if answer is None:
            mirror.ask("me")
            [(_, answer)] = self.cluster.exchange(mirror, losses)
            assert answer is not None
            expected = self.oracle.ask(self.cluster.now)
            assert answer.admitted == expected.admitted
            assert (answer.permit is None) == (expected.permit is None)
        if answer.admitted:
            self.calls.append((n, answer))

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), event=ENDS, losses=st.text("ma", max_size=2))
    def end(self, data: st.DataObject, event: BreakerEvent, losses: str) -> None:
        n, answer = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        mirror = self.cluster.mirrors[n]
        told = mirror.matters(event, answer.permit)
        if told:
            mirror.report(Report(event, answer.generation, answer.permit), "told")
            assert self.cluster.exchange(mirror, losses) == [("told", None)]
        assert answer.generation is not None
        if answer.generation != self.oracle.view(self.cluster.now).generation:
            return
        if event is BreakerEvent.SUCCESS and not told and self.oracle.failures:
            return  # the mirror had not heard of another process's failures yet: this success is not told
        permit = next(iter(self.oracle.permits), None)
        self.oracle.ended(event, self.cluster.now, generation=answer.generation, permit=permit)

    @rule(n=st.integers(0, 2))
    def push(self, n: int) -> None:
        self.cluster.mirrors[n].learn(self.cluster.truth.view(self.cluster.now), self.cluster.now)

    @invariant()
    def truth_is_what_was_told(self) -> None:
        if hasattr(self, "cluster"):
            now = self.cluster.now
            truth, oracle = self.cluster.truth.view(now), self.oracle.view(now)
            assert (truth.state, truth.generation, truth.failures) == (oracle.state, oracle.generation, oracle.failures)
            for mirror in self.cluster.mirrors:
                assert mirror.known.view.version <= truth.version


TestMirrorsOfOneBreaker = MirrorsOfOneBreaker.TestCase
TestMirrorsOfOneBreaker.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(seed=st.integers(0, 2**32))
@hypothesis_settings(max_examples=40)
def test_case_17_a_run_in_a_row_over_many_processes_sees_exactly_the_threshold_of_failures(seed: int) -> None:
    """The run carries what it has heard from step to step; its processes hear nothing else from one another."""
    rng = random.Random(seed)
    threshold = rng.randint(1, 6)
    cluster = Cluster(threshold, 1000.0, 4)
    for mirror in cluster.mirrors:
        cluster.exchange(mirror)
    failures, heard = 0, 0
    for _ in range(threshold + 10):
        cluster.now += rng.random()
        mirror = rng.choice(cluster.mirrors)
        answer = mirror.check(cluster.now, heard)
        if answer is None:
            mirror.ask("step", heard)
            [(_, answer)] = cluster.exchange(mirror, rng.choice(["", "m", "a", "am"]))
            assert answer is not None
        if answer.admitted:
            failures += 1
            mirror.report(Report(BreakerEvent.FAILURE, answer.generation), "told")
            cluster.exchange(mirror, rng.choice(["", "m", "a", "ma"]))
        heard = max(heard, mirror.known.view.heard)
    assert failures == threshold


def test_a_success_elsewhere_is_told_where_the_run_had_heard_of_failures() -> None:
    cluster = Cluster(3, 60.0, 2)
    first, second = cluster.mirrors
    for mirror in cluster.mirrors:
        cluster.exchange(mirror)
    for _ in range(2):
        first.report(Report(BreakerEvent.FAILURE, 0))
        cluster.exchange(first)
    assert not second.matters(BreakerEvent.SUCCESS, None)
    assert second.check(0.0, first.known.view.heard) is None
    second.ask("step", first.known.view.heard)
    cluster.exchange(second)
    assert second.matters(BreakerEvent.SUCCESS, None)
    second.report(Report(BreakerEvent.SUCCESS, 0))
    cluster.exchange(second)
    assert cluster.truth.view(0.0).failures == 0


def test_news_of_a_lost_cluster_costs_one_question() -> None:
    cluster = Cluster(3, 60.0, 1)
    [mirror] = cluster.mirrors
    cluster.exchange(mirror)
    assert mirror.check(0.0, 57) is None
    mirror.ask("step", 57)
    [(_, answer)] = cluster.exchange(mirror)
    assert answer is not None
    assert answer.admitted
    assert mirror.check(0.0, 57) is not None


@pytest.mark.parametrize("fresh_process_first", [False, True])
def test_a_restarted_truth_takes_its_state_from_who_knew_it(fresh_process_first: bool) -> None:
    cluster = Cluster(1, 60.0, 2)
    first, second = cluster.mirrors
    cluster.exchange(first)
    first.report(Report(BreakerEvent.FAILURE, 0, error="ConnectionError"))
    cluster.exchange(first)
    assert cluster.truth.view(0.0).state is BreakerState.OPEN
    cluster.restart()
    cluster.now = 20.0
    if fresh_process_first:
        cluster.exchange(second)
    first.look()
    cluster.exchange(first)
    view = cluster.truth.view(cluster.now)
    assert (view.state, view.generation, view.reason) == (BreakerState.OPEN, 1, "1 failure, the last: ConnectionError")
    assert 0 < view.open_for_s <= 60.0


def test_case_14_a_process_that_joins_never_resets() -> None:
    cluster = Cluster(1, 60.0, 1)
    [mirror] = cluster.mirrors
    cluster.exchange(mirror)
    mirror.report(Report(BreakerEvent.FAILURE, 0))
    cluster.exchange(mirror)
    counted_alone = Breaker(BreakerSettings(100, 60.0))
    for event in [BreakerEvent.FAILURE, BreakerEvent.SUCCESS] * 20:
        counted_alone.ended(event, 0.0, generation=0)
    assert counted_alone.version > cluster.truth.view(0.0).version
    joining = Mirror("new", cluster.settings, seed=counted_alone.view(0.0))
    cluster.exchange(joining)
    assert joining.known.view.state is BreakerState.OPEN
    assert cluster.truth.view(0.0).generation == 1


def test_an_older_view_of_the_same_breaker_is_not_taken_over() -> None:
    cluster = Cluster(1, 60.0, 1)
    [mirror] = cluster.mirrors
    cluster.exchange(mirror)
    older = cluster.truth.view(0.0)
    mirror.report(Report(BreakerEvent.FAILURE, 0))
    cluster.exchange(mirror)
    assert not mirror.learn(older, 1.0)
    assert mirror.known.view.state is BreakerState.OPEN
    assert mirror.learn(Truth(cluster.settings, "another lineage").view(1.0), 1.0)


def test_what_a_process_counted_before_there_was_a_cluster_is_taken_over_by_an_untouched_truth() -> None:
    alone = Breaker(BreakerSettings(1, 60.0))
    alone.ended(BreakerEvent.FAILURE, 0.0, generation=0)
    truth = Truth(alone.settings, "lineage")
    mirror = Mirror("p", alone.settings, seed=alone.view(0.0))
    answer = mirror.check(1.0)
    assert answer is not None
    assert not answer.admitted
    message = mirror.next_message()
    assert message is not None
    mirror.receive(truth.handle(message, 1.0), 1.0)
    assert truth.view(1.0).state is BreakerState.OPEN


def test_other_settings_are_a_conflict_and_do_nothing() -> None:
    truth = Truth(BreakerSettings(5, 60.0), "lineage")
    reply = truth.handle(
        Message("p", 1, BreakerSettings(3, 60.0), reports=(Report(BreakerEvent.FAILURE, 0),), asks=(Asker(),)), 0.0
    )
    assert reply == Reply(truth.view(0.0), (), ("failure_threshold", 5, 3))
    assert truth.view(0.0).failures == 0


def test_the_truth_remembers_a_bounded_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyworkflow_ray.resilience.truth.MAX_REMEMBERED_PROCESSES", 10)
    truth = Truth(BreakerSettings(), "lineage")
    for n in range(100):
        truth.handle(Message(f"p{n}", 1, BreakerSettings()), 0.0)
    assert len(truth._replies) == 10


def test_giving_up_returns_every_ticket_once() -> None:
    mirror = Mirror("p", BreakerSettings())
    mirror.report(Report(BreakerEvent.FAILURE, 0), "a")
    mirror.ask("b")
    mirror.next_message()
    mirror.look("c")
    mirror.report(Report(BreakerEvent.RELEASE, 0))
    assert sorted(mirror.abandon()) == ["a", "b", "c"]
    assert mirror.next_message() is None


def test_a_message_that_was_overtaken_by_its_own_repetition_counts_nothing() -> None:
    """It was sent again, that one was answered, and so was the next message; then the first one arrives."""
    cluster = Cluster(3, 60.0, 1)
    [mirror] = cluster.mirrors
    mirror.report(Report(BreakerEvent.FAILURE, None))
    slow = mirror.next_message()
    assert slow is not None
    cluster.exchange(mirror)
    mirror.report(Report(BreakerEvent.FAILURE, 0))
    cluster.exchange(mirror)
    assert cluster.truth.handle(slow, 1.0).answers == ()
    assert cluster.truth.view(1.0).failures == 2


def test_case_12_newer_code_wins_in_the_cluster_and_older_goes_along() -> None:
    older = BreakerSettings(5, 60.0, ramp=10.0, code="a", since=1.0)
    newer = BreakerSettings(2, 60.0, code="b", since=2.0)
    truth = Truth(older, "lineage")
    first, second = Mirror("old", older), Mirror("new", newer)

    def exchange(mirror: Mirror) -> None:
        mirror.look()
        message = mirror.next_message()
        assert message is not None
        mirror.receive(truth.handle(message, 0.0), 0.0)

    for mirror in (first, second, first):
        exchange(mirror)
        assert mirror.conflict is None
    assert truth.declared == newer
    assert (first.effective.failure_threshold, first.effective.ramp) == (2, None)
    first.report(Report(BreakerEvent.FAILURE, 0))
    first.report(Report(BreakerEvent.FAILURE, 0))
    exchange(first)
    assert truth.view(0.0).state is BreakerState.OPEN
    same_code = Mirror("other", BreakerSettings(7, 60.0, code="b", since=3.0))
    exchange(same_code)
    assert same_code.conflict == ("failure_threshold", 2, 7)
