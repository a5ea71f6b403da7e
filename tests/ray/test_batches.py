"""Maps, compensations and reruns on a real Ray, with real SIGKILLs; the oracle is the ledger that the steps wrote."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import batch_flows
import pytest
from click.testing import CliRunner
from processes import descendants, kill, until

import pyworkflow_ray as pw
from pyworkflow_ray.cli.main import cli
from pyworkflow_ray.engine.events import ChunkCompleted, RunActivated, StepLost

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("runtime")]


def owner_of(handle: pw.RunHandle[Any]) -> int:
    return int(next(e.worker for e in reversed(handle.events()) if isinstance(e, RunActivated)))


def executed(ledger: Path) -> list[tuple[int, int, str]]:
    """(item, process, key) of each execution."""
    found = [line.split() for line in batch_flows.lines(ledger)]
    return [(int(n), int(pid), key) for n, pid, key in found]


def test_thousands_of_items_are_one_event_a_chunk_and_one_bad_item_never_loses_the_others() -> None:
    handle = pw.start(batch_flows.thousands, 5000)
    assert handle.result(120) == {
        "right": True,
        "failed": [7, 1007, 2007, 3007, 4007],
        "retried": {"ConnectionError": 5},
        "words": "5 of 5000 items failed (ValueError 5)",
    }
    types = Counter(event.type for event in handle.events())
    assert types["chunk_completed"] == 10
    assert sum(types.values()) <= 10 + 5
    (step,) = handle.steps()
    assert step.outcome == "5,000 of 5,000 done, 5 failed (ValueError 5), 5 retries"


def started(tmp_path: Path) -> tuple[pw.RunHandle[list[int]], Path, Path]:
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    handle = pw.start(batch_flows.gated, str(ledger), str(gate))
    until(lambda: any(n == 25 for n, _, _ in executed(ledger)), "the gated item runs")
    until(lambda: sum(isinstance(e, ChunkCompleted) for e in handle.events()) == 2, "two chunks have ended")
    return handle, ledger, gate


def check(handle: pw.RunHandle[list[int]], ledger: Path) -> None:
    assert handle.result(120) == list(range(40))
    times = Counter(n for n, _, _ in executed(ledger))
    assert sorted(times) == list(range(40))
    again = {n for n, count in times.items() if count > 1}
    assert 20 in again
    assert again <= set(range(20, 30))  # the unfinished chunk; a worker may outlive its run actor by a moment
    keys = {n: {key for m, _, key in executed(ledger) if m == n} for n in times}
    assert all(len(found) == 1 for found in keys.values())
    covered = [n for e in handle.events() if isinstance(e, ChunkCompleted) for n in range(e.first, e.first + e.count)]
    assert sorted(covered) == list(range(40))


def test_a_killed_worker_loses_only_its_unfinished_chunk(tmp_path: Path) -> None:
    handle, ledger, gate = started(tmp_path)
    kill(next(pid for n, pid, _ in executed(ledger) if n == 25))
    until(lambda: any(isinstance(e, StepLost) for e in handle.events()), "the loss is recorded")
    gate.touch()
    check(handle, ledger)


def test_a_killed_run_actor_repeats_no_finished_chunk(tmp_path: Path) -> None:
    handle, ledger, gate = started(tmp_path)
    kill(owner_of(handle))
    until(lambda: len([e for e in handle.events() if isinstance(e, RunActivated)]) == 2, "the run is taken up")
    gate.touch()
    check(handle, ledger)


@pytest.mark.slow
def test_a_map_survives_the_sigkill_of_its_workers_and_its_actor_again_and_again(tmp_path: Path) -> None:
    ledger, kills = tmp_path / "ledger", 0
    handle = pw.start(batch_flows.long_map, str(ledger), 4000)
    while not handle.done() and kills < 20:
        before = len(executed(ledger))
        until(lambda known=before: len(executed(ledger)) >= known + 100 or handle.done(), "it goes on")  # type: ignore[misc]
        if handle.done():
            break
        pid = owner_of(handle) if kills % 2 else executed(ledger)[-1][1]
        if pid in descendants():  # ours, and it has not ended meanwhile
            kill(pid)
            kills += 1
    assert handle.result(120) == 4000
    assert kills >= 5
    covered = [n for e in handle.events() if isinstance(e, ChunkCompleted) for n in range(e.first, e.first + e.count)]
    assert sorted(covered) == list(range(4000))
    again = {n for n, count in Counter(n for n, _, _ in executed(ledger)).items() if count > 1}
    assert len(again) <= (kills + 1) * 4 * 25
    keys = {n: {key for m, _, key in executed(ledger) if m == n} for n in list(again)[:50]}
    assert all(len(found) == 1 for found in keys.values())


@pytest.mark.slow  # two workers end themselves, each 2 s after the timeout
def test_an_item_stuck_in_c_beyond_its_timeout_ends_alone() -> None:
    assert pw.run(batch_flows.stuck) == ["int", "StepTimeoutError", "int"]


def test_resume_executes_the_failed_items_alone(tmp_path: Path) -> None:
    ledger, flag = tmp_path / "ledger", tmp_path / "flag"
    handle = pw.start(batch_flows.flagged, str(ledger), str(flag))
    with pytest.raises(ExceptionGroup, match="3 of 30 items failed"):
        handle.result(60)
    flag.touch()
    assert pw.resume(handle.run_id).result(60) == list(range(30))
    assert Counter(map(int, batch_flows.lines(ledger))) == Counter(range(30)) + Counter([3, 13, 23])


def test_a_failed_run_is_undone_in_reverse_order_although_its_actor_is_killed_meanwhile(tmp_path: Path) -> None:
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    handle = pw.start(batch_flows.undone, str(ledger), str(gate))
    until(lambda: len(batch_flows.lines(ledger)) == 2, "the second compensation runs")
    kill(owner_of(handle))
    gate.touch()
    with pytest.raises(PermissionError, match="declined"):
        handle.result(60)
    undone = [line.split()[1] for line in batch_flows.lines(ledger)]
    assert list(dict.fromkeys(undone)) == ["third", "second", "first"]
    assert (undone.count("third"), undone.count("first")) == (1, 1)
    with pytest.raises(pw.PyWorkflowError, match="its compensations have run"):
        pw.resume(handle.run_id)


def test_failed_runs_are_rerun_with_their_arguments(tmp_path: Path, runtime: Path) -> None:
    ledger, flag = tmp_path / "ledger", tmp_path / "flag"
    flow = batch_flows.flagged.options(attributes={"test": str(tmp_path)})
    handle = pw.start(flow, str(ledger), str(flag))
    assert isinstance(handle.exception(60), ExceptionGroup)
    flag.touch()
    again = pw.rerun(handle.run_id)
    assert again.result(60) == list(range(30))
    assert again.run_id != handle.run_id
    assert again.explain().rerun_of == handle.run_id
    assert handle.status() == "failed"
    assert {h.run_id for h in pw.list_runs(attributes={"test": str(tmp_path)})} == {handle.run_id, again.run_id}
    assert len(batch_flows.lines(ledger)) == 60


def test_the_command_line_reruns_all_that_failed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyworkflow_ray.cli import run as cli_run

    ledger, flag = tmp_path / "ledger", tmp_path / "flag"
    name = f"of-{os.getpid()}"
    flow = batch_flows.flagged.options(attributes={"bulk": name})
    failed = pw.start_many(flow, [(str(ledger), str(flag))] * 3)
    assert all(isinstance(handle.exception(60), ExceptionGroup) for handle in failed)
    flag.touch()
    storage = failed[0]._storage.root
    monkeypatch.setattr(cli_run, "connected", lambda *_: _Connected())
    monkeypatch.setattr("pyworkflow_ray.cli.rerun.connected", lambda *_: _Connected())
    arguments = ["runs", "rerun", *(h.run_id for h in failed), "--rate", "50", "--storage", storage]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stderr.count(" runs anew as ") == 3
    assert len(batch_flows.lines(ledger)) == 180


class _Connected:
    """This process is connected already, and stays so."""

    def __enter__(self) -> Any:
        return pw

    def __exit__(self, *_: object) -> None: ...
