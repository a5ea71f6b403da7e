"""The behaviours in a `WorkflowEnv`; `tests/ray/test_conformance.py` asks a real Ray for the same."""

from __future__ import annotations

import pytest
from behaviours import BEHAVIOURS, Behaviour, met

from pyworkflow_ray.testing import WorkflowEnv


@pytest.mark.parametrize("case", BEHAVIOURS.values(), ids=list(BEHAVIOURS))
async def test_in_process(case: Behaviour, workflow_env: WorkflowEnv) -> None:
    handle = workflow_env.start(case.flow, *case.args)
    error = handle.exception()
    result = None if error is not None else await handle
    assert met(case, result, error, workflow_env.explain().retries) is None


@pytest.mark.parametrize("case", BEHAVIOURS.values(), ids=list(BEHAVIOURS))
async def test_the_history_leads_the_same_code_to_the_same_end(case: Behaviour, workflow_env: WorkflowEnv) -> None:
    workflow_env.start(case.flow, *case.args).exception()
    workflow_env.replay(workflow_env.events())


# Where an attempt that a crash made unknown, or a call that was made twice, is meant to be seen.
COUNTING = {
    "a transient failure is tried again, and the attempt reads the failures before",
    "exhausted retries raise the step's own exception",
    "a run never passes a breaker that its own earlier step has opened",
    "all attempts of a step have one idempotency key",
    "retry_after replaces the delay",
}


@pytest.mark.parametrize("name", [name for name in BEHAVIOURS if name not in COUNTING])
async def test_a_crash_after_any_event_changes_nothing(name: str, workflow_env: WorkflowEnv) -> None:
    case = BEHAVIOURS[name]
    result, error = None, None
    try:
        result = await workflow_env.crash_everywhere(case.flow, *case.args)
    except Exception as raised:
        error = raised
    assert met(case, result, error, workflow_env.explain().retries) is None
