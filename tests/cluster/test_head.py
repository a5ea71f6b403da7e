"""The head of a cluster of several nodes is lost: its runs go on in another cluster on the same storage."""

from __future__ import annotations

from pathlib import Path

import pytest
from clusters import lines, lives, until
from many_nodes import Nodes, check, cluster_of, history

from pyworkflow_ray.engine.events import RunActivated

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FLOWS = """
import os, time
import pyworkflow_ray as pw

@pw.step(num_cpus=1)
def work(ledger: str, name: str, gate: str) -> str:
    with open(ledger, "a") as file:
        file.write(f"{name}\\n")
    while gate and not os.path.exists(gate):
        time.sleep(0.01)
    return name

@pw.workflow
async def long(ledger: str, name: str, gate: str) -> int:
    for i in range(3):
        await work(ledger, f"{name}.{i}", gate if i == 1 else "")
    return 3
"""
START = """
import pyworkflow_ray as pw, flows_of_head as flows
for name in {names!r}:
    pw.start(flows.long.options(run_id=name), {ledger!r}, name, {gate!r})
"""
RECOVER = """
import time
import pyworkflow_ray as pw
pw.init()
deadline = time.monotonic() + 300
left = set({names!r})
while left and time.monotonic() < deadline:  # a node of the lost cluster may hold its runs for a while yet
    pw.recover()
    left = {{name for name in left if not pw.get_run(name).done()}}
assert not left, left
"""


def test_the_head_is_killed_and_another_cluster_goes_on(tmp_path: Path) -> None:
    gate, ledger, storage, code = (tmp_path / name for name in ("gate", "ledger", "storage", "code"))
    code.mkdir()
    (code / "flows_of_head.py").write_text(FLOWS)
    names = ["run-0", "run-1", "run-2"]
    with cluster_of(2, gcs_rpc_server_reconnect_timeout_s=5) as (cluster, temp):
        Nodes(cluster, code, temp).drive(START.format(names=names, ledger=str(ledger), gate=str(gate)), storage)
        until(lambda: sum(".1" in line for line in lines(ledger)) >= 2, "every CPU executes a step")
        head = cluster.head_node
        pids = [process.process.pid for kind in head.all_processes.values() for process in kind]
        head.kill_all_processes(check_alive=False, allow_graceful=False)
        until(lambda: not any(map(lives, pids)), "the head is gone")
        with cluster_of(2) as (another, temp_of_another):
            gate.touch()
            Nodes(another, code, temp_of_another).drive(RECOVER.format(names=names), storage, timeout=330)
    for name in names:
        check(storage, name, 3)
    taken = [event for name in names for event in history(storage, name) if isinstance(event, RunActivated)]
    assert any(event.cause == "recovery" for event in taken), "no run was taken over"
