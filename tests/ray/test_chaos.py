"""Every kind of failure handling at once, while every kind of process is killed with SIGKILL, again and again."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import chaos_flows
import flows
import pytest
from processes import descendants, kill, until

import pyworkflow_ray as pw
from pyworkflow_ray.engine.events import TERMINAL, ChunkCompleted, StepCompleted, StepFailed

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("runtime")]

RUNS = 40
KILLS = 60
TITLES = ("ray::RunActor", "ray::Controller", "ray::Anchor", "ray::BreakerActor", "ray::BudgetActor")


def told(ledger: Path) -> list[list[str]]:
    return [line.split() for line in flows.lines(ledger)]


def one_of(rng: random.Random, ledger: Path) -> tuple[str, int] | None:
    """A process that is ours, of a kind chosen first: the many must not shield the few."""
    kind = rng.choice(["step worker", "step worker", "ray::RunActor", "ray::RunActor", *TITLES])
    mine = set(descendants("ray::"))
    if kind == "step worker":
        found = sorted({int(pid) for *_, pid in told(ledger)[-10:]} & mine - set(descendants("ray::RunActor")))
    else:
        found = descendants(kind)
    return (kind, rng.choice(found)) if found else None


@pytest.mark.parametrize("seed", [1])
def test_failure_handling_of_every_kind_survives_the_sigkill_of_every_kind_of_process(
    seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    ledger, down = tmp_path / "ledger", tmp_path / "down"
    struck: Counter[str] = Counter()
    handles: list[Any] = []
    while sum(struck.values()) < KILLS:
        if len(handles) < RUNS or all(handle.done() for handle in handles):
            handles.append(pw.start(chaos_flows.mixed, str(ledger), str(down), len(handles)))
        if rng.random() < 0.2:
            down.touch() if rng.random() < 0.5 else down.unlink(missing_ok=True)
        seen = len(told(ledger))
        until(lambda seen=seen: len(told(ledger)) >= seen + 4 or down.exists(), "something is done")  # type: ignore[misc]
        chosen = one_of(rng, ledger)
        if chosen is not None:
            kill(chosen[1])
            struck[chosen[0]] += 1
    down.unlink(missing_ok=True)

    for n, handle in enumerate(handles):
        if n % 3 == 0:
            with pytest.raises(pw.FatalError, match="no such address"):
                handle.result(180)
        else:
            assert handle.result(180) == f"done {n}"
    assert all(struck[kind] for kind in ("step worker", *TITLES)), struck
    check(handles, told(ledger), sum(struck.values()))


def check(handles: list[Any], ledger: list[list[str]], kills: int) -> None:
    keys: dict[tuple[str, str], set[str]] = {}
    for kind, n, key, _ in ledger:
        keys.setdefault((kind, n), set()).add(key)
    assert all(len(found) == 1 for found in keys.values()), "one key a step, however often it was executed"
    undone = {int(n) for kind, n, *_ in ledger if kind == "release"}
    assert undone == {n for n in range(len(handles)) if n % 3 == 0}
    executed = Counter(kind for kind, *_ in ledger)
    for kind in ("reserve", "ship", "release"):
        once = len(handles) if kind != "release" else len(undone)
        assert once <= executed[kind] <= once + kills
    for handle in handles:
        events = handle.events()
        assert sum(isinstance(e, TERMINAL) for e in events) == 1
        ended = Counter(e.position for e in events if isinstance(e, StepCompleted | StepFailed))
        assert max(ended.values()) == 1
        items = [i for e in events if isinstance(e, ChunkCompleted) for i in range(e.first, e.first + e.count)]
        assert sorted(items) == list(range(20))
