"""What all tests share. Ray is started by tests/ray/conftest.py only; nothing here imports it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# Worker processes write bytecode too: each Ray process starts twice as fast with it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A storage of the person who runs the tests is none of our business, and neither is their cluster.
for name in ("PYWORKFLOW_STORAGE", "RAY_ADDRESS"):
    os.environ.pop(name, None)

# A failure prints its blob (`@reproduce_failure`) and no deadline judges the speed of the machine.
# `make test` asks the same questions every time, so that a failure belongs to the change at hand; `make test-all` asks
# new ones and more of them.
settings.register_profile("same", deadline=None, print_blob=True, derandomize=True)
settings.register_profile("search", deadline=None, print_blob=True, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with Ray last: a process that has met a cluster shares its breakers and budgets."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)
