"""What users do with a breaker besides calling through it: modes, keys, forces, settings, listeners, what counts."""

from __future__ import annotations

import contextvars
import os
import pickle
import uuid
from typing import Any

import cloudpickle
import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.breaker import CircuitBreaker, StateChange
from pyworkflow_ray.errors import CircuitOpenError, ConfigurationError
from pyworkflow_ray.execution import breakers, hooks
from pyworkflow_ray.execution.breakers import LocalCircuit, declare, declared
from pyworkflow_ray.resilience.breaker import BreakerEvent, BreakerSettings


class Busy(Exception):
    pass


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def new(**options: Any) -> CircuitBreaker:
    return CircuitBreaker(f"test-{uuid.uuid4().hex}", **options)


def fail(breaker: CircuitBreaker, times: int = 1, error: BaseException | None = None) -> None:
    for _ in range(times):
        with pytest.raises(type(error) if error else ConnectionError), breaker:
            raise error or ConnectionError("503")


def succeed(breaker: CircuitBreaker, times: int = 1) -> None:
    for _ in range(times):
        with breaker:
            pass


def test_rate_mode_through_the_public_class() -> None:
    breaker = new(failure_rate=0.5, minimum_calls=4, window=10)
    succeed(breaker, 3)
    fail(breaker, 2)
    snapshot = breaker.snapshot()
    assert (snapshot.calls, snapshot.failures, snapshot.failure_rate) == (5, 2, 0.4)
    fail(breaker)
    assert breaker.state == "open"
    assert breaker.snapshot().reason.startswith("3 of the last 6 calls failed (50%, limit 50%)")


def test_slow_calls_are_measured_on_the_breakers_clock() -> None:
    clock = Clock()
    circuit = LocalCircuit("slow", BreakerSettings(failure_threshold=2, slow_call_duration=2.0), clock=clock)
    for took in (2.0, 1.9, 2.0, 2.5):
        permit = circuit.enter()
        clock.now += took
        permit.success()
    assert circuit.look().state == "open"
    assert "a slow call (2.5s)" in circuit.look().reason


def test_several_probes_at_once_and_several_successes_to_close() -> None:
    breaker = new(failure_threshold=1, recovery_timeout=0, half_open_max_calls=2, success_threshold=2)
    fail(breaker)
    enter = breaker._circuit().enter
    # each in a context of its own, or the later calls would be calls within the first one
    first, second = (contextvars.copy_context().run(enter) for _ in range(2))
    with pytest.raises(CircuitOpenError) as refused:
        contextvars.copy_context().run(enter)
    assert refused.value.retry_after == 0
    first.success()
    assert breaker.state == "half_open"
    second.success()
    assert breaker.state == "closed"


# Keys -------------------------------------------------------------


def test_case_18_each_key_is_a_breaker_of_its_own_with_the_same_settings() -> None:
    breaker = new(failure_threshold=2)
    fail(breaker.key("host-7"), 2)
    assert breaker.key("host-7").state == "open"
    assert breaker.key("host-8").state == "closed"
    assert breaker.state == "closed"
    with pytest.raises(CircuitOpenError) as refused, breaker.key("host-7"):
        raise AssertionError
    assert (refused.value.name, refused.value.key) == (breaker.name, "host-7")
    assert f"{breaker.name}[host-7]" in str(refused.value)


def test_a_key_travels_and_is_found_by_its_name() -> None:
    breaker = new(failure_threshold=1)
    fail(pickle.loads(pickle.dumps(breaker.key("a"))))
    found = declared(f"{breaker.name}[a]")
    assert found is not None
    assert found.local.look().state == "open"
    assert declare(f"{breaker.name}[b]", BreakerSettings(failure_threshold=1)).local.look().state == "closed"


@pytest.mark.parametrize("key", ["", "a\nb", 7, None, "x" * 257])
def test_a_wrong_key_is_refused(key: Any) -> None:
    with pytest.raises(ConfigurationError, match="1 to 256 printable"):
        new().key(key)
    with pytest.raises(ConfigurationError, match="no keys of its own"):
        new().key("a").key("b")


