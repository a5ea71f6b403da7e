"""Options of steps and workflows: checked when the decorator runs, never accepted and ignored.

Called by `step.py` and `workflow.py`; calls nothing of ours but `durations`, `errors` and a few names. Rules:

* every refusal is a `ConfigurationError` that names option, value and what is allowed, and the nearest name for a
  misspelling;
* an option of the public contract that is not built yet is refused unless it is given its default;
* what Ray would do on its own account (its retries) is refused and our option named.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from pyworkflow_ray.durations import parse_duration
from pyworkflow_ray.engine.resources import GROWTH, MOST
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.resilience.policy import RetryPolicy
from pyworkflow_ray.resilience.retry import DelayOf, ErrorFilter

_DURATION = "seconds, a timedelta, or text such as '30s'"
_JITTERS = ("auto", "none", "proportional", "full", "equal", "decorrelated")
_EXECUTORS = ("task", "local")
_RAY_NAMED = ("num_cpus", "num_gpus", "memory", "resources", "runtime_env", "scheduling_strategy")
STEP_OPTIONS = (
    "name",
    "max_retries",
    "retry_delay",
    "retry_backoff",
    "max_retry_delay",
    "jitter",
    "retry_on",
    "no_retry_on",
    "timeout",
    "total_timeout",
    "on_exhausted",
    "breaker",
    "on_open",
    "retry_budget",
    "idempotent",
    "durability",
    "max_recoveries",
    "executor",
    *_RAY_NAMED,
    GROWTH,
    MOST,
    "ray_remote_args",
)
WORKFLOW_OPTIONS = ("name", "version", "max_duration", "actor_options", "max_recoveries")
RUN_OPTIONS = ("run_id", "attributes")
# The contract's options that this version does not have, with the one value that asks for nothing.
_NOT_BUILT: dict[str, Any] = {
    "actor_options": None,
}
# Ray's own options for tasks that may be handed on, beside those that have a name of ours (Ray 2.60). Ray checks them;
# this list only catches misspellings before a run has begun.
_RAY_TASK_OPTIONS = (
    "accelerator_type",
    "enable_task_events",
    "fallback_strategy",
    "label_selector",
    "max_calls",
    "object_store_memory",
    "placement_group",
    "placement_group_bundle_index",
    "placement_group_capture_child_tasks",
    *_RAY_NAMED,
)
_RAY_REFUSED = {
    "max_retries": "Ray's retries are switched off; use the step's max_retries for failures and max_recoveries for "
    "lost workers",
    "retry_exceptions": "Ray's retries are switched off; use the step's retry_on and no_retry_on",
    "num_returns": "a step has one result; return a tuple",
    "name": "the task is named after workflow, step and attempt; use the step's name",
}


@dataclass(frozen=True)
class StepOptions:
    """The checked options of one step. `given` holds them as the user wrote them, for `.options()`."""

    name: str | None = None
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    retry_on: ErrorFilter | None = None
    no_retry_on: ErrorFilter = ()
    delay_of: DelayOf | None = None
    executor: Literal["task", "local"] = "task"
    ray_options: Mapping[str, Any] = field(default_factory=dict)
    breaker: Any = None
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkflowOptions:
    """The checked options of one workflow. `max_duration_s` is in seconds, None for no limit."""

    name: str | None = None
    version: str | None = None
    max_duration_s: float | None = None
    max_recoveries: int = 20
    given: Mapping[str, Any] = field(default_factory=dict)


def check_step_options(given: Mapping[str, Any], where: str = "@step") -> StepOptions:
    """The options of a step, checked.

    Raises:
        ConfigurationError: an option is unknown, out of range, not built yet, or contradicts another.
    """
    _check_names(given, STEP_OPTIONS, where, {"retry_exceptions": _RAY_REFUSED["retry_exceptions"]})
    check = _Checker(given, where)
    delay_s, delays_s, delay_of = _retry_delay(check)
    policy = RetryPolicy(
        max_retries=check.whole("max_retries", 0, none="for ever"),
        retry_delay_s=delay_s,
        delays_s=delays_s,
        delay_by_code=delay_of is not None,
        retry_backoff=check.number("retry_backoff", 1, at_least=1),
        max_retry_delay_s=check.duration("max_retry_delay", None),
        jitter=check.choice("jitter", "auto", _JITTERS),
        timeout_s=check.duration("timeout", None, above_zero=True),
        retry_budget=_budget(check),
        on_exhausted=check.choice("on_exhausted", "raise", ("raise", "pause")),
        on_open=check.choice("on_open", "raise", ("raise", "wait")),
        total_timeout_s=check.duration("total_timeout", None, above_zero=True),
        idempotent=check.flag("idempotent", True),
        durability=check.choice("durability", "strict", ("strict", "relaxed")),
        max_recoveries=check.whole("max_recoveries", 3) or 0,
    )
    executor = check.choice("executor", "task", _EXECUTORS)
    ray_options = _ray_options(check)
    if executor == "local" and ray_options:
        name = next(iter(ray_options))
        check.refuse(
            name, "not on executor='local': a local step runs inside the run's actor and takes no resources of its own"
        )
    breaker = _breaker(check)
    if policy.durability == "relaxed" and not policy.idempotent:
        check.refuse("durability", "'strict' with idempotent=False: a relaxed step may be executed again after a crash")
    if policy.on_open == "wait" and breaker is None:
        check.refuse("on_open", "given together with breaker=: without one there is nothing to wait for")
    return StepOptions(
        name=check.name(),
        policy=policy,
        retry_on=check.errors("retry_on", None),
        no_retry_on=check.errors("no_retry_on", ()) or (),
        delay_of=delay_of,
        executor=executor,
        ray_options=ray_options,
        breaker=breaker,
        given=dict(given),
    )


def check_workflow_options(given: Mapping[str, Any], where: str = "@workflow") -> WorkflowOptions:
    """The options of a workflow, checked.

    Raises:
        ConfigurationError: an option is unknown, out of range or not built yet.
    """
    _check_names(given, WORKFLOW_OPTIONS, where, {})
    check = _Checker(given, where)
    version = given.get("version")
    if version is not None and (isinstance(version, bool) or not isinstance(version, (str, int)) or version == ""):
        check.refuse("version", "a text that is not empty, or None")
    return WorkflowOptions(
        name=check.name(),
        version=None if version is None else str(version),
        max_duration_s=check.duration("max_duration", None, above_zero=True),
        max_recoveries=check.whole("max_recoveries", 20) or 0,
        given=dict(given),
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the nearest of `known`, or an empty text where none is near."""
    matches = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def shown(value: object) -> str:
    """`repr(value)`, shortened, and never an error of its own."""
    try:
        text = repr(value)
    except Exception as error:  # a user's __repr__
        text = f"<{type(value).__name__}: its repr raised {type(error).__name__}>"
    return text if len(text) <= 120 else text[:117] + "..."


