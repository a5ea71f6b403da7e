"""One local Ray for the tests of this directory, in a temp dir of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest


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
    ray.shutdown()
    shutil.rmtree(temp, ignore_errors=True)
