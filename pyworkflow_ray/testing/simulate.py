"""Simulate random programs under random faults: `python -m pyworkflow_ray.testing.simulate --seed 7`.

One seed decides program, schedule and faults; a failure prints the command that repeats it. With `--count` or
`--hours` it goes on from `--first-seed` and reports how often each fault struck and each operator ran.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from dataclasses import replace

from pyworkflow_ray.engine.commands import Limits
from pyworkflow_ray.engine.events import RunCancelled, RunCompleted
from pyworkflow_ray.testing.programs import Program, World, expected, generate, interpret, operators
from pyworkflow_ray.testing.simulator import RUN_ID, Faults, Simulation, Simulator, check_invariants


def simulate(seed: int) -> tuple[Simulation, Counter[str]]:
    """One schedule.

    Raises:
        AssertionError: an invariant is broken or the result is wrong; the message has the command that repeats it.
    """
    rng = random.Random(seed)
    program: Program = ["seq", [generate(rng, depth=rng.randint(1, 3)), generate(rng, depth=1)]]
    faults = Faults(crash=rng.choice([0, 0.02, 0.1]), lost=rng.choice([0, 0.1]), duplicate=rng.choice([0, 0.2]))
    faults = replace(faults, wake=rng.choice([0, 0, 0.02]))
    world, limits, cancel_at = World(), Limits(), None
    more = rng.random()
    if more < 0.1:  # fails, is mended and resumed, beside whatever else goes on
        where = rng.choice(["seq", "gather"])
        program = [where, [program, ["broken", 7], ["gather", [generate(rng, depth=1), ["tidy", ["broken", 8]]]]]]
    elif more < 0.2:
        cancel_at = rng.uniform(0.0, 8.0)
        program = ["stubborn", program, rng.random() < 0.5] if rng.random() < 0.5 else program
    elif more < 0.28:
        limits = Limits(max_events=rng.randint(60, 150))  # one activation must fit in it
    again = f"repeat it with: make sim SEED={seed}"
    simulator = Simulator(
        interpret,
        world.steps(),
        args=(program,),
        seed=seed,
        faults=faults,
        limits=limits,
        cancel_at=cancel_at,
        mend=world.mend,
    )
    try:
        simulation = simulator.run(max_events=5_000)
    except Exception as error:
        trace = "\n".join(simulator.result.trace[-12:])
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}; {again}\n{trace}") from error
    check_invariants(simulation)
    ended = simulation.ended
    if isinstance(ended, RunCancelled) and cancel_at is not None:
        return simulation, operators(program)
    if not isinstance(ended, RunCompleted):
        raise AssertionError(f"seed {seed}: the run ended as {ended or simulation.paused}; {again}")
    result = simulator.codec.at(RUN_ID).decode(ended.result)
    if result != expected(program):
        raise AssertionError(f"seed {seed}: result {result}, expected {expected(program)}; {again}")
    return simulation, operators(program)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and simulate; 1 on the first failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="simulate this one and print its trace")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="how many seeds")
    parser.add_argument("--hours", type=float, help="for how long")
    options = parser.parse_args(argv)
    if options.seed is not None:
        simulation, _ = simulate(options.seed)
        print("\n".join(simulation.trace))
        print(json.dumps({"seed": options.seed, "struck": simulation.struck, "events": len(simulation.events)}))
        return 0
    struck: Counter[str] = Counter()
    ran: Counter[str] = Counter()
    until = time.monotonic() + (options.hours or 1e6) * 3600
    seed = first = options.first_seed
    last = first + (options.count if options.count is not None else 10**12 if options.hours else 1000)
    while seed < last and time.monotonic() < until:
        try:
            simulation, counts = simulate(seed)
        except AssertionError as error:
            print(error, file=sys.stderr)
            return 1
        struck += simulation.struck
        ran += counts
        seed += 1
    print(json.dumps({"schedules": seed - first, "struck": struck, "operators": ran}, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
