"""What a step asks for after it was killed for want of memory."""

from __future__ import annotations

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.engine.commands import Dispatch
from pyworkflow_ray.engine.events import StepLost
from pyworkflow_ray.engine.resources import ask_for
from pyworkflow_ray.execution.options import check_step_options
from tests.unit.engine.test_driver import Run

GIB = 2**30


def test_memory_grows_with_each_kill_up_to_the_most() -> None:
    options = check_step_options({"memory": GIB, "memory_growth": 2, "max_memory": 5 * GIB, "num_cpus": 2}).ray_options
    assert [ask_for(options, kills)["memory"] for kills in range(5)] == [GIB, 2 * GIB, 4 * GIB, 5 * GIB, 5 * GIB]
    assert ask_for(options, 1) == {"memory": 2 * GIB, "num_cpus": 2}  # Ray gets its own options only


def test_without_growth_it_asks_for_the_same() -> None:
    assert ask_for({"memory": GIB}, 3) == {"memory": GIB}
    assert ask_for({}, 3) == {}


def test_growth_without_end_stays_a_number_that_ray_takes() -> None:
    options = check_step_options({"memory": GIB, "memory_growth": 1000}).ray_options
    assert ask_for(options, 10**6)["memory"] <= 2**62


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"memory_growth": 2}, "memory="),
        ({"memory": GIB, "max_memory": GIB}, "memory_growth="),
        ({"memory": GIB, "memory_growth": 0.5}, "finite number ≥ 1"),
        ({"memory": GIB, "memory_growth": 2, "max_memory": 5}, "max_memory"),
        ({"memory": GIB, "memory_growth": "2"}, "memory_growth"),
    ],
)
def test_what_makes_no_sense_is_refused_as_the_decorator_runs(options: dict[str, object], named: str) -> None:
    with pytest.raises(pw.ConfigurationError, match=named):
        check_step_options(options)


@pw.step(memory=GIB, memory_growth=2, max_memory=3 * GIB, max_recoveries=5)
async def greedy() -> str:
    return "done"


async def flow() -> str:
    return await greedy()


def test_a_step_is_dispatched_again_with_more_memory_after_each_kill_for_want_of_it_and_no_other() -> None:
    run = Run(flow)
    asked = []
    for dispatch, cause in enumerate(("out_of_memory", "worker_died", "out_of_memory"), 1):
        run.do("lost", "1", dispatch, cause=cause, charged=True)
        event = next(e for e in reversed([*run.events, *run.driver._lazy]) if isinstance(e, StepLost))
        run.now = event.retry_at
        run.do("tick")
        asked.append(run.of(Dispatch)[-1].call.ray_options)
    assert asked == [{"memory": 2 * GIB}, {"memory": 2 * GIB}, {"memory": 3 * GIB}]
    assert run.driver.history.steps["1"].event.ray_options["memory_growth"] == 2  # recorded: every owner grows it alike
