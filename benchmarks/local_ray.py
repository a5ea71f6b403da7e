"""The Ray that the benchmarks measure on: this machine's, alone in a temp dir, and quiet."""

from __future__ import annotations

import os
import tempfile


def start_ray() -> None:
    """Start it. Its directory's path is short: that of a socket in it has 107 characters."""
    import ray

    ray.init(
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=tempfile.mkdtemp(prefix="ray-", dir="/tmp"),
    )
