from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from pyworkflow_ray.demo.kills import choose, descendant, strike
from pyworkflow_ray.engine.events import (
    CodeRef,
    Event,
    Payload,
    RunActivated,
    RunCompleted,
    RunParked,
    StepCompleted,
    StepLost,
    StepScheduled,
    StepStarted,
)

NONE = Payload(enc="json")


def scheduled(position: str) -> StepScheduled:
    return StepScheduled(position=position, number=1, step="charge", code=CodeRef(how="import", name="charge"))


def started(position: str, pid: int, at: float) -> StepStarted:
    return StepStarted(position=position, dispatch=1, attempt=1, started_at=at, worker=f"{pid}@n")


def completed(position: str) -> StepCompleted:
    return StepCompleted(position=position, dispatch=1, attempt=1, started_at=0, ended_at=0, result=NONE)


def activated(pid: int) -> RunActivated:
    return RunActivated(epoch=0, worker=f"{pid}@n")


BUSY: list[Event] = [activated(10), scheduled("1"), started("1", 20, at=5), completed("1"), scheduled("2")]


def test_the_owner_of_a_run_with_a_step_under_way_is_chosen() -> None:
    assert choose("run actor", [BUSY]) == 10


def test_nobody_is_chosen_where_nothing_is_under_way() -> None:
    ended = [*BUSY, completed("2"), RunCompleted(result=NONE)]
    parked = [*BUSY, RunParked(due_at=9)]
    idle = [activated(10), scheduled("1"), completed("1")]
    for role in ("run actor", "step worker"):
        assert choose(role, [ended, parked, idle, []]) is None  # type: ignore[arg-type]


def test_the_worker_of_the_step_that_began_last_is_chosen() -> None:
    one: list[Event] = [activated(10), scheduled("1"), started("1", 20, at=5)]
    other: list[Event] = [activated(11), scheduled("1"), started("1", 21, at=6)]
    assert choose("step worker", [other, one]) == 21
    assert choose("step worker", [other, one], spared=frozenset({21})) == 20


def test_a_worker_that_has_ended_its_step_or_was_lost_is_no_victim() -> None:
    lost: list[Event] = [activated(10), scheduled("1"), started("1", 20, at=5), StepLost(position="1", dispatch=1)]
    assert choose("step worker", [BUSY, lost]) is None


def test_a_local_step_runs_in_the_run_actor_which_is_no_step_worker() -> None:
    assert choose("step worker", [[activated(10), scheduled("1"), started("1", 10, at=5)]]) is None


@contextmanager
def process(title: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process under this title that has said it is up, and ends when it is told to or its input ends."""
    command = [title, "-c", "echo up; read line"]
    with subprocess.Popen(command, executable="/bin/sh", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        yield child


def test_a_worker_of_ray_is_killed_and_seen_to_end() -> None:
    with process("ray::run_step") as child:
        kill = strike("step worker", child.pid)
        assert kill is not None
        assert kill.gone
        assert child.wait(timeout=10) == -9


def test_a_worker_that_is_no_longer_at_work_once_it_is_stopped_goes_on() -> None:
    asked: list[int] = []
    with process("ray::run_step") as child:

        def still() -> bool:
            while psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:
                time.sleep(0)
            asked.append(child.pid)
            return False

        assert strike("step worker", child.pid, still=still) is None
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(timeout=10) == 1  # `read` met the end of its input: it went on by itself
    assert asked == [child.pid]


def test_a_process_that_is_no_worker_of_ray_is_left_alone() -> None:
    with process("sh") as child:
        kill = strike("step worker", child.pid)
        assert kill is not None
        assert not kill.gone
        assert child.poll() is None


def test_a_process_that_is_gone_already_is_no_kill() -> None:
    with process("ray::run_step") as child:
        pass
    kill = strike("step worker", child.pid)
    assert kill is not None
    assert not kill.gone


def test_an_actor_is_found_by_its_class_among_the_processes_below_this_one() -> None:
    assert descendant("Keeper") is None
    with process("ray::Keeper.decide") as child:
        assert descendant("keeper") == child.pid
        assert descendant("decide") is None
    assert descendant("keeper") is None


def test_an_actor_of_another_cluster_is_not_found() -> None:
    code = "import subprocess, sys; from pyworkflow_ray.demo.kills import descendant\nprint(descendant('keeper'))"
    with process("ray::Keeper"):
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "None"
