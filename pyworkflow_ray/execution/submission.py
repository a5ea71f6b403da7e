"""What is submitted: `run_created` from a workflow and its arguments, and whether two submissions are the same run.

`make_created` is called by the api and the test environment, `difference` by the controller and again the test
environment. Calls `code` and the codec.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from pyworkflow_ray.engine.calls import Codec
from pyworkflow_ray.engine.events import CodeEnvironment, Payload, RunCreated
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.breakers import declared_settings
from pyworkflow_ray.execution.budgets import declared_budgets
from pyworkflow_ray.execution.code import describe_workflow
from pyworkflow_ray.execution.definitions import WorkflowDefinition
from pyworkflow_ray.execution.hooks import describe_hooks
from pyworkflow_ray.ids import new_id, new_run_id, trace_id
from pyworkflow_ray.resilience.taxonomy import registered_kinds


def make_created(
    definition: WorkflowDefinition,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    run_id: str | None,
    attributes: Mapping[str, Any],
    storage_id: str,
    environment: CodeEnvironment,
    codec: Codec,
    at: float | None = None,
    uid: str | None = None,
    traceparent: str = "",
) -> RunCreated:
    """The first event of a new run. Arguments are validated and bound with defaults, so equal calls are equal runs.

    Args:
        at: UNIX time at which it is created; None: now.
        uid: What makes the run unique, 32 hexadecimal digits; None: a new one.
        traceparent: Of the span that starts it: the run's trace is that one's; empty: one of its own.

    Raises:
        TypeError, pydantic.ValidationError: the arguments do not fit the workflow.
        PayloadError, ConfigurationError: an argument can't be stored, or the code can't be sent.
    """
    positional, named = definition.bind(args, dict(kwargs))
    names = definition.names
    for name in attributes:
        if codec.marks(name):
            raise ConfigurationError(
                f"attribute {name!r} is not allowed: its name is marked (redact), and attributes are shown "
                "to everybody. Pass it as an argument"
            )
    uid = uid or new_id()
    run_id = run_id or new_run_id()
    mine, code = codec.at(run_id), codec.for_code()
    return RunCreated(
        seq=0,
        at=time.time() if at is None else at,
        run_id=run_id,
        run_uid=uid,
        storage_id=storage_id,
        workflow=definition.name,
        version=None if definition.version is None else str(definition.version),
        code=describe_workflow(definition, code.put_code, allow_pickle=code.allow_pickle),
        environment=environment,
        args=[mine.encode(value, name) for value, name in zip_longest(positional, names[: len(positional)])],
        kwargs={name: mine.encode(value, name) for name, value in named.items()},
        attributes=dict(attributes),
        max_duration_s=definition.max_duration_s,
        max_recoveries=definition.max_recoveries,
        breakers=declared_settings(),
        budgets=declared_budgets(),
        kinds=registered_kinds(),
        hooks={event: [code.store_code(hook) for hook in hooks] for event, hooks in describe_hooks().items()},
        trace_id=traceparent.split("-")[1] if traceparent else trace_id(uid),
        traceparent=traceparent,
    )


def make_rerun(old: RunCreated, codec: Codec) -> RunCreated:
    """The first event of a new run of the same workflow with the same arguments, attributes and code environment.

    It is a run of its own: another id, another trace, other idempotency keys. Code that can be imported is what it is
    now; code that travelled by value is what it was.
    """
    uid, run_id = new_id(), new_run_id()
    there = codec.at(old.run_id)
    return old.model_copy(
        update={
            "at": time.time(),
            "run_id": run_id,
            "args": [there.move(payload, run_id) for payload in old.args],
            "kwargs": {name: there.move(payload, run_id) for name, payload in old.kwargs.items()},
            "run_uid": uid,
            "generation": 0,
            "trace_id": trace_id(uid),
            "traceparent": "",
            "rerun_of": old.run_id,
        }
    )


def difference(old: RunCreated, new: RunCreated) -> str | None:
    """Why `new` is not the run `old`, in words; None: it is the same workflow with the same arguments."""
    if old.workflow != new.workflow:
        return f"it is a run of workflow {old.workflow!r}, not of {new.workflow!r}"
    if len(old.args) != len(new.args) or set(old.kwargs) != set(new.kwargs):
        return "it has other arguments"
    pairs = [(f"argument {i + 1}", a, b) for i, (a, b) in enumerate(zip(old.args, new.args, strict=True))]
    pairs += [(f"argument {name!r}", old.kwargs[name], new.kwargs[name]) for name in old.kwargs]
    for name, one, other in pairs:
        if not _equal(one, other):
            exact = (
                ""
                if one.digest is not None and other.digest is not None
                else (". It has no canonical form, so it is equal only when its stored bytes are")
            )
            return f"its {name} is another{exact}"
    return None


def _equal(one: Payload, other: Payload) -> bool:
    if one.digest is not None and other.digest is not None:
        return (one.enc, one.cls, one.digest) == (other.enc, other.cls, other.digest)
    return (one.enc, one.data, one.ref, one.blobs) == (other.enc, other.data, other.ref, other.blobs)
