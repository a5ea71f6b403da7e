"""`import pyworkflow_ray.compat` makes `pyworkflow` importable, for code written for the original's documented API.

Called by users' modules, first line. The alias is a module of adapters: options that the original spelled differently
are translated (`retry_delay="exponential"`, `idempotency_key`, `sleep("1w")`), what has no counterpart here is refused
by name with what to use instead. docs/migration.md lists both. Rules:

* nothing is accepted and ignored where that would change what a run does;
* another `pyworkflow` that is installed wins: then the import of this module fails and says so;
* a run started by a process that has imported this module finds the alias on its workers too.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import importlib.util
import re
import sys
import types
from collections.abc import Callable, Generator
from typing import Any, NoReturn

from pyworkflow_ray import errors
from pyworkflow_ray.breaker import CircuitBreaker
from pyworkflow_ray.context import current_run, get_logger, now
from pyworkflow_ray.context import sleep as _sleep
from pyworkflow_ray.durations import parse_duration
from pyworkflow_ray.engine.loop import current_workflow
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.context import running_step
from pyworkflow_ray.ids import check_run_id
from pyworkflow_ray.step import Step
from pyworkflow_ray.step import step as _step
from pyworkflow_ray.workflow import Workflow
from pyworkflow_ray.workflow import workflow as _workflow

ALIAS = "pyworkflow"


class CompatError(ConfigurationError, ImportError):
    """The alias can't be made: another `pyworkflow` is there."""


# Errors -----------------------------------------------------------------------------------------------------------


class FatalError(errors.FatalError):
    """As the original's: keyword arguments are kept in `.metadata`."""

    def __init__(self, message: str = "", **metadata: Any) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = metadata


class RetryableError(errors.RetryableError):
    """As the original's: `retry_after` may be a naive datetime too (local time); other keywords go to `.metadata`."""

    def __init__(self, message: str = "", retry_after: Any = None, **metadata: Any) -> None:
        if isinstance(retry_after, dt.datetime) and retry_after.tzinfo is None:
            retry_after = retry_after.astimezone()
        elif isinstance(retry_after, str):
            retry_after = _seconds(retry_after)
        super().__init__(message, retry_after=retry_after)
        self.message = message
        self.metadata = metadata


# Defining ---------------------------------------------------------------------------------------------------------


