"""Which run, step and attempt a log record is of: told by where the code runs that makes it.

Called by `pw.get_logger`, and in our worker processes for every record of any logger (`enrich`). A record that has one
of these attributes already keeps it.
"""

from __future__ import annotations

import logging
from typing import Any

from pyworkflow_ray.engine.chunks import parse_position
from pyworkflow_ray.engine.loop import current_workflow
from pyworkflow_ray.execution.context import StepContext, running_step
from pyworkflow_ray.ids import attempt_span_id, step_span_id

FIELDS = ("run", "workflow", "step", "attempt", "trace_id", "span_id", "attributes")
NOWHERE: dict[str, Any] = {**dict.fromkeys(FIELDS), "attributes": {}}


def place() -> dict[str, Any]:
    """By name in `FIELDS`; None for what there is not, and attributes that are empty."""
    workflow = current_workflow()
    if workflow is not None:
        data = workflow.run_data
        return {
            **NOWHERE,
            "run": getattr(data, "run_id", None),
            "workflow": getattr(data, "workflow", None),
            "trace_id": getattr(data, "trace_id", None),
            "attributes": getattr(data, "attributes", {}),
        }
    step = running_step()
    if step is None:
        return NOWHERE
    return {
        "run": step.run_id,
        "workflow": step.workflow,
        "step": step.name,
        "attempt": step.attempt,
        "trace_id": step.trace_id or None,
        "span_id": _span_id(step),
        "attributes": step.attributes,
    }


def _span_id(step: StepContext) -> str | None:
    """As the trace has it: of the attempt; of an item of a map that of the map."""
    if step.run_id is None or step.position is None or step._scope.inline:
        return None
    chunk = parse_position(step.position)
    if chunk is not None:
        return step_span_id(step._scope.run_uid, chunk[0])
    return attempt_span_id(step._scope.run_uid, step.position, step.fence[0], step.fence[1], step.fence[2])


def enrich(record: logging.LogRecord) -> None:
    """Put the place on a record, as attributes."""
    had = record.__dict__
    for name, value in place().items():
        had.setdefault(name, value)
