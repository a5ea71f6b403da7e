"""A cluster of several nodes on this machine, by `ray.cluster_utils.Cluster`, and what its runs leave in the log."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clusters import QUIET, ROOT, drive

from pyworkflow_ray.engine.events import TERMINAL, StepCompleted
from pyworkflow_ray.storage.storage import Storage


class Nodes:
    """The cluster, with a folder of the workflows, for drivers."""

    def __init__(self, cluster: Any, folder: Path, temp: str) -> None:
        self.cluster, self.folder, self.temp = cluster, folder, temp
        self.address = str(cluster.address)

    def drive(self, source: str, storage: Path, **more: Any) -> str:
        folder = Path(tempfile.mkdtemp(prefix="driver-", dir=self.folder))
        settings = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(self.folder)))}
        return drive(folder, source, address=self.address, storage=storage, more=settings, **more)


@contextlib.contextmanager
def cluster_of(count: int, **settings: Any) -> Iterator[tuple[Any, str]]:
    """So many nodes of one CPU each, and their directory. settings: Ray's own, of the head."""
    before = dict(os.environ)
    os.environ.update(QUIET, PYTHONPATH=str(ROOT))
    from ray.cluster_utils import Cluster

    temp = tempfile.mkdtemp(prefix="pwr", dir="/tmp")
    system = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 1000,
        "health_check_failure_threshold": 5,
        **settings,
    }
    arguments = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False, "_system_config": system}
    cluster = Cluster(initialize_head=True, head_node_args={**arguments, "temp_dir": temp})
    try:
        for _ in range(count - 1):
            cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
        yield cluster, temp
    finally:
        cluster.shutdown()
        shutil.rmtree(temp, ignore_errors=True)
        os.environ.clear()
        os.environ.update(before)


def history(storage: Path, run_id: str) -> list[Any]:
    return list(Storage.open(storage).read_run(run_id).events)


def check(storage: Path, run_id: str, steps: int) -> None:
    events = history(storage, run_id)
    assert [event.seq for event in events] == list(range(len(events)))
    assert sum(isinstance(event, TERMINAL) for event in events) == 1
    done = Counter(event.position for event in events if isinstance(event, StepCompleted))
    assert sorted(done.values()) == [1] * steps
