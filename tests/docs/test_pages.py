"""Every python block of these pages is a test file of its own, run by pytest as a reader would run it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyworkflow_ray.breaker import CircuitBreaker
from pyworkflow_ray.observability.measures import INSTRUMENTS
from pyworkflow_ray.resilience.breaker_table import diagram, table_text

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


OF_THEIR_OWN = {"patterns.md", "mistakes.md", "tutorial.md"}  # run by the test file of that name
PAGES = sorted(
    path.name for path in DOCS.glob("*.md") if path.name not in OF_THEIR_OWN and "```python" in path.read_text("utf-8")
)
# To start pytest costs more than the blocks of a page: those that don't mind each other share one.
TOGETHER = ["failure-modes.md", "guarantees.md", "index.md", "migration.md", "object-stores.md"]


@pytest.mark.parametrize("pages", [TOGETHER, *([page] for page in PAGES if page not in TOGETHER)], ids=" ".join)
def test_the_blocks_of_the_page_do_what_it_says(pages: list[str], tmp_path: Path) -> None:
    for page in pages:
        blocks = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
        assert blocks
        for number, block in enumerate(blocks):
            assert "def test_" in block, f"block {number} of {page} shows nothing that is checked"
            name = page.removesuffix(".md").replace("-", "_")
            (tmp_path / f"test_{name}_{number}.py").write_text(block, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_diagram_and_the_table_of_the_breaker_are_those_that_run() -> None:
    page = (DOCS / "breakers.md").read_text(encoding="utf-8")
    assert f"```mermaid\n{diagram()}```\n" in page, f"docs/breakers.md is to hold exactly:\n{diagram()}"
    assert f"\n\n{table_text()}\n" in page, f"docs/breakers.md is to hold exactly:\n{table_text()}"


def test_every_option_of_the_breaker_is_documented() -> None:
    page = (DOCS / "breakers.md").read_text(encoding="utf-8")
    options = [
        name for name in inspect.signature(CircuitBreaker.__init__).parameters if name not in ("self", "options")
    ]
    assert [name for name in options if f"`{name}`" not in page] == []


def test_every_metric_is_documented() -> None:
    page = (DOCS / "observability.md").read_text(encoding="utf-8")
    assert [
        name for name, one in INSTRUMENTS.items() if f"| `{name}` | {one.kind} | {one.unit} | {one.text} |" not in page
    ] == []
