"""Several nodes on one machine: work spreads, nodes are removed, drained, and found blind, and everything dies.

`ray.cluster_utils.Cluster` starts a GCS and a raylet a node; drivers are scripts. One cluster for the file, of three
nodes with a CPU each; a test that ends a node adds another.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from clusters import drive, environment, lines, lives, until
from many_nodes import Nodes, check, cluster_of, history

from pyworkflow_ray.engine.events import RunActivated, StepLost

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FLOWS = """
import asyncio, os, time
import pyworkflow_ray as pw
import ray

def node() -> str:
    return ray.get_runtime_context().get_node_id()

@pw.step(num_cpus=1)
def work(ledger: str, name: str, gate: str) -> str:
    with open(ledger, "a") as file:
        file.write(f"{name} {node()}\\n")
    deadline = time.monotonic() + 90
    while gate and not os.path.exists(gate) and time.monotonic() < deadline:
        time.sleep(0.01)
    return node()

@pw.workflow
async def wide(ledger: str, gate: str, count: int) -> list[str]:
    return list(await asyncio.gather(*(work(ledger, f"wide-{i}", gate) for i in range(count))))

@pw.workflow
async def long(ledger: str, name: str, gate: str) -> int:
    for i in range(4):
        await work(ledger, f"{name}.{i}", gate if i == 1 else "")
    return 4

bank = pw.CircuitBreaker("bank", failure_threshold=3, recovery_timeout=600)
sick = pw.CircuitBreaker("sick", failure_threshold=2, recovery_timeout=600, min_nodes=2)

@pw.step(breaker=bank, num_cpus=1)
def charge() -> str:
    raise ConnectionError(f"no bank from {node()}")

@pw.step(breaker=sick, num_cpus=1)
def ask(where: str) -> str:
    if node() == where:
        raise ConnectionError("this node's network is gone")
    return node()

@pw.workflow
async def charges(count: int) -> list[str]:
    async def one() -> str:
        try:
            return await charge()
        except Exception as error:
            return type(error).__name__
    first = [await one() for _ in range(3)]
    return first + list(await asyncio.gather(*(one() for _ in range(count))))

@pw.workflow
async def asks(nodes: list[str]) -> list[list[str]]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    async def one(where: str) -> str:
        try:
            return await ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(where, soft=False))(nodes[0])
        except Exception as error:
            return type(error).__name__
    return [[await one(where) for _ in range(3)] for where in nodes]

@pw.step(num_cpus=0.5, max_recoveries=2)
def fragile(ledger: str) -> str:
    here = node()
    with open(ledger, "a") as file:
        file.write(f"{here}\\n")
    with open(ledger) as file:
        if len(file.readlines()) == 1:
            os._exit(1)
    return here

@pw.workflow
async def falls(ledger: str) -> str:
    return await fragile(ledger)
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("code")
    (folder / "flows_of_nodes.py").write_text(FLOWS)
    with cluster_of(3) as (cluster, temp):
        yield Nodes(cluster, folder, temp)


START = """
import pyworkflow_ray as pw, flows_of_nodes as flows
for name in {names!r}:
    pw.start(flows.long.options(run_id=name), {ledger!r}, name, {gate!r})
"""
FINISH = """
import pyworkflow_ray as pw
for name in {names!r}:
    assert pw.get_run(name).result(100) == 4
"""


def test_steps_spread_and_breakers_are_shared(nodes: Nodes, tmp_path: Path) -> None:
    gate, ledger, storage = tmp_path / "gate", tmp_path / "ledger", tmp_path / "storage"
    source = f"""
import json, time, os
from pathlib import Path
import pyworkflow_ray as pw, flows_of_nodes as flows
handle = pw.start(flows.wide, {str(ledger)!r}, {str(gate)!r}, 3)
while not os.path.exists({str(ledger)!r}) or len(Path({str(ledger)!r}).read_text().splitlines()) < 3:
    time.sleep(0.05)
Path({str(gate)!r}).touch()
where = handle.result(60)
charges = pw.run(flows.charges, 6)
asks = pw.run(flows.asks, sorted(set(where)))
print(json.dumps([where, charges, asks, pw.CircuitBreaker("bank", failure_threshold=3, recovery_timeout=600).state]))
"""
    where, charges, asks, state = json.loads(nodes.drive(source, storage).splitlines()[-1])
    assert len(set(where)) == 3  # a CPU each, so a step each
    assert charges == ["ConnectionError"] * 3 + ["CircuitOpenError"] * 6  # on whichever node they run
    assert state == "open"
    ill, *healthy = asks
    assert ill == ["ConnectionError", "ConnectionError", "CircuitOpenError"]  # the sick node is cut off, alone
    assert healthy == [[node] * 3 for node in sorted(set(where))[1:]]