def test_case_18_a_million_keys_do_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakers, "MAX_KEYS", 100)
    monkeypatch.setattr(breakers, "_KEYS", type(breakers._KEYS)())
    breaker = new(failure_threshold=1)
    fail(breaker.key("sick"))
    for n in range(2_000):
        succeed(breaker.key(f"host-{n}"))
    assert len(breakers._KEYS) <= 101
    assert breaker.key("sick").state == "open"


# Forces and settings -------------------------------------------------------------


def test_forced_states_and_reset() -> None:
    breaker = new(failure_threshold=1)
    breaker.force_open()
    assert breaker.state == "forced_open"
    with pytest.raises(CircuitOpenError) as refused, breaker:
        raise AssertionError
    assert refused.value.retry_after is None
    assert "until somebody resets it" in str(refused.value)
    breaker.force_closed()
    fail(breaker, 10)
    assert breaker.state == "forced_closed"
    breaker.reset()
    assert breaker.state == "closed"
    fail(breaker)
    assert breaker.state == "open"
    breaker.reset()
    succeed(breaker)


def test_case_12_configure_changes_the_living_breaker_and_not_what_is_declared() -> None:
    breaker = new(failure_threshold=5)
    breaker.configure(failure_threshold=1, recovery_timeout="5m")
    fail(breaker)
    assert breaker.state == "open"
    assert breaker.snapshot().settings == {"failure_threshold": 1, "recovery_timeout": 300.0}
    assert 290 < (breaker.snapshot().retry_after or 0) <= 300
    assert CircuitBreaker(breaker.name, failure_threshold=5).state == "open"
    with pytest.raises(ConfigurationError, match="did you mean 'failure_threshold'"):
        breaker.configure(failure_treshold=1)
    with pytest.raises(ConfigurationError, match="needs slow_call_duration"):
        breaker.configure(slow_call_rate=0.5)
    with pytest.raises(ConfigurationError, match="declared, not configured"):
        breaker.configure(counts=ValueError)


# Listeners -------------------------------------------------------------


def test_listeners_hear_each_change_with_names_states_and_reason() -> None:
    breaker = new(failure_threshold=1, recovery_timeout=0)
    heard: list[StateChange] = []
    breaker.on_state_change(heard.append)
    fail(breaker)
    succeed(breaker)
    assert [(change.old, change.new) for change in heard] == [
        ("closed", "open"),
        ("open", "half_open"),
        ("half_open", "closed"),
    ]
    assert (heard[0].name, heard[0].key) == (breaker.name, None)
    assert heard[0].reason == "1 failure, the last: ConnectionError: 503"
    assert heard[-1].reason == ""


def test_a_listener_of_a_breaker_hears_of_its_keys_and_one_of_a_key_of_that_alone() -> None:
    breaker = new(failure_threshold=1)
    every: list[Any] = []
    one: list[Any] = []
    breaker.on_state_change(lambda change: every.append(change.key))
    breaker.key("a").on_state_change(lambda change: one.append(change.key))
    fail(breaker.key("a"))
    fail(breaker.key("b"))
    fail(breaker)
    assert (every, one) == (["a", "b", None], ["a"])


def test_case_14_a_listener_that_raises_is_harmless_and_may_use_the_breaker() -> None:
    breaker = new(failure_threshold=1)
    states: list[str] = []

    @breaker.on_state_change
    def broken(change: StateChange) -> None:
        raise RuntimeError

    breaker.on_state_change(lambda change: states.append(breaker.state))  # no lock is held
    fail(breaker)
    assert states == ["open"]


def test_on_breaker_open_is_told_once_a_breaker_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_own", {event: list(known) for event, known in hooks._own.items()})
    heard: list[Any] = []
    pw.on_breaker_open(heard.append)
    breaker = new(failure_threshold=1, recovery_timeout=30)
    fail(breaker.key("k"))
    mine = [event for event in heard if event.name == breaker.name]
    assert [(event.key, event.open_for) for event in mine] == [("k", pytest.approx(30, abs=1))]


# What counts -------------------------------------------------------------


