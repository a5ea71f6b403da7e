"""Ten thousand random programs under crashes, losses, duplicates and delays, each decided by its seed."""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from pyworkflow_ray.testing.programs import LEAVES, NODES
from pyworkflow_ray.testing.simulate import main, simulate

SCHEDULES = 10_000


def _simulate(first: int, count: int) -> tuple[Counter[str], Counter[str]]:
    struck: Counter[str] = Counter()
    ran: Counter[str] = Counter()
    for seed in range(first, first + count):
        simulation, operators = simulate(seed)
        struck += simulation.struck
        ran += operators
    return struck, ran


def _simulate_many(schedules: int) -> tuple[Counter[str], Counter[str]]:
    half = schedules // 2
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(_simulate, (0, half), (half, schedules - half)))
    return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]


def test_ten_thousand_schedules_keep_every_invariant_and_every_fault_struck():
    struck, ran = _simulate_many(SCHEDULES)
    assert struck["crash"] > 10_000
    assert min(struck["lost_before"], struck["lost_after"], struck["duplicate"]) > 1_000
    assert min(struck["wake"], struck["resume"]) > 1_000
    assert struck["cancel"] > 300
    assert struck["together"] > 400
    assert struck["early"] > 400  # relaxed steps that began before what precedes them was durable
    assert all(ran[name] > 500 for name in (*LEAVES, *NODES)), ran


@pytest.mark.slow
def test_a_hundred_thousand_schedules_keep_every_invariant():
    struck, _ = _simulate_many(10 * SCHEDULES)
    assert struck["crash"] > 100_000


def test_a_seed_repeats_its_schedule_bit_for_bit():
    for seed in range(40):
        first, second = simulate(seed)[0], simulate(seed)[0]
        assert first.trace == second.trace
        assert [e.model_dump_json() for e in first.events] == [e.model_dump_json() for e in second.events]


def test_the_command_line_prints_the_trace_of_a_seed_and_counts_faults(capsys):
    assert main(["--seed", "3"]) == 0
    assert "Dispatch" in capsys.readouterr().out
    assert main(["--count", "5"]) == 0
    assert '"schedules": 5' in capsys.readouterr().out


def test_a_failing_seed_prints_the_command_that_repeats_it(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["pyworkflow_ray.testing.simulate"], "expected", lambda program: -1)
    assert main(["--count", "5"]) == 1
    assert "make sim SEED=" in capsys.readouterr().err
