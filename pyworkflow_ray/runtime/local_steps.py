"""Local async steps of a run actor, many at a time on one thread: the process's lasting event loop.

Called by `run_actor`, in a thread of its own, for local calls beyond the one that it executes itself. A thousand HTTP
calls that wait are a thousand coroutines, and neither a process nor a thread each.

Faults: a step that blocks the loop holds up the others, as in any asyncio program; code that can't be loaded is that
call's failure.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from pyworkflow_ray.engine.calls import Outcome, StepCall
from pyworkflow_ray.engine.events import AttemptNote
from pyworkflow_ray.execution.definitions import StepDefinition
from pyworkflow_ray.execution.interrupt import Interrupt
from pyworkflow_ray.execution.records import FAST_S
from pyworkflow_ray.execution.worker import execute_call_async
from pyworkflow_ray.execution.worker_loop import worker_loop
from pyworkflow_ray.runtime.process import Process
from pyworkflow_ray.runtime.step_host import load_call

log = logging.getLogger("pyworkflow_ray.run_actor")


def run_together(
    calls: Sequence[tuple[StepCall, Interrupt]],
    process: Process,
    *,
    apart: Callable[[StepCall], None],
    report: Callable[[StepCall, AttemptNote], None],
    done: Callable[[StepCall, Outcome], None],
) -> None:
    """Execute the async ones of `calls` at once, blocking this thread until all have ended.

    Args:
        apart: Gets each call that needs a thread of its own, at once: a sync one, or one whose breaker or budget may
            have to ask another process.
        report, done: Called on the loop's thread, for each attempt and each end as it comes.
    """

    async def one(call: StepCall, interrupt: Interrupt, step: StepDefinition) -> None:
        outcome = await execute_call_async(
            call,
            step,
            process.codec,
            report=lambda note: report(call, note),
            interrupt=interrupt,
            wait_max_s=process.config.worker_wait_max_s,
            worker=process.worker,
            node=process.node,
            owns_loop=True,
            starts=False,
            gather_s=FAST_S,
        )
        done(call, outcome)

    async def all_of(together: list[tuple[StepCall, Interrupt, StepDefinition]]) -> None:
        ends = await asyncio.gather(*(one(*each) for each in together), return_exceptions=True)
        for error in filter(None, ends):  # our own code broke: the run actor's log says where
            log.error("a local step could not be executed", exc_info=error)

    together: list[tuple[StepCall, Interrupt, StepDefinition]] = []
    for call, interrupt in calls:
        if call.breaker is not None or call.policy.retry_budget is not None:
            apart(call)
            continue
        loaded = load_call(call, process)
        if isinstance(loaded, Outcome):
            done(call, loaded)
        elif not loaded[0].is_async:
            apart(call)
        else:
            together.append((call, interrupt, loaded[0]))
    if together:
        worker_loop().run(all_of(together))