@pytest.mark.parametrize("counts", [Busy, (Busy, OSError), lambda error: isinstance(error, Busy)])
def test_counts_decides_in_place_of_the_taxonomy(counts: Any) -> None:
    breaker = new(failure_threshold=1, counts=counts)
    fail(breaker, 3, TimeoutError() if counts is Busy else RuntimeError())
    assert breaker.state == "closed"
    fail(cloudpickle.loads(cloudpickle.dumps(breaker)), 1, Busy())
    assert breaker.state == "open"


def test_types_count_no_refusal_of_ours_unless_they_name_it() -> None:
    inner, around = new(failure_threshold=1), new(failure_threshold=1, counts=Exception)
    asked = new(failure_threshold=1, counts=CircuitOpenError)
    fail(inner)
    for breaker, state in ((around, "closed"), (asked, "open")):
        with pytest.raises(CircuitOpenError), breaker, inner:
            raise AssertionError
        assert breaker.state == state


def test_a_counts_that_raises_leaves_it_to_the_taxonomy(caplog: pytest.LogCaptureFixture) -> None:
    def broken(error: BaseException) -> bool:
        raise RuntimeError

    breaker = new(failure_threshold=1, counts=broken)
    fail(breaker, 1, ValueError())
    assert breaker.state == "closed"
    fail(breaker)
    assert breaker.state == "open"
    assert "the taxonomy decides" in caplog.text


def test_what_counts_is_found_by_its_name_where_only_the_settings_came() -> None:
    name = f"test-{uuid.uuid4().hex}"
    found = declare(name, BreakerSettings(counts="builtins:KeyError"))
    assert found.counts is not None
    assert found.counts(KeyError()) is True
    with pytest.raises(ConfigurationError, match=r"nowhere:nothing.*can't be found"):
        declare(f"test-{uuid.uuid4().hex}", BreakerSettings(counts="nowhere:nothing"))
    with pytest.raises(ConfigurationError, match="counts="):
        CircuitBreaker(name, counts=ValueError)
    assert BreakerEvent.FAILURE == "failure"


# Declared anew --------------------------------------------------------------


def ran(cell: str) -> CircuitBreaker:
    """What a notebook's cell makes."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(f"from pyworkflow_ray import CircuitBreaker\nbreaker = {cell}", "<cell>", "exec"), namespace)
    breaker = namespace["breaker"]
    assert isinstance(breaker, CircuitBreaker)
    return breaker


def test_case_12_a_cell_that_is_run_again_with_other_settings_wins_and_says_so(caplog: Any) -> None:
    name = f"test-{uuid.uuid4().hex}"
    first = ran(f"CircuitBreaker({name!r}, failure_threshold=3)")
    fail(first, 2)
    second = ran(f"CircuitBreaker({name!r}, failure_threshold=4)")
    assert "declared anew, with failure_threshold=4 where it had 3: the newer code holds" in caplog.text
    assert second.snapshot().failures == 2  # it goes on
    assert second.snapshot().settings["failure_threshold"] == 4
    fail(second.key("a"), 4)
    assert second.key("a").state == "open"
    fail(second, 2)
    assert second.state == "open"
    assert pickle.loads(pickle.dumps(first)).state == "open"  # older code goes along


def test_case_12_a_module_that_changed_on_disk_wins_over_its_older_version(tmp_path: Any) -> None:
    name, path = f"test-{uuid.uuid4().hex}", tmp_path / "shop.py"
    made = []
    for at, threshold in ((1_000.0, 3), (2_000.0, 4), (2_000.0, 4)):
        path.write_text(
            f"from pyworkflow_ray import CircuitBreaker\nb = CircuitBreaker({name!r}, failure_threshold={threshold})"
        )
        os.utime(path, (at, at))
        namespace: dict[str, Any] = {"__name__": "shop"}
        exec(compile(path.read_text(), str(path), "exec"), namespace)
        made.append(namespace["b"])
    assert made[2].snapshot().settings["failure_threshold"] == 4
    assert made[1].settings == {"failure_threshold": 4, "recovery_timeout": 60.0}