def _check_names(given: Mapping[str, Any], known: tuple[str, ...], where: str, hints: Mapping[str, str]) -> None:
    for name, value in given.items():
        if name in known:
            if name in _NOT_BUILT and value != _NOT_BUILT[name]:
                raise ConfigurationError(
                    f"{where}: {name}={shown(value)} is not available in this version; leave it out"
                )
            continue
        if name in hints:
            raise ConfigurationError(f"{where}: {name}={shown(value)} is refused: {hints[name]}")
        if name in _RAY_TASK_OPTIONS and "ray_remote_args" in known:
            raise ConfigurationError(
                f"{where}: {name}={shown(value)} is no option of ours; hand it to Ray: "
                f"ray_remote_args={{{name!r}: ...}}"
            )
        raise ConfigurationError(
            f"{where}: unknown option {name}={shown(value)}.{nearest(name, known)} Options: {', '.join(known)}"
        )


class _Checker:
    """Takes options out of what was given and checks each one's type and range."""

    def __init__(self, given: Mapping[str, Any], where: str) -> None:
        self.given = given
        self.where = where

    def refuse(self, option: str, allowed: str, extra: str = "") -> NoReturn:
        raise ConfigurationError(
            f"{self.where}: {option}={shown(self.given.get(option))} is not allowed: {option} is {allowed}.{extra}"
        )

    def name(self) -> str | None:
        value = self.given.get("name")
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip() or len(value) > 200 or not value.isprintable():
            self.refuse("name", "a printable text of 1 to 200 characters, or None for module:qualname")
        return value

    def whole(self, option: str, default: int, none: str = "") -> int | None:
        value = self.given.get(option, default)
        if value is None and none:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.refuse(option, "a whole number ≥ 0" + (f", or None: {none}" if none else ""))
        return value

    def number(self, option: str, default: float | None, *, at_least: float) -> Any:
        value = self.given.get(option, default)
        if value is None and default is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or value < at_least
        ):
            self.refuse(option, f"a finite number ≥ {at_least:g}" + (", or None" if default is None else ""))
        return value

    def duration(self, option: str, default: float | None, *, above_zero: bool = False) -> Any:
        value = self.given.get(option, default)
        if value is None and default is None:
            return None
        allowed = f"a duration {'> 0' if above_zero else '≥ 0'} ({_DURATION})" + (
            ", or None" if default is None else ""
        )
        try:
            seconds = parse_duration(value)
        except (TypeError, ValueError) as error:
            self.refuse(option, allowed, f" {str(error)[:1].upper()}{str(error)[1:]}")
        if above_zero and seconds == 0:
            self.refuse(option, allowed)
        return seconds

    def choice(self, option: str, default: str, allowed: tuple[str, ...]) -> Any:
        value = self.given.get(option, default)
        if not isinstance(value, str) or value not in allowed:
            near = nearest(value, allowed) if isinstance(value, str) else ""
            self.refuse(option, "one of " + ", ".join(repr(name) for name in allowed), near)
        return value

    def flag(self, option: str, default: bool) -> bool:
        value = self.given.get(option, default)
        if not isinstance(value, bool):
            self.refuse(option, "True or False")
        return value

    def errors(self, option: str, default: ErrorFilter | None) -> ErrorFilter | None:
        value = self.given.get(option, default)
        if value is None:
            return default
        if isinstance(value, type):
            value = (value,)
        elif isinstance(value, (list, set, frozenset)):
            value = tuple(value)
        if isinstance(value, tuple):
            for item in value:
                if not (isinstance(item, type) and issubclass(item, BaseException)):
                    self.refuse(
                        option, f"exception types or a predicate of the exception; {shown(item)} is no exception type"
                    )
            return value
        if not callable(value):
            self.refuse(option, "an exception type, a sequence of them, or a predicate of the exception")
        return value  # type: ignore[no-any-return]


