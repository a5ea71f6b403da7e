"""Every notebook runs from top to bottom in a fresh kernel, and says what its text promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def run(name: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text that each code cell showed, in order."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYWORKFLOW_STORAGE", str(directory / "storage"))
    notebook: Any = nbformat.read(NOTEBOOKS / name, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": directory}})
    client.execute()
    return ["\n".join(map(shown, cell.outputs)) for cell in notebook.cells if cell.cell_type == "code"]


def shown(output: Any) -> str:
    if output.output_type == "stream":
        return str(output.text)
    return str(output.data.get("text/plain", ""))


def test_notebooks_are_stored_without_outputs() -> None:
    found = sorted(NOTEBOOKS.glob("*.ipynb"))
    assert found
    for path in found:
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs"), f"{path.name}: clear the outputs"
            assert cell.get("execution_count") is None, f"{path.name}: clear the outputs"


@pytest.mark.ray
def test_the_first_workflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = run("01-first-workflow.ipynb", tmp_path, monkeypatch)
    everything = "\n".join(outputs)
    for promised in (
        "{'cost': 3.5, 'stock': 'tea reserved at attempt 3'}",
        "completed (2 retries)",
        "attempt 1: ConnectionError: 503 from the warehouse; next in 0.1 s",
        "attempt 2: ConnectionError: 503 from the warehouse; next in 0.2 s",
        "ValueError: we do not sell cocoa",
        "['failed', 'failed', 'failed', 'refused', 'refused'] open",
    ):
        assert promised in everything, everything
