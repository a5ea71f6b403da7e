"""Attempt records that a worker streams may overtake each other; in the log they stand in order, each once."""

from __future__ import annotations

import itertools
import random

import pytest

from pyworkflow_ray.engine.calls import Outcome
from pyworkflow_ray.engine.commands import Append
from pyworkflow_ray.engine.driver import Driver
from pyworkflow_ray.engine.events import AttemptFailed, RunActivated
from pyworkflow_ray.step import step
from pyworkflow_ray.testing.simulator import START_AT, Simulator


@step(max_retries=3)
def work(n: int) -> int:
    return n


async def flow():
    return await work(1)


@pytest.mark.parametrize("order", list(itertools.permutations((1, 2, 3))), ids=str)
@pytest.mark.parametrize("streamed", range(4))
def test_streamed_records_are_logged_in_order_and_once(order, streamed):
    simulator = Simulator(flow, {})
    driver = Driver(flow, simulator.codec, rng=random.Random(0))
    driver.activate(simulator.store.events(), RunActivated(epoch=0), START_AT)
    logged = []

    def drain():
        while effects := driver.effects():
            for effect in effects:
                if isinstance(effect, Append):
                    logged.extend(effect.events)
                    driver.durable(effect.events[-1].seq, START_AT)

    drain()
    error = simulator.codec.encode_error(ConnectionError("no"), "transient")
    records = {
        n: AttemptFailed(position="1", dispatch=1, attempt=n, started_at=START_AT, ended_at=START_AT, error=error)
        for n in (1, 2, 3)
    }
    for n in order[:streamed]:
        driver.record(records[n], START_AT)
    outcome = Outcome("1", 1, "completed", 4, attempts=list(records.values()), result=simulator.codec.encode(1))
    driver.outcome(outcome, START_AT)
    drain()
    assert [e.attempt for e in logged if isinstance(e, AttemptFailed)] == [1, 2, 3]
    assert logged[-1].type == "run_completed"