def _retry_delay(check: _Checker) -> tuple[float, tuple[float, ...] | None, DelayOf | None]:
    """The delay in seconds, or a list of them, or what decides them: the others at their defaults."""
    value = check.given.get("retry_delay", 1)
    if not (isinstance(value, (list, tuple)) or callable(value)):
        return check.duration("retry_delay", 1), None, None
    what = "callable" if callable(value) else "list"
    for option, neutral, does in (
        ("retry_backoff", 1, "multiplies one delay"),
        ("jitter", "auto", "grows from one delay"),
    ):
        other = check.given.get(option, neutral)
        if other != neutral and (option != "jitter" or other == "decorrelated"):
            check.refuse(option, f"not used where retry_delay is a {what}: it {does}")
    if callable(value):
        return 1.0, None, value
    if not value:
        check.refuse("retry_delay", "a list of at least one delay, of which the last repeats")
    delays = []
    for number, item in enumerate(value, 1):
        try:
            delays.append(parse_duration(item))
        except (TypeError, ValueError) as error:
            check.refuse("retry_delay", f"a list of durations ≥ 0 ({_DURATION})", f" Item {number}: {error}")
    return 1.0, tuple(delays), None


def _budget(check: _Checker) -> str | None:
    """Name of the retry budget; the object has declared it in this process."""
    value = check.given.get("retry_budget")
    if value is None:
        return None
    if not isinstance(value, str) and type(value).__name__ == "RetryBudget" and hasattr(value, "name"):
        return str(value.name)
    if not isinstance(value, str) or not 1 <= len(value) <= 128 or not value.isprintable():
        check.refuse("retry_budget", "a RetryBudget or its name, or None")
    return value


def _breaker(check: _Checker) -> Any:
    value = check.given.get("breaker")
    if value is None:
        return None
    if isinstance(value, str):
        if not value.strip():
            check.refuse("breaker", "a CircuitBreaker or its name")
        return value
    # asked of the class: a breaker without a name says so at its first use, not here
    if not (hasattr(type(value), "name") and hasattr(type(value), "call")):
        check.refuse("breaker", "a CircuitBreaker or its name")
    return value


