"""Every option of @step and @workflow: its range, its refusals, and the names for misspellings."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.execution.options import STEP_OPTIONS, check_step_options, check_workflow_options

NAN, INF = float("nan"), float("inf")

BAD_STEP_VALUES: dict[str, list[Any]] = {
    "name": ["", "  ", 7, "a\nb", "x" * 201, b"name"],
    "max_retries": [-1, 1.5, "3", True],
    "retry_delay": [-1, "soon", NAN, INF, None, True, dt.timedelta(seconds=-1), [], [1, -2], ("soon",)],
    "retry_backoff": [0.99, 0, -2, NAN, INF, "2", None, True],
    "max_retry_delay": [-1, "5M", NAN, True, object()],
    "jitter": ["ful", None, True, 1, "AUTO"],
    "retry_on": ["ValueError", [ValueError, "x"], int, 5, (ValueError(),)],
    "no_retry_on": ["ValueError", [int], 5],
    "timeout": [0, -1, "0s", NAN, True, "later", dt.timedelta(0)],
    "total_timeout": [0, -1, "soon", True, INF],
    "on_exhausted": ["ignore", None, True],
    "breaker": ["", 5, object(), []],
    "on_open": ["later", None, True, "wait"],
    "retry_budget": ["", 3, object()],
    "durability": ["", "late", None, True, 1],
    "idempotent": [None, 1, "yes"],
    "max_recoveries": [-1, None, 1.0, True],
    "executor": ["thread", None, "Local"],
    "num_cpus": [-1, "2", NAN, True],
    "num_gpus": [-0.5, "1", INF],
    "memory": [-1, "1GB"],
    "memory_growth": [2, 0.5],  # without memory
    "max_memory": [10**9],
    "resources": [{"a": -1}, {"a": "1"}, {1: 1}, ["a"], {"CPU": 1}, {"GPU": 1}, {"a": True}],
    "runtime_env": ["env.yaml", ["numpy"]],
    "scheduling_strategy": ["spread", 5, object()],
    "ray_remote_args": [
        ["max_calls"],
        {1: 2},
        {"max_retries": 1},
        {"retry_exceptions": True},
        {"num_returns": 2},
        {"name": "x"},
        {"max_cals": 1},
        {"scheduling_strategy": "spread"},
    ],
}
GOOD_STEP_VALUES: dict[str, list[Any]] = {
    "name": [None, "charge", "Zahlung prüfen", "x" * 200],
    "max_retries": [0, 5, None],
    "retry_delay": [0, 0.5, "500ms", dt.timedelta(seconds=3), [1, "2m"], (0,), lambda attempt, error: 1],
    "retry_backoff": [1, 1.0, 2],
    "max_retry_delay": [None, 0, 60, "1h"],
    "jitter": ["auto", "none", "proportional", "full", "equal", "decorrelated"],
    "retry_on": [None, ValueError, [ValueError, OSError], (), {KeyError}, lambda error: True],
    "no_retry_on": [(), KeyError, [KeyError], lambda error: False],
    "timeout": [None, 0.001, "30s", dt.timedelta(minutes=1)],
    "total_timeout": [None, 0.5, "5m", dt.timedelta(hours=1)],
    "on_exhausted": ["raise", "pause"],
    "breaker": [None, "payments"],
    "on_open": ["raise"],
    "retry_budget": [None, "payments"],
    "idempotent": [True, False],
    "durability": ["strict", "relaxed"],
    "max_recoveries": [0, 3],
    "executor": ["task", "local"],
    "num_cpus": [None, 0, 0.5, 4],
    "num_gpus": [None, 0, 1],
    "memory": [None, 10**9],
    "memory_growth": [None],
    "max_memory": [None],
    "resources": [None, {}, {"licence": 1}],
    "runtime_env": [None, {"env_vars": {"A": "1"}}],
    "scheduling_strategy": [None, "SPREAD", "DEFAULT"],
    "ray_remote_args": [None, {}, {"max_calls": 1}, {"some_newer_option": 1}],
}


def test_the_tables_cover_every_option() -> None:
    assert set(BAD_STEP_VALUES) == set(GOOD_STEP_VALUES) == set(STEP_OPTIONS)


@pytest.mark.parametrize(("option", "value"), [(o, v) for o, values in BAD_STEP_VALUES.items() for v in values])
def test_bad_step_option_is_refused_by_name_when_the_decorator_runs(option: str, value: Any) -> None:
    with pytest.raises(pw.ConfigurationError) as caught:
        pw.step(**{option: value})
    assert option in str(caught.value)


@pytest.mark.parametrize(("option", "value"), [(o, v) for o, values in GOOD_STEP_VALUES.items() for v in values])
def test_good_step_option_is_accepted(option: str, value: Any) -> None:
    pw.step(**{option: value})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_retries": -1}, ["max_retries=-1", "≥ 0", "None"]),
        ({"retry_backoff": 0.5}, ["retry_backoff=0.5", "≥ 1"]),
        ({"timeout": 0}, ["timeout=0", "> 0"]),
        ({"jitter": "ful"}, ["jitter='ful'", "'decorrelated'", "Did you mean 'full'?"]),
        ({"max_retrys": 3}, ["max_retrys=3", "Did you mean 'max_retries'?"]),
        ({"retries": 3}, ["retries=3", "max_retries"]),
        ({"retry_exceptions": [OSError]}, ["retry_exceptions", "retry_on"]),
        ({"max_calls": 1}, ["max_calls=1", "ray_remote_args"]),
        ({"ray_remote_args": {"max_retries": 1}}, ["max_retries", "max_recoveries"]),
        ({"ray_remote_args": {"retry_exceptions": True}}, ["retry_exceptions", "retry_on"]),
        ({"ray_remote_args": {"max_cals": 1}}, ["max_cals", "Did you mean 'max_calls'?"]),
        ({"num_cpus": 1, "ray_remote_args": {"num_cpus": 2}}, ["num_cpus", "once"]),
        ({"total_timeout": 0}, ["total_timeout=0", "> 0"]),
        ({"durability": "relaxed", "idempotent": False}, ["durability='relaxed'", "idempotent=False"]),
        ({"retry_delay": []}, ["retry_delay=[]", "at least one delay"]),
        ({"retry_delay": [1, "soon"]}, ["retry_delay=[1, 'soon']", "Item 2"]),
        ({"retry_delay": [1, -2]}, ["retry_delay=[1, -2]", "≥ 0", "Item 2"]),
        ({"retry_delay": [1, 2], "retry_backoff": 2}, ["retry_backoff=2", "list"]),
        ({"retry_delay": lambda n, e: 1, "jitter": "decorrelated"}, ["jitter='decorrelated'", "callable"]),
        ({"on_exhausted": "paus"}, ["on_exhausted='paus'", "Did you mean 'pause'?"]),
        ({"on_open": "wai"}, ["on_open='wai'", "Did you mean 'wait'?"]),
        ({"on_open": "wait"}, ["on_open='wait'", "breaker="]),
        ({"executor": "local", "num_cpus": 2}, ["num_cpus=2", "executor='local'"]),
    ],
)
def test_refusal_names_option_value_and_remedy(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(pw.ConfigurationError) as caught:
        pw.step(**given)
    for word in words:
        assert word in str(caught.value)


def test_on_open_waits_for_a_breaker() -> None:
    @pw.step(breaker="payments", on_open="wait")
    def calls() -> None: ...

    assert calls.definition.policy.on_open == "wait"


def test_value_whose_repr_raises_is_refused_all_the_same() -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    with pytest.raises(pw.ConfigurationError, match="max_retries=<Hostile"):
        pw.step(max_retries=Hostile())  # type: ignore[call-overload]


def test_defaults_are_those_of_the_contract() -> None:
    policy = check_step_options({}).policy
    assert policy.model_dump() == {
        "max_retries": 0,
        "retry_delay_s": 1.0,
        "retry_backoff": 1.0,
        "max_retry_delay_s": None,
        "jitter": "auto",
        "timeout_s": None,
        "idempotent": True,
        "max_recoveries": 3,
    }


def test_durations_become_seconds() -> None:
    policy = check_step_options(
        {"retry_delay": "500ms", "max_retry_delay": dt.timedelta(hours=2), "timeout": "1h30m"}
    ).policy
    assert (policy.retry_delay_s, policy.max_retry_delay_s, policy.timeout_s) == (0.5, 7200.0, 5400.0)


def test_ray_options_are_gathered_and_handed_on_as_they_are() -> None:
    given = {"num_cpus": 2, "resources": {"tpu": 1}, "ray_remote_args": {"max_calls": 3, "accelerator_type": "T4"}}
    assert check_step_options(given).ray_options == {
        "num_cpus": 2,
        "resources": {"tpu": 1},
        "max_calls": 3,
        "accelerator_type": "T4",
    }


def test_node_affinity_is_kept_as_data() -> None:
    class NodeAffinitySchedulingStrategy:  # Ray's has these two fields; importing Ray here would cost a second
        node_id = "abc"
        soft = True

    options = check_step_options({"scheduling_strategy": NodeAffinitySchedulingStrategy()}).ray_options
    assert options == {"scheduling_strategy": {"node_id": "abc", "soft": True}}


def test_sync_local_step_with_timeout_is_refused_and_async_is_not() -> None:
    def slow() -> None: ...

    async def quick() -> None: ...

    with pytest.raises(pw.ConfigurationError, match=r"timeout=5.*executor='local'.*interrupted"):
        pw.step(executor="local", timeout=5)(slow)
    pw.step(executor="local", timeout=5)(quick)
    with pytest.raises(pw.ConfigurationError, match="timeout=5"):
        pw.step(executor="local")(slow).options(timeout=5)


BAD_WORKFLOW_VALUES: dict[str, list[Any]] = {
    "name": ["", 5],
    "version": ["", 1.5, True, []],
    "max_duration": [0, -1, "x", NAN, True],
    "actor_options": [{"num_cpus": 1}, {}],
    "max_recoveries": [-1, None, 2.5, True],
    "max_durations": [1],
}


@pytest.mark.parametrize(("option", "value"), [(o, v) for o, values in BAD_WORKFLOW_VALUES.items() for v in values])
def test_bad_workflow_option_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(pw.ConfigurationError) as caught:
        pw.workflow(**{option: value})
    assert option in str(caught.value)


def test_workflow_options_are_read() -> None:
    options = check_workflow_options({"name": "checkout", "version": 7, "max_duration": "2h", "max_recoveries": 0})
    assert (options.name, options.version, options.max_duration_s, options.max_recoveries) == (
        "checkout",
        "7",
        7200.0,
        0,
    )
    assert check_workflow_options({}).max_recoveries == 20


def test_actor_options_are_not_available_yet() -> None:
    with pytest.raises(pw.ConfigurationError, match=r"actor_options=.*is not available in this version"):
        pw.workflow(actor_options={"num_cpus": 1})  # type: ignore[call-overload]