def test_a_step_that_lost_its_worker_prefers_another_node(nodes: Nodes, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    source = f"""
import pyworkflow_ray as pw, flows_of_nodes as flows
print(pw.run(flows.falls, {str(ledger)!r}))
"""
    result = nodes.drive(source, tmp_path / "storage").splitlines()[-1]
    first, second = lines(ledger)
    assert result == second != first


def test_a_node_is_removed_under_load(nodes: Nodes, tmp_path: Path) -> None:
    gate, ledger, storage = tmp_path / "gate", tmp_path / "ledger", tmp_path / "storage"
    names = [f"run-{number}" for number in range(6)]
    nodes.drive(START.format(names=names, ledger=str(ledger), gate=str(gate)), storage)
    until(lambda: sum(".1 " in line for line in lines(ledger)) >= 3, "every CPU executes a step")
    doomed = nodes.cluster.list_all_nodes()[-1]
    assert any(doomed.node_id in line for line in lines(ledger)), "the node that goes executes something"
    before = len(lines(ledger))
    nodes.cluster.remove_node(doomed, allow_graceful=False)
    nodes.cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    gone = time.monotonic()
    until(lambda: len(lines(ledger)) > before, "the work of the lost node is taken up")
    took = time.monotonic() - gone
    gate.touch()
    nodes.drive(FINISH.format(names=names), storage)
    for name in names:
        check(storage, name, 4)
    lost = [event for name in names for event in history(storage, name) if isinstance(event, StepLost)]
    again = [
        e for name in names for e in history(storage, name) if isinstance(e, RunActivated) and e.cause == "recovery"
    ]
    assert lost or again, "the node's loss was noticed"
    assert not any(event.charged for event in again), "a run is not charged for a node"
    print(f"taken up {took:.1f} s after the node's end")


def test_a_drained_node_charges_nobody(nodes: Nodes, tmp_path: Path) -> None:
    gate, ledger, storage = tmp_path / "gate", tmp_path / "ledger", tmp_path / "storage"
    names = [f"run-{number}" for number in range(3)]
    nodes.drive(START.format(names=names, ledger=str(ledger), gate=str(gate)), storage)
    until(lambda: sum(".1 " in line for line in lines(ledger)) >= 3, "every CPU executes a step")
    doomed = nodes.cluster.list_all_nodes()[-1]
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    subprocess.run(
        [ray, "drain-node", "--address", nodes.address, "--node-id", doomed.node_id, "--reason",
         "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "2"],
        env=environment(), check=True, timeout=60, capture_output=True,
    )  # fmt: skip
    ends_at = time.monotonic() + 2
    until(lambda: time.monotonic() > ends_at, "its time is up")  # Ray ends a drained node once it is idle: it is not,
    nodes.cluster.remove_node(doomed, allow_graceful=False)  # and whoever preempts it does not wait
    nodes.cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    gate.touch()
    nodes.drive(FINISH.format(names=names), storage)
    for name in names:
        check(storage, name, 4)
    struck = [
        event
        for name in names
        for event in history(storage, name)
        if isinstance(event, StepLost) or (isinstance(event, RunActivated) and event.cause == "recovery")
    ]
    assert struck, "the node's end was noticed"
    charged = [event for event in struck if event.charged]
    assert not charged, charged


BLIND = "import pyworkflow_ray as pw; pw.init()"


def test_storage_that_one_node_has_alone_is_refused(nodes: Nodes, tmp_path: Path) -> None:
    """The node's own file system hides the directory, as a local disk of its own would."""
    hidden = tmp_path / "local"
    hidden.mkdir()
    temp = tempfile.mkdtemp(prefix="pwr", dir="/tmp")
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    join = f"{ray} start --address={nodes.address} --block --num-cpus=1 --temp-dir={temp}"
    script = f"mount -t tmpfs none {hidden} && exec {join}"
    process = subprocess.Popen(
        ["unshare", "--mount", "--map-root-user", "--user", "sh", "-c", script] if os.getuid() else
        ["unshare", "--mount", "sh", "-c", script],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        until(lambda: alive(nodes) == 4, "the node has joined")
        with pytest.raises(AssertionError) as refused:
            nodes.drive(BLIND, hidden / "storage")
        text = str(refused.value)
        assert "is not shared by all nodes of the cluster: node " in text
        assert str(hidden / "storage") in text
        assert "has no such directory" in text
        nodes.drive(BLIND, tmp_path / "shared")  # what all of them see is taken
    finally:
        kill_node(process)
        until(lambda: alive(nodes) == 3, "the node has left")
        shutil.rmtree(temp, ignore_errors=True)


def kill_node(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL of `ray start --block` and all that it started: a power cut of its machine."""
    below = psutil.Process(process.pid).children(recursive=True)
    for one in (process.pid, *(child.pid for child in below)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    process.wait()
    until(lambda: not any(lives(child.pid) for child in below), "the node's processes are gone")


def alive(nodes: Nodes) -> int:
    source = (
        "import ray; ray.init(logging_level='ERROR', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    )
    folder = Path(tempfile.mkdtemp())
    try:
        return int(drive(folder, source, address=nodes.address, storage=folder / "none").splitlines()[-1])
    finally:
        shutil.rmtree(folder)