def _ray_options(check: _Checker) -> dict[str, Any]:
    """What Ray gets for the step's task: options with a name of ours first, then `ray_remote_args`."""
    options: dict[str, Any] = {}
    for name, low in (("num_cpus", 0), ("num_gpus", 0), ("memory", 0)):
        if check.given.get(name) is not None:
            options[name] = check.number(name, None, at_least=low)
    _memory_growth(check, options)
    resources = check.given.get("resources")
    if resources is not None:
        if not isinstance(resources, Mapping) or not all(
            isinstance(key, str) and not isinstance(value, bool) and isinstance(value, (int, float)) and value >= 0
            for key, value in resources.items()
        ):
            check.refuse("resources", "a dict of resource name to a number ≥ 0, or None")
        for name, ours in (("CPU", "num_cpus"), ("GPU", "num_gpus"), ("memory", "memory")):
            if name in resources:
                check.refuse("resources", f"a dict of custom resources; {name!r} is given by {ours}=")
        options["resources"] = dict(resources)
    if check.given.get("runtime_env") is not None:
        if not isinstance(check.given["runtime_env"], Mapping):
            check.refuse("runtime_env", "a dict, or None")
        options["runtime_env"] = dict(check.given["runtime_env"])
    if check.given.get("scheduling_strategy") is not None:
        options["scheduling_strategy"] = _strategy(check, "scheduling_strategy", check.given["scheduling_strategy"])
    return options | _ray_remote_args(check, options)


def _memory_growth(check: _Checker, options: dict[str, Any]) -> None:
    """After an out-of-memory kill the step is executed again with more memory; recorded among Ray's options."""
    growth, most = check.given.get(GROWTH), check.given.get(MOST)
    if growth is not None:
        if "memory" not in options:
            check.refuse(GROWTH, "given together with memory=, which it multiplies")
        options[GROWTH] = check.number(GROWTH, None, at_least=1)
    if most is not None:
        if growth is None:
            check.refuse(MOST, "given together with memory_growth=, which it bounds")
        options[MOST] = check.number(MOST, None, at_least=options["memory"])


def _ray_remote_args(check: _Checker, named: Mapping[str, Any]) -> dict[str, Any]:
    extra = check.given.get("ray_remote_args")
    if extra is None:
        return {}
    if not isinstance(extra, Mapping) or not all(isinstance(key, str) for key in extra):
        check.refuse("ray_remote_args", "a dict of Ray's options by name, or None")
    result: dict[str, Any] = {}
    for name, value in extra.items():
        where = f"{check.where}: ray_remote_args[{name!r}]={shown(value)}"
        if name in _RAY_REFUSED:
            raise ConfigurationError(f"{where} is refused: {_RAY_REFUSED[name]}")
        if name in named:
            raise ConfigurationError(f"{where} contradicts {name}={shown(named[name])}: give it once")
        if name not in _RAY_TASK_OPTIONS and nearest(name, (*_RAY_TASK_OPTIONS, *_RAY_REFUSED)):
            near = nearest(name, (*_RAY_TASK_OPTIONS, *_RAY_REFUSED))
            raise ConfigurationError(f"{where}: Ray has no such option for tasks.{near}")
        result[name] = _strategy(check, f"ray_remote_args[{name!r}]", value) if name == "scheduling_strategy" else value
    return result


def _strategy(check: _Checker, option: str, value: Any) -> Any:
    """A scheduling strategy as data, for it is recorded: Ray's text, or the fields of a node affinity."""
    if isinstance(value, str):
        if value not in ("DEFAULT", "SPREAD"):
            near = nearest(value, ("DEFAULT", "SPREAD"))
            raise ConfigurationError(
                f"{check.where}: {option}={value!r} is not allowed: it is 'DEFAULT', 'SPREAD' or a "
                f"NodeAffinitySchedulingStrategy.{near}"
            )
        return value
    if type(value).__name__ == "NodeAffinitySchedulingStrategy":
        return {"node_id": value.node_id, "soft": bool(value.soft)}
    raise ConfigurationError(
        f"{check.where}: {option}={shown(value)} is not available in this version: use 'DEFAULT', 'SPREAD' or a "
        "NodeAffinitySchedulingStrategy"
    )
