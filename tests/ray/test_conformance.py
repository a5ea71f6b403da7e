"""The behaviours of tests/conformance on a real Ray: all of them at once, each compared as in a `WorkflowEnv`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import pyworkflow_ray as pw
import pyworkflow_ray.compat

CONFORMANCE = Path(__file__).resolve().parents[1] / "conformance"
if str(CONFORMANCE) not in sys.path:
    sys.path.insert(0, str(CONFORMANCE))  # before anything starts Ray's workers: they import the behaviours by name

from behaviours import BEHAVIOURS, met  # noqa: E402

pytestmark = pytest.mark.ray


def test_every_behaviour_on_ray(runtime: Path) -> None:
    handles = {name: pw.start(case.flow, *case.args) for name, case in BEHAVIOURS.items()}
    faults = []
    for name, handle in handles.items():
        error = handle.exception(timeout=120)
        result = None if error is not None else handle.result()
        why = met(BEHAVIOURS[name], result, error, handle.explain().retries)
        faults += [] if why is None else [f"{name}: {why}"]
    assert not faults, "\n".join(faults)


async def test_a_module_written_for_the_original_runs_on_workers_that_know_nothing_of_it(runtime: Path) -> None:
    import pyworkflow  # type: ignore[import-not-found]
    from compat_flows import order_flow

    run_id = await pyworkflow.start(order_flow, "o-1", idempotency_key="order/o-1")
    assert run_id == pyworkflow.start(order_flow, order="o-1", idempotency_key="order/o-1")
    handle = await pyworkflow.get_workflow_run(run_id)
    assert await handle == "o-1 paid"
    assert await pyworkflow.resume(run_id) == "o-1 paid"
    assert not await pyworkflow.cancel_workflow(run_id)
    assert handle.explain().attributes == {"tags": ["orders"]}
    assert (await pyworkflow.get_workflow_events(run_id))[-1].type == "run_completed"
