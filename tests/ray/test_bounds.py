"""What bounds the work that waits: max_pending refuses clearly; a SIGTERM drains; shutdown leaves a cluster alone."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import flows
import pytest
import ray
from processes import descendants, end_all, lives, until
from test_two_owners import Launch, answer, launch

import pyworkflow_ray as pw
from pyworkflow_ray.engine.events import RunActivated
from pyworkflow_ray.storage.storage import Storage

__all__ = ["launch"]
pytestmark = pytest.mark.ray


@pytest.fixture
def bounded(runtime: Path, tmp_path: Path) -> Iterator[Path]:
    """A storage of the test's own: one run actor, and two runs may wait for it."""
    pw.shutdown()
    pw.init(storage=tmp_path / "bounded", pool_min=1, pool_max=1, max_pending=2)
    yield tmp_path / "bounded"
    pw.shutdown()
    pw.init(storage=runtime, pool_min=2)


def test_more_than_max_pending_is_refused_and_nothing_is_written(bounded: Path, tmp_path: Path) -> None:
    gate, ledger = tmp_path / "gate", tmp_path / "ledger"
    first = pw.start(flows.ten, str(ledger), str(gate), 0)
    until(lambda: flows.lines(ledger), "the first run holds the only run actor")
    waiting = [pw.start(flows.three.options(run_id=f"waits-{i}"), i) for i in range(2)]
    with pytest.raises(pw.TooManyRunsError, match=r"1 run is not started: 2 wait .* max_pending is 2") as refused:
        pw.start(flows.three.options(run_id="refused"), 1)
    assert (refused.value.pending, refused.value.limit) == (2, 2)
    with pytest.raises(pw.RunNotFoundError):
        pw.get_run("refused")
    assert pw.start(flows.three.options(run_id="waits-0"), 0) == waiting[0]  # it exists: nothing more would wait
    gate.touch()
    assert first.result(60) == 45
    assert [handle.result(60) for handle in waiting] == [1, 3]
    assert pw.run(flows.three.options(run_id="refused"), 1) == 3
    assert Storage.open(bounded).unfinished() == []
    assert ray.is_initialized()
    pw.shutdown()
    assert ray.is_initialized()  # this process's Ray was not started by us


@pytest.mark.slow
def test_a_sigterm_drains_and_the_rest_is_recovered(launch: Launch, runtime: Path, tmp_path: Path) -> None:
    """What a scheduler sends before it kills: the running step ends and is recorded, nothing more is begun."""
    storage, ledger = tmp_path / "drained", tmp_path / "ledger"
    owner: subprocess.Popen[str] = launch("drained_script.py", storage, str(ledger))
    assert answer(owner) == "started"
    until(lambda: len(flows.lines(ledger)) == 3, "the third step runs")
    below = descendants(root=owner.pid)
    owner.send_signal(signal.SIGTERM)
    assert owner.wait(60) != 0
    until(lambda: not any(map(lives, below)), "its Ray has ended by itself")
    end_all(below)
    assert len(flows.lines(ledger)) < 60
    pw.shutdown()
    pw.init(storage=storage)
    try:
        (handle,) = pw.recover()
        assert handle.result(90) == 60
        assert flows.lines(ledger) == [str(i) for i in range(60)], "a step was cut off and executed again"
        assert [e.cause for e in handle.events() if isinstance(e, RunActivated)] == ["start", "recovery"]
    finally:
        pw.shutdown()
        pw.init(storage=runtime, pool_min=2)
