"""The code of docs/patterns.md does what the page says."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from pyworkflow_ray.testing import WorkflowEnv

PAGE = Path(__file__).resolve().parents[2] / "docs" / "patterns.md"


@pytest.fixture(scope="module")
def page() -> types.ModuleType:
    module = types.ModuleType("patterns_page")
    sys.modules[module.__name__] = module
    code = "\n\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return module


async def test_every_workflow_of_the_page_ends_as_it_says(page: types.ModuleType) -> None:
    async with WorkflowEnv() as env:
        assert await env.run(page.price, "book") == 1999
        with pytest.raises(PermissionError, match="card declined"):
            await env.run(page.trip, 100)
        assert await env.run(page.gallery, 200) == "196 made, {'ValueError': 4}"


async def test_the_undone_trip_is_the_same_after_a_crash_at_every_event(page: types.ModuleType) -> None:
    async with WorkflowEnv() as env:
        with pytest.raises(PermissionError):
            await env.crash_everywhere(page.trip, 100)