def step(
    fn: Any = None,
    /,
    *,
    name: str | None = None,
    max_retries: int | None = 3,
    retry_delay: Any = "exponential",
    timeout: Any = None,
    force_local: bool = False,
    metadata: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """The original's `@step`, bare or called, of an `async def` or a `def`.

    Args:
        name: Name in runs; None: module and qualified name.
        max_retries: Retries after the first attempt; as documented by the original, 3.
        retry_delay: "exponential" (1 s, doubled for each retry, ±12.5 %), "fixed" (60 s), or what `pw.step` takes:
            a duration, a list of durations, a callable.
        timeout: Limit of one attempt; None: none.
        force_local: True: executed in the run's own process, `executor="local"`.
        metadata: Accepted where empty.
        options: Every other option of `pw.step`: retry_backoff, max_retry_delay, breaker, and so on.

    Raises:
        ConfigurationError: as `pw.step`.
    """
    if metadata:
        raise _no("step(metadata=...)", "put what belongs to a run into its attributes, flow.options(attributes={...})")
    if retry_delay == "exponential":
        retry_delay = 1
        options.setdefault("retry_backoff", 2)
    elif retry_delay == "fixed":
        retry_delay = 60
    elif isinstance(retry_delay, str):
        retry_delay = _seconds(retry_delay)
    if isinstance(timeout, str):
        timeout = _seconds(timeout)
    if force_local:
        options["executor"] = "local"
    given = {"name": name, "max_retries": max_retries, "retry_delay": retry_delay, "timeout": timeout, **options}
    decorate = _step(**given)
    return decorate if fn is None else decorate(fn)


def workflow(
    fn: Any = None,
    /,
    *,
    name: str | None = None,
    durable: bool | None = None,
    max_duration: Any = None,
    max_retries: int = 0,
    tags: list[str] | None = None,
    recover_on_worker_loss: bool | None = None,
    max_recovery_attempts: int | None = None,
    **options: Any,
) -> Any:
    """The original's `@workflow`, bare or called.

    Args:
        name: Name in runs; None: module and qualified name.
        durable: Every run is durable: None or True.
        max_duration: Limit of a whole run; None: none.
        max_retries: Of the whole workflow: 0; retries belong to steps.
        tags: Become the attribute "tags" of each run.
        recover_on_worker_loss: Every run is taken up again: None or True.
        max_recovery_attempts: `max_recoveries` of `pw.workflow`.
    """
    if durable is False:
        raise _no("workflow(durable=False)", "every run is durable; call the steps from a plain async def for less")
    if recover_on_worker_loss is False:
        raise _no("workflow(recover_on_worker_loss=False)", "max_recovery_attempts=0 pauses a run that was lost")
    if max_retries:
        raise _no(f"workflow(max_retries={max_retries})", "give the retries to its steps")
    for option in ("context_class", "tracing"):
        if options.pop(option, None) is not None:
            raise _no(f"workflow({option}=...)", "pass what steps need as arguments; spans come from the event log")
    given: dict[str, Any] = {"name": name, **options}
    if max_duration is not None:
        given["max_duration"] = _seconds(max_duration)
    if max_recovery_attempts is not None:
        given["max_recoveries"] = max_recovery_attempts

    def decorate(function: Callable[..., Any]) -> Any:
        made = _workflow(**given)(function)
        return made.options(attributes={"tags": list(tags)}) if tags else made

    return decorate if fn is None else decorate(fn)


# Running ----------------------------------------------------------------------------------------------------------


class RunId(str):
    """What `start` gives: the run's id, a text; awaiting it gives it too, as in `run_id = await start(...)`."""

    def __await__(self) -> Generator[Any, None, RunId]:
        yield from ()
        return self


def start(
    flow: Any, /, *args: Any, idempotency_key: str | None = None, durable: bool | None = None, **kwargs: Any
) -> RunId:
    """Start a run, return its id once it is durable. The same idempotency key gives the same run.

    Raises:
        RunExistsError: the key is that of a run with other arguments. Else as `pw.start`.
    """
    from pyworkflow_ray.runs import start as start_run

    if durable is False:
        raise _no("start(durable=False)", "every run is durable")
    for option in ("runtime", "storage", "tracing"):
        if kwargs.get(option) is not None and option not in _parameters(flow):
            raise _no(
                f"start({option}=...)", "choose the storage and the cluster with pw.init(storage=..., address=...)"
            )
        if option in kwargs and option not in _parameters(flow):
            del kwargs[option]
    if idempotency_key is not None:
        flow = flow.options(run_id=_run_id(idempotency_key))
    return RunId(start_run(flow, *args, **kwargs).run_id)


async def resume(run_id: str) -> Any:
    """A paused or failed run goes on; waits for its result. A run that has completed gives its result again."""
    from pyworkflow_ray import runs

    await asyncio.to_thread(runs.resume, str(run_id))
    return await runs.get_run(str(run_id))


async def cancel_workflow(run_id: str, reason: str | None = None) -> bool:
    """Cancel a run; False where it had ended."""
    handle = await get_workflow_run(run_id)
    ended = handle.done()
    await asyncio.to_thread(handle.cancel, reason)
    return not ended


async def get_workflow_run(run_id: str) -> Any:
    """The run's handle: `.status() .result() .events() .steps() .explain()`."""
    from pyworkflow_ray.runs import get_run

    return await asyncio.to_thread(get_run, str(run_id))


async def get_workflow_events(run_id: str) -> list[Any]:
    """The run's events, oldest first."""
    return list((await get_workflow_run(run_id)).events())


async def sleep(duration: Any, name: str | None = None) -> None:
    """Sleep: durable in a workflow, plain elsewhere.

    Args:
        duration: Seconds, a timedelta, text with weeks too ("1w", "2d12h"), or a datetime to sleep until (a naive one
            is local time).
        name: For people; not recorded.
    """
    if isinstance(duration, dt.datetime):
        until = duration if duration.tzinfo is not None else duration.astimezone()
        duration = max(0.0, (until - now()).total_seconds())
    await _sleep(_seconds(duration))


class Context:
    """What `get_context()` gives: `.run_id` and `.workflow_name`."""

    def __init__(self, run_id: str, workflow_name: str) -> None:
        self.run_id = run_id
        self.workflow_name = workflow_name

    def __getattr__(self, name: str) -> NoReturn:
        raise _no(f"get_context().{name}", "a context has run_id and workflow_name; see docs/migration.md")


def get_context() -> Context:
    """The run that this code belongs to.

    Raises:
        ConfigurationError: it belongs to none.
    """
    run = current_run()
    return Context(run.run_id, run.workflow)


def has_context() -> bool:
    """Whether this code belongs to a run."""
    step = running_step()
    return current_workflow() is not None or (step is not None and step.run_id is not None)


# Translating ------------------------------------------------------------------------------------------------------

_WEEKS = re.compile(r"^(\d+(?:\.\d+)?)w")


def _seconds(duration: Any) -> float:
    """Seconds of a duration; the original's texts know weeks."""
    weeks = _WEEKS.match(duration) if isinstance(duration, str) else None
    if weeks is None:
        return parse_duration(duration)
    rest = duration[weeks.end() :]
    return float(weeks[1]) * 7 * 86400 + (parse_duration(rest) if rest else 0.0)


def _run_id(key: str) -> str:
    """The run id of an idempotency key: the key itself where it can be one."""
    if not isinstance(key, str) or not key:
        raise ConfigurationError(f"idempotency_key={key!r}: allowed is a text that is not empty")
    try:
        return check_run_id(key)
    except ConfigurationError:
        return "key-" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _parameters(flow: Any) -> Any:
    definition = getattr(flow, "definition", None)
    return definition.signature.parameters if definition is not None else ()


def _no(what: str, instead: str) -> ConfigurationError:
    return ConfigurationError(f"pyworkflow.{what} is not available in this version: {instead}")


# The alias --------------------------------------------------------------------------------------------------------

_OURS: dict[str, Any] = {
    "CancellationError": asyncio.CancelledError,
    "CircuitBreaker": CircuitBreaker,
    "CircuitOpenError": errors.CircuitOpenError,
    "ConfigurationError": errors.ConfigurationError,
    "FatalError": FatalError,
    "RetryableError": RetryableError,
    "RunExistsError": errors.RunExistsError,
    "StepTimeoutError": errors.StepTimeoutError,
    "WorkflowError": errors.PyWorkflowError,
    "WorkflowNotFoundError": errors.RunNotFoundError,
    "cancel_workflow": cancel_workflow,
    "get_context": get_context,
    "get_logger": get_logger,
    "get_workflow_events": get_workflow_events,
    "get_workflow_run": get_workflow_run,
    "has_context": has_context,
    "resume": resume,
    "sleep": sleep,
    "start": start,
    "step": step,
    "workflow": workflow,
}

_HOOKS = "signals and hooks do not exist yet; poll in a step, with pw.sleep between, until they do"
_RAY = "Ray is the runtime: pw.init(address=...)"
_CHILDREN = "child runs do not exist yet; make it a plain async def that both call, or start a run of its own"
_SCHEDULES = "schedules do not exist yet; start runs from cron, with a run_id that names the date"
_CLASSES = "decorate a function: @step() and @workflow()"
_STREAMS = "streams do not exist here; hand values on as the arguments of steps"
_STORAGE = "the storage is a directory: pw.init(storage=...)"
_INSTEAD: dict[str, str] = {
    **dict.fromkeys(("hook", "define_hook", "TypedHook", "resume_hook", "ResumeResult", "step_hook"), _HOOKS),
    **dict.fromkeys(("start_child_workflow", "ChildWorkflowHandle", "get_workflow_chain", "continue_as_new"),
                    _CHILDREN),
    **dict.fromkeys(
        ("scheduled_workflow", "create_schedule", "list_schedules", "get_schedule", "update_schedule", "pause_schedule",
         "resume_schedule", "delete_schedule", "trigger_schedule", "backfill_schedule", "ScheduleSpec", "CalendarSpec",
         "OverlapPolicy", "LocalScheduler"),
        _SCHEDULES,
    ),
    **dict.fromkeys(("Step", "Workflow"), _CLASSES),
    **dict.fromkeys(("stream_workflow", "stream_step", "emit", "Signal", "Stream", "StreamConsumer"), _STREAMS),
    **dict.fromkeys(("StorageBackend", "FileStorageBackend", "InMemoryStorageBackend", "get_storage"), _STORAGE),
    **dict.fromkeys(("save_step_checkpoint", "load_step_checkpoint", "delete_step_checkpoint"),
                    "make each part a step of its own: its completion is its checkpoint"),
    **dict.fromkeys(("StepContext", "get_step_context", "set_step_context", "has_step_context"),
                    "pass what a step needs as its arguments; pw.current_step() tells of the attempt"),
    **dict.fromkeys(("configure", "configure_from_yaml", "get_config", "reset_config"),
                    "settings are arguments of pw.init and PYWORKFLOW_* variables"),
    **dict.fromkeys(("configure_logging", "bind_workflow_context", "bind_step_context"),
                    "logging is the standard library's; pw.get_logger() adds run, step and attempt"),
    **dict.fromkeys(("LocalRuntime", "Runtime", "get_runtime", "register_runtime"), _RAY),
    **dict.fromkeys(("MockContext", "LocalContext"), "test with pyworkflow_ray.testing.WorkflowEnv"),
    "SuspensionSignal": "a suspension is no exception here, so there is nothing to let pass in an except",
    "shield": "asyncio.shield works in a workflow; clean-up belongs in pw.current_run().on_failure",
    "list_workflows": "pw.list_runs() lists runs",
    "discover_workflows": "a run finds its code by import",
}  # fmt: skip


def _missing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {ALIAS!r} has no attribute {name!r}")
    if name in _INSTEAD:
        raise _no(name, _INSTEAD[name])
    import difflib

    near = difflib.get_close_matches(name, [*_OURS, *_INSTEAD], 1, 0.7)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    raise AttributeError(f"module {ALIAS!r} (an alias of pyworkflow_ray.compat) has no attribute {name!r}{hint}")


def install() -> types.ModuleType:
    """Make the alias, once a process.

    Raises:
        CompatError: another `pyworkflow` is installed, or imported already.
    """
    there = sys.modules.get(ALIAS)
    if there is not None and getattr(there, "__compat__", False):
        return there
    other = getattr(there, "__file__", None) or (there and "imported already")
    if there is None:
        spec = importlib.util.find_spec(ALIAS)
        if spec is not None:
            other = spec.origin or ", ".join(spec.submodule_search_locations or ()) or "found on the import path"
    if other:
        raise CompatError(
            f"another package called {ALIAS!r} is installed ({other}), so pyworkflow_ray.compat can't stand in for it: "
            "uninstall it, or write the code for this package: import pyworkflow_ray as pw (docs/migration.md)"
        )
    alias = types.ModuleType(ALIAS, "The original PyWorkflow's documented API, run by pyworkflow_ray.")
    alias.__dict__.update(_OURS, __compat__=True, __all__=sorted(_OURS), __getattr__=_missing, __path__=[])
    alias.__spec__ = importlib.util.spec_from_loader(ALIAS, loader=None)
    sys.modules[ALIAS] = alias
    return alias


__all__ = ["CompatError", "RunId", "Step", "Workflow", "install", *_OURS]

install()
