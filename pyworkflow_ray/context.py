"""What code inside a workflow or a step asks for: where it is, the time, randomness, a sleep, a logger.

Called by users. Inside a workflow everything comes from the engine (`engine.loop.current_workflow`) and replays
exactly; inside a step and elsewhere it is the plain thing.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import random as _random
import time
import uuid
from collections.abc import Awaitable, Generator, MutableMapping
from typing import Any

from pyworkflow_ray.durations import Duration, parse_duration
from pyworkflow_ray.engine.loop import current_workflow
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.context import RunContext, StepContext, no_sleep, running_step
from pyworkflow_ray.execution.log_records import place


def current_step() -> StepContext:
    """The running attempt: `.attempt .idempotency_key .fence .run_id .deadline .previous .name`.

    Raises:
        ConfigurationError: no step is running here.
    """
    step = running_step()
    if step is None or current_workflow() is not None:
        raise ConfigurationError(
            "current_step() is for code inside a step, and no step is running here"
            + ("; in a workflow use current_run()" if current_workflow() is not None else "")
        )
    return step


def current_run() -> RunContext:
    """The run that this code belongs to, in its workflow and in its steps: `.run_id .workflow .trace_id`.

    Raises:
        ConfigurationError: no run is here (a step called plainly, outside a workflow, has none).
    """
    found = _run()
    if found is None:
        raise ConfigurationError("current_run() is for code inside a run, and this code is in none")
    return found


def _run() -> RunContext | None:
    workflow = current_workflow()
    if workflow is not None:
        data = workflow.run_data
        return RunContext(
            run_id=getattr(data, "run_id", ""),
            workflow=getattr(data, "workflow", ""),
            trace_id=getattr(data, "trace_id", ""),
        )
    step = running_step()
    if step is None or step.run_id is None:
        return None
    return RunContext(run_id=step.run_id, workflow=step.workflow or "", trace_id=step.trace_id)


def now() -> dt.datetime:
    """The time, aware, in UTC; in a workflow the run's own time, the same on replay."""
    workflow = current_workflow()
    if workflow is not None:
        return workflow.now()
    step = running_step()
    return dt.datetime.fromtimestamp(time.time() if step is None else step._clock(), dt.UTC)


def random() -> float:
    """A random float in [0, 1); in a workflow the same on replay."""
    workflow = current_workflow()
    return _random.random() if workflow is None else workflow.random()


def uuid4() -> uuid.UUID:
    """A random UUID; in a workflow the same on replay."""
    workflow = current_workflow()
    return uuid.uuid4() if workflow is None else workflow.uuid4()


def sleep(duration: Duration) -> Awaitable[None]:
    """Sleep: seconds, a timedelta, or text such as "2s".

    In a workflow `await pw.sleep("2s")` is durable: the run waits without an actor, over a crash as well. In an async
    step, and in async code elsewhere, it is asyncio's sleep. In a `def` step, and in sync code elsewhere, the call
    itself blocks.

    Raises:
        ConfigurationError: `duration` is none.
    """
    try:
        seconds = parse_duration(duration)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"sleep({duration!r}): {error}") from None
    workflow = current_workflow()
    if workflow is not None:
        return workflow.sleep(seconds)
    step = running_step()
    if _in_event_loop() and (step is None or step._is_async):
        return asyncio.sleep(0 if step is not None and step._sleep is no_sleep else seconds)
    (time.sleep if step is None else step._sleep)(seconds)
    return _Over()


class _Over:
    """What a sleep that is over gives: awaiting it does nothing."""

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class StepLogger(logging.LoggerAdapter[logging.Logger]):
    """Adds `run`, `workflow`, `step`, `attempt`, `trace_id`, `span_id` and the run's `attributes` to each record."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**place(), **(kwargs.get("extra") or {})}
        return msg, kwargs


def get_logger(name: str = "pyworkflow_ray.user") -> StepLogger:
    """A logger whose records carry run, workflow, step, attempt, trace and the run's attributes; in a workflow a line
    appears once, not on replay. In workers the records of all other loggers carry them too.

    Args:
        name: Of the stdlib logger that the records go to.
    """
    return StepLogger(logging.getLogger(name), {})
