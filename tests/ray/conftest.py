"""One local Ray for the tests of this directory, in a temp dir of its own."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))  # flows.py: run actors and steps import it by the driver's import roots


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of two CPUs that this test session started; other sessions and users' clusters are out of its sight."""
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0")
    import ray

    temp = tempfile.mkdtemp(prefix="pwr", dir="/tmp")  # short: a socket's path has 107 characters
    ray.init(
        num_cpus=2,
        _temp_dir=temp,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
        logging_level="ERROR",
        namespace="tests",
    )
    yield
    import pyworkflow_ray as pw

    pw.shutdown()
    ray.shutdown()
    shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture(scope="session")
def runtime(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This process connected to that Ray, with a storage of its own, whose path it is."""
    import pyworkflow_ray as pw

    storage = tmp_path_factory.mktemp("storage") / "runs"
    pw.init(storage=storage, pool_min=2)
    return storage
