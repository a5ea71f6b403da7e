"""The pytest plugin: the fixture `workflow_env`. Found by pytest through the entry point `pytest11`.

It is imported by every pytest run where this package is installed, so it imports nothing of it before a test asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyworkflow_ray.testing.environment import WorkflowEnv


@pytest.fixture
def workflow_env() -> Iterator[WorkflowEnv]:
    """A `WorkflowEnv`, entered: `await workflow_env.run(flow, ...)`, in a sync test `workflow_env.run_sync(...)`."""
    from pyworkflow_ray.testing.environment import WorkflowEnv

    with WorkflowEnv() as env:
        yield env
