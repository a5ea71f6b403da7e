"""One breaker for a whole cluster: real processes, real SIGKILLs of its actor."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from pyworkflow_ray.breaker import CircuitBreaker
from pyworkflow_ray.engine.calls import StepCall
from pyworkflow_ray.engine.events import CodeRef
from pyworkflow_ray.errors import CircuitOpenError, ConfigurationError
from pyworkflow_ray.execution.breakers import CircuitGuard
from pyworkflow_ray.resilience.breaker import BreakerEvent, BreakerSettings
from pyworkflow_ray.resilience.mirror import Mirror
from pyworkflow_ray.resilience.policy import RetryPolicy
from pyworkflow_ray.runtime import breaker_actor, breaker_link
from pyworkflow_ray.runtime.breaker_actor import _LINKS, NAMESPACE, _make, actor_name, guard_for, settings_of
from pyworkflow_ray.runtime.breaker_channel import Channel
from pyworkflow_ray.runtime.breaker_link import Link, new_process_id, session_id
from pyworkflow_ray.storage.breaker_states import BreakerStates

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def new(threshold: int = 5, recovery_timeout: Any = 600) -> CircuitBreaker:
    return CircuitBreaker(f"test-{uuid.uuid4().hex}", failure_threshold=threshold, recovery_timeout=recovery_timeout)


def eventually(what: Callable[[], bool], within_s: float = 30.0) -> None:
    """Ask until it is so; a bound for a test that would hang, never a wait that must have passed."""
    until = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def call_dead_service(breaker: CircuitBreaker, times: int) -> list[str]:
    """Names of the exceptions that `times` calls in a row end with."""
    seen = []
    for _ in range(times):
        try:
            with breaker:
                raise ConnectionError("503 from payments")
        except Exception as error:
            seen.append(type(error).__name__)
    return seen


class Process:
    """A process of the cluster that uses breakers; each actor is one of its own."""

    def fail(self, breaker: CircuitBreaker, times: int) -> list[str]:
        return call_dead_service(breaker, times)

    def succeed(self, breaker: CircuitBreaker) -> str:
        with breaker:
            return "ok"

    def state(self, breaker: CircuitBreaker) -> str:
        return breaker.state

    def pid(self) -> int:
        return os.getpid()

    def attempt(self, call: StepCall, error: BaseException | None) -> tuple[str, int]:
        """What a step host does with a call: its attempt, and the generation that its outcome returns."""
        guard = guard_for(call)
        assert guard is not None
        try:
            permit = guard.acquire()
        except CircuitOpenError:
            return "refused", guard.generation
        if error is None:
            permit.success()
            return "succeeded", guard.generation
        permit.failure("transient", error)
        return "failed", guard.generation

    def force(self, breaker: CircuitBreaker, how: str, **options: Any) -> None:
        getattr(breaker, how)(**options)

    def listen(self, breaker: CircuitBreaker) -> None:
        self.heard: list[tuple[str | None, str, str]] = []
        breaker.on_state_change(lambda change: self.heard.append((change.key, change.old.value, change.new.value)))

    def told(self) -> list[tuple[str | None, str, str]]:
        return self.heard

    def race(self, breaker: CircuitBreaker, until: float, threads: int = 8) -> list[tuple[float, float]]:
        """Ask again and again, from some threads; when each call that was let through ran."""
        ran: list[tuple[float, float]] = []

        def ask() -> None:
            while time.time() < until:
                try:
                    with breaker:
                        began = time.time()
                        time.sleep(0.005)
                        ran.append((began, time.time()))
                        raise ConnectionError("still dead")
                except Exception:
                    time.sleep(0.001)

        asking = [threading.Thread(target=ask) for _ in range(threads)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        return ran

    def pretend(self, breaker: CircuitBreaker, node: str) -> None:
        """As if this process ran on another node."""
        with breaker:
            breaker._circuit().mirror.node = node  # type: ignore[attr-defined]

    def count_through(self, breaker: CircuitBreaker, calls: int) -> int:
        """How many of so many calls, one after another, are let through."""
        through = 0
        for _ in range(calls):
            try:
                with breaker:
                    through += 1
            except CircuitOpenError:
                continue
        return through

    def probe_and_die(self, breaker: CircuitBreaker) -> None:
        with breaker:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def processes(ray_cluster: None) -> Any:
    actors = [ray.remote(Process).options(num_cpus=0).remote() for _ in range(2)]
    assert len(set(ray.get([actor.pid.remote() for actor in actors]))) == 2
    yield actors
    for actor in actors:
        ray.kill(actor)
    for link in _LINKS.values():  # or this process would make the breakers' actors again
        link.close()
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith("breaker:test-"):
            ray.kill(ray.get_actor(**actor))


def actor_of(breaker: CircuitBreaker) -> Any:
    return ray.get_actor(actor_name(breaker.name), namespace=NAMESPACE)


def actor_pid(breaker: CircuitBreaker) -> int:
    return int(ray.get(actor_of(breaker).__ray_call__.remote(lambda self: os.getpid())))


def step_call(breaker: CircuitBreaker, *, settings: dict[str, Any] | None, generation: int = 0) -> StepCall:
    return StepCall(
        run_id="run",
        run_uid="uid",
        storage_id="storage",
        generation=0,
        workflow="flow",
        position="1",
        number=1,
        epoch=0,
        dispatch=1,
        step="charge",
        code=CodeRef(how="import", name="charge"),
        args=[],
        kwargs={},
        policy=RetryPolicy(),
        breaker=breaker.name,
        breaker_settings=settings,
        breaker_generation=generation,
    )


def test_two_processes_share_one_breaker(processes: list[Any]) -> None:
    breaker = new(5)
    first, second = processes
    assert ray.get(first.fail.remote(breaker, 3)) == ["ConnectionError"] * 3
    assert ray.get(second.fail.remote(breaker, 4)) == ["ConnectionError"] * 2 + ["CircuitOpenError"] * 2
    assert breaker.state == "open"
    with pytest.raises(CircuitOpenError) as refused, breaker:
        raise AssertionError
    assert refused.value.name == breaker.name
    assert refused.value.retry_after == pytest.approx(600, abs=60)
    assert "503 from payments" in refused.value.reason


def test_case_14_a_process_that_joins_takes_the_state_over(processes: list[Any]) -> None:
    breaker = new(2)
    first, second = processes
    ray.get(first.fail.remote(breaker, 2))
    assert ray.get(second.fail.remote(breaker, 3)) == ["CircuitOpenError"] * 3
    assert ray.get(first.state.remote(breaker)) == "open"


def test_a_process_that_calls_nothing_hears_of_the_opening(processes: list[Any]) -> None:
    breaker = new(2)
    assert breaker.state == "closed"
    ray.get(processes[0].fail.remote(breaker, 2))
    eventually(lambda: breaker._circuit().known().state == "open")


def test_a_success_in_another_process_sets_the_count_to_zero(processes: list[Any]) -> None:
    breaker = new(3)
    first, second = processes
    assert breaker.state == "closed"
    ray.get(first.fail.remote(breaker, 2))
    ray.get(second.state.remote(breaker))  # it has heard of the failures
    ray.get(second.succeed.remote(breaker))
    assert ray.get(first.fail.remote(breaker, 4)) == ["ConnectionError"] * 3 + ["CircuitOpenError"]


def test_one_probe_for_the_whole_cluster(processes: list[Any]) -> None:
    breaker = new(1, 0)
    ray.get(processes[0].fail.remote(breaker, 1))
    with breaker:
        assert breaker.state == "half_open"
        for process in processes:
            with pytest.raises(CircuitOpenError) as refused:
                ray.get(process.succeed.remote(breaker))
            assert refused.value.retry_after == 0
    assert breaker.state == "closed"
    assert ray.get([process.succeed.remote(breaker) for process in processes]) == ["ok", "ok"]


async def test_async_calls_go_through_the_same_breaker(processes: list[Any]) -> None:
    breaker = new(2)

    @breaker.call
    async def dead() -> None:
        raise TimeoutError

    ray.get(processes[0].fail.remote(breaker, 1))
    with pytest.raises(TimeoutError):
        await dead()
    with pytest.raises(CircuitOpenError):
        await dead()
    with pytest.raises(CircuitOpenError):
        async with breaker:
            raise AssertionError


def test_case_15_a_breaker_travels_into_tasks_and_is_the_same_breaker() -> None:
    breaker = new(3)

    @ray.remote(max_retries=0)
    def task() -> list[str]:
        return call_dead_service(breaker, 2)  # by its closure

    assert ray.get(task.remote()) == ["ConnectionError"] * 2
    assert ray.get(task.remote()) == ["ConnectionError", "CircuitOpenError"]
    assert breaker.state == "open"


def test_case_17_a_run_of_a_dead_service_sees_exactly_five_failures_then_refusals(processes: list[Any]) -> None:
    breaker = new(5)
    settings, generation, seen = breaker.settings, 0, []
    for n in range(9):
        call = step_call(breaker, settings=settings, generation=generation)
        end, generation = ray.get(processes[n % 2].attempt.remote(call, ConnectionError("503")))
        seen.append(end)
    assert seen == ["failed"] * 5 + ["refused"] * 4


def test_case_17_a_success_in_the_run_counts_in_its_place(processes: list[Any]) -> None:
    breaker = new(3)
    generation, seen = 0, []
    for n, error in enumerate([1, 1, 0, 1, 1, 0, 1, 1, 1, 1]):
        call = step_call(breaker, settings=breaker.settings, generation=generation)
        failure = ConnectionError("503") if error else None
        end, generation = ray.get(processes[n % 2].attempt.remote(call, failure))
        seen.append(end)
    assert seen == "failed failed succeeded failed failed succeeded failed failed failed refused".split()


def test_a_step_knows_its_breaker_from_the_call_the_process_or_the_actor(processes: list[Any]) -> None:
    breaker = new(4, 30)
    assert settings_of(breaker.name).items() >= {"failure_threshold": 4, "recovery_timeout": 30.0}.items()
    assert isinstance(guard_for(step_call(breaker, settings=None)), CircuitGuard)
    call = step_call(breaker, settings=None)
    with pytest.raises(ConfigurationError, match=breaker.name):
        ray.get(processes[0].attempt.remote(call, None))
    assert breaker.state == "closed"  # now its actor lives
    assert ray.get(processes[0].attempt.remote(call, None))[0] == "succeeded"


def test_case_12_conflicting_settings_between_processes_are_named_at_first_use(processes: list[Any]) -> None:
    breaker = new(5, 60)
    assert breaker.state == "closed"

    class Other(Process):
        def use(self, name: str) -> str:
            with CircuitBreaker(name, failure_threshold=3, recovery_timeout=60):
                return "went through"

    other = ray.remote(Other).options(num_cpus=0).remote()
    with pytest.raises(ConfigurationError) as caught:
        ray.get(other.use.remote(breaker.name))
    for part in (breaker.name, "failure_threshold=3", "failure_threshold=5"):
        assert part in str(caught.value)
    ray.kill(other)


def test_closed_calls_pass_and_failures_wait_while_the_actor_is_made() -> None:
    """The making hangs until the test lets it go on."""
    go_on, name = threading.Event(), f"test-{uuid.uuid4().hex}"
    mirror = Mirror(new_process_id(), BreakerSettings(2, 600.0))

    def make(lineage: str) -> Any:
        go_on.wait()
        return _make(name, mirror.settings, lineage)

    link = Link(name, mirror, Channel(name, lambda: None, make, session_id() or ""))
    for _ in range(3):
        link.enter().success()
    permit = link.enter()
    told = link.tell(permit, BreakerEvent.FAILURE, "ConnectionError")
    assert told is not None
    assert not told.done()
    assert not mirror.known.joined
    go_on.set()
    link.wait(told)
    assert mirror.known.view.failures == 1
    link.close()


def test_the_actor_is_named_and_takes_no_cpu_from_steps() -> None:
    breaker = new()
    assert breaker.state == "closed"
    assert {"namespace": NAMESPACE, "name": actor_name(breaker.name)} in ray.util.list_named_actors(all_namespaces=True)
    resources = actor_of(breaker).__ray_call__.remote(lambda self: ray.get_runtime_context().get_assigned_resources())
    assert ray.get(resources).get("CPU", 0) == 0


def test_sigkill_of_the_actor_loses_neither_state_nor_count(processes: list[Any]) -> None:
    opened, counting = new(2), new(3)
    assert counting.state == "closed"
    ray.get(processes[0].fail.remote(opened, 2))
    ray.get(processes[0].fail.remote(counting, 2))
    assert (opened.state, counting.state) == ("open", "closed")  # this process has heard of both
    pids = [actor_pid(opened), actor_pid(counting)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
    with pytest.raises(CircuitOpenError), opened:  # an open mirror refuses by itself
        raise AssertionError
    assert call_dead_service(counting, 3) == ["ConnectionError", "CircuitOpenError", "CircuitOpenError"]
    assert opened.state == "open"
    assert actor_pid(opened) not in pids
    assert actor_pid(counting) not in pids
    assert ray.get(processes[1].fail.remote(opened, 1)) == ["CircuitOpenError"]


def test_an_actor_that_was_ended_for_good_is_made_again(processes: list[Any]) -> None:
    breaker = new(2)
    ray.get(processes[0].fail.remote(breaker, 1))
    assert breaker.state == "closed"
    ray.kill(actor_of(breaker), no_restart=True)
    assert call_dead_service(breaker, 2) == ["ConnectionError", "CircuitOpenError"]
    assert ray.get(processes[1].state.remote(breaker)) == "open"


def test_the_permit_of_a_killed_process_ends_with_its_lease() -> None:
    breaker = new(1, 0)
    assert call_dead_service(breaker, 1) == ["ConnectionError"]
    doomed = ray.remote(Process).options(num_cpus=0).remote()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(doomed.probe_and_die.remote(breaker))
    assert breaker.state == "half_open"
    eventually(lambda: breaker.state == "open")
    assert "lost" in breaker._circuit().known().reason
    with breaker:
        pass
    assert breaker.state == "closed"


# Keys, forces, listeners, the half-open edge, storage -----------------------------------------------------------------


def test_case_18_one_actor_holds_all_keys_and_each_is_a_breaker_of_the_cluster(processes: list[Any]) -> None:
    breaker = new(2)
    first, second = processes
    ray.get(first.fail.remote(breaker.key("a"), 2))
    assert ray.get(second.fail.remote(breaker.key("a"), 1)) == ["CircuitOpenError"]
    assert ray.get(second.fail.remote(breaker.key("b"), 1)) == ["ConnectionError"]
    assert breaker.state == "closed"
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert [name for name in names if breaker.name in name] == [actor_name(breaker.name)]
    keys = dict(ray.get(actor_of(breaker).snapshot.remote()))
    assert {key: view.state for key, view in keys.items()} == {None: "closed", "a": "open", "b": "closed"}


def asks(processes: list[Any], breaker: CircuitBreaker) -> None:
    """What one process changed is told to the others; who asks has heard of it when the answer is there."""
    ray.get([process.state.remote(breaker) for process in processes])


def test_forces_and_settings_hold_in_every_process(processes: list[Any]) -> None:
    breaker = new(2)
    first, second = processes
    assert ray.get([process.succeed.remote(breaker) for process in processes]) == ["ok", "ok"]
    ray.get(first.force.remote(breaker, "force_open"))
    assert ray.get(second.state.remote(breaker)) == "forced_open"
    with pytest.raises(CircuitOpenError) as refused:
        ray.get(second.succeed.remote(breaker))
    assert refused.value.retry_after is None
    breaker.reset()
    ray.get(second.force.remote(breaker, "configure", failure_threshold=1))
    assert breaker.snapshot().settings["failure_threshold"] == 1
    asks(processes, breaker)
    assert ray.get(first.fail.remote(breaker, 2)) == ["ConnectionError", "CircuitOpenError"]
    assert breaker.state == "open"  # declared settings are compared, never configured ones


def test_a_listener_hears_of_what_another_process_caused(processes: list[Any]) -> None:
    breaker = new(1)
    first, second = processes
    ray.get(first.listen.remote(breaker))
    assert ray.get(first.state.remote(breaker)) == "closed"
    ray.get(second.fail.remote(breaker, 1))
    eventually(lambda: ray.get(first.told.remote()) == [(None, "closed", "open")])
    ray.get(second.force.remote(breaker, "reset"))
    eventually(lambda: ray.get(first.told.remote())[1:] == [(None, "open", "closed")])


def test_case_6_a_race_at_the_half_open_edge_never_runs_more_probes_than_permits(processes: list[Any]) -> None:
    breaker = CircuitBreaker(
        f"test-{uuid.uuid4().hex}", failure_threshold=1, recovery_timeout=0.02, half_open_max_calls=2
    )
    assert ray.get(processes[0].fail.remote(breaker, 1)) == ["ConnectionError"]
    assert ray.get([process.state.remote(breaker) for process in processes]) == ["open", "open"]
    until = time.time() + 1.5
    ran = [span for spans in ray.get([p.race.remote(breaker, until) for p in processes]) for span in spans]
    assert len(ran) > 10
    edges = sorted([(began, 1) for began, _ in ran] + [(ended, -1) for _, ended in ran])
    at_once = most = 0
    for _, step in edges:
        at_once += step
        most = max(most, at_once)
    assert most <= 2


def test_case_13_a_new_actor_begins_with_the_state_in_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker_actor, "_ROOT", str(tmp_path))
    breaker = new(1)
    assert call_dead_service(breaker, 1) == ["ConnectionError"]
    assert call_dead_service(breaker.key("k"), 1) == ["ConnectionError"]
    kept = BreakerStates(str(tmp_path), breaker.name)
    eventually(lambda: len((kept.load() or ([], 0.0))[0]) == 2)
    for link in list(_LINKS.values()):
        if link.name == breaker.name:  # nobody in the cluster knows it any more
            link.close()
    ray.kill(actor_of(breaker), no_restart=True)
    assert breaker.state == "open"
    assert breaker.key("k").state == "open"
    assert 500 < (breaker.snapshot().retry_after or 0) <= 600


def test_case_13_with_an_unreachable_actor_a_process_goes_on_by_its_own_evidence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(breaker_link, "WAIT_S", 0.3)

    def make(lineage: str) -> Any:
        raise ConnectionError("nowhere to make it")

    name = f"test-{uuid.uuid4().hex}"
    channel = Channel(name, lambda: None, make, session_id() or "")
    link = Link(name, Mirror(new_process_id(), BreakerSettings(2, 0.2)), channel)
    eventually(lambda: channel.unreachable(time.monotonic(), 0.3))
    for _ in range(2):
        link.enter().failure("transient", ConnectionError())
    with pytest.raises(CircuitOpenError):
        link.enter()
    eventually(lambda: time.monotonic() > channel.down_since + 0.9)  # its recovery timeout is over
    link.enter().success()  # the one probe of this process
    link.enter().success()
    assert caplog.text.count("does not answer") == 1
    link.close()


def test_case_16_a_closed_call_asks_nobody_and_takes_no_lock(
    processes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaker = new(2)
    assert breaker.state == "closed"
    link = breaker._circuit()
    assert isinstance(link, Link)
    sent: list[Any] = []
    send, lock = link.channel._send, link._lock

    async def counting(messages: list[Any]) -> Any:
        sent.append(messages)
        return await send(messages)

    class NoLock:
        def __enter__(self) -> None:
            assert threading.current_thread() is not threading.main_thread(), "a lock was taken"

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(link.channel, "_send", counting)
    monkeypatch.setattr(link, "_lock", NoLock())
    guarded = breaker.call(lambda: 1)
    for _ in range(10_000):
        assert guarded() == 1
        with breaker:
            pass
    assert sent == []
    monkeypatch.setattr(link, "_lock", lock)
    assert call_dead_service(breaker, 1) == ["ConnectionError"]
    assert len(sent) == 1


def test_case_2_a_sick_node_is_cut_off_alone_and_the_second_one_opens_it_for_all(processes: list[Any]) -> None:
    breaker = CircuitBreaker(f"test-{uuid.uuid4().hex}", failure_threshold=2, recovery_timeout=600, min_nodes=2)
    sick, well = processes
    ray.get([sick.pretend.remote(breaker, "sick"), well.pretend.remote(breaker, "well")])
    assert ray.get(sick.fail.remote(breaker, 4)) == ["ConnectionError"] * 2 + ["CircuitOpenError"] * 2
    assert ray.get(well.succeed.remote(breaker)) == "ok"
    snapshot = breaker.snapshot()
    assert snapshot.state == "closed"
    assert list(snapshot.nodes) == ["sick"]
    assert "2 consecutive failures" in snapshot.nodes["sick"]
    breaker.reset()
    assert breaker.snapshot().nodes == {}
    asks(processes, breaker)
    assert ray.get(sick.fail.remote(breaker, 1)) == ["ConnectionError"]
    assert ray.get(well.fail.remote(breaker, 1)) == ["ConnectionError"]
    assert breaker.state == "open"
    assert "from 2 nodes" in breaker.snapshot().reason
    for process in processes:
        with pytest.raises(CircuitOpenError):
            ray.get(process.succeed.remote(breaker))


def test_case_9_a_ramp_is_one_for_all_processes(processes: list[Any]) -> None:
    breaker = CircuitBreaker(f"test-{uuid.uuid4().hex}", failure_threshold=1, recovery_timeout=0, ramp="10m")
    assert ray.get(processes[0].fail.remote(breaker, 1)) == ["ConnectionError"]
    assert ray.get(processes[1].succeed.remote(breaker)) == "ok"  # the probe
    assert breaker.snapshot().ramp == pytest.approx(0.05, abs=0.05)
    asks(processes, breaker)
    through = ray.get([process.count_through.remote(breaker, 100) for process in processes])
    assert sum(through) < 100, through  # a share of what both offer, never all
    breaker.configure(ramp=None)
    asks(processes, breaker)
    assert ray.get([process.count_through.remote(breaker, 20) for process in processes]) == [20, 20]


def test_case_13_sigkill_of_the_actor_in_half_open_lets_no_second_probe_through(processes: list[Any]) -> None:
    breaker = new(1, 0)
    ray.get(processes[0].fail.remote(breaker, 1))
    with breaker:
        assert ray.get([process.state.remote(breaker) for process in processes]) == ["half_open", "half_open"]
        pid = actor_pid(breaker)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not os.path.exists(f"/proc/{pid}"))
        for process in processes:
            with pytest.raises(CircuitOpenError):
                ray.get(process.succeed.remote(breaker))
        assert breaker.state == "half_open"
        assert actor_pid(breaker) != pid
    assert breaker.state == "closed"
    assert ray.get([process.succeed.remote(breaker) for process in processes]) == ["ok", "ok"]


@pytest.mark.slow
def test_case_6_fifty_processes_at_the_half_open_edge_never_run_more_probes_than_permits() -> None:
    permits = 3
    breaker = CircuitBreaker(
        f"test-{uuid.uuid4().hex}", failure_threshold=1, recovery_timeout=0.05, half_open_max_calls=permits
    )
    actors = [ray.remote(Process).options(num_cpus=0).remote() for _ in range(50)]
    try:
        assert len(set(ray.get([actor.pid.remote() for actor in actors]))) == 50
        assert ray.get(actors[0].fail.remote(breaker, 1)) == ["ConnectionError"]
        assert set(ray.get([actor.state.remote(breaker) for actor in actors])) == {"open"}
        until = time.time() + 20
        ran = [span for spans in ray.get([a.race.remote(breaker, until, 2) for a in actors]) for span in spans]
        assert len(ran) > 50
        # An end sorts before a beginning of the same instant.
        edges = sorted([(began, 1) for began, _ in ran] + [(ended, -1) for _, ended in ran])
        at_once = most = 0
        for _, step in edges:
            at_once += step
            most = max(most, at_once)
        assert 1 < most <= permits
    finally:
        for actor in actors:
            ray.kill(actor)
