"""Every notebook runs from top to bottom in a fresh kernel, and says what its text promises."""

from __future__ import annotations

import re
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
    monkeypatch.setenv("MPLCONFIGDIR", str(directory / "matplotlib"))
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


@pytest.mark.slow
def test_retries_and_breakers_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = run("02-retries-and-breakers.ipynb", tmp_path, monkeypatch)
    everything = "\n".join(outputs)
    assert "fixed, 20 s                 0 20 40 60 80 100 120 140 160 180" in everything
    assert "doubling up to a minute     0 1 3 7 15 31 63 123 183 243" in everything
    crowds = {kind: int(most) for kind, most in re.findall(r"(none|auto|full) +400 .* at most (\d+)", everything)}
    assert crowds["none"] > 80  # nearly all come back as one
    assert max(crowds["auto"], crowds["full"]) < 50
    alone, guarded = (int(calls) for calls in re.findall(r": (\d+) calls reached the dead service", everything))
    assert alone > 300
    assert guarded < 20
    assert "payments-api is open" in everything


@pytest.mark.ray
@pytest.mark.slow
def test_crash_and_recovery_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = run("03-crash-and-recovery.ipynb", tmp_path, monkeypatch)
    everything = "\n".join(outputs)
    for promised in (
        "completed (",
        "['1 done', '2 done', '3 done', '4 done', '5 done']",
        "steps 1 and 2 were executed [1, 1] times",
        "step_lost worker_died",
        "run_activated recovery",
        "✓ ok: 8 checks",
        "'slept through it all'",
    ):
        assert promised in everything, everything


@pytest.mark.ray
@pytest.mark.slow
def test_sql_over_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = run("04-sql-over-events.ipynb", tmp_path, monkeypatch)
    everything = "\n".join(outputs)
    for promised in (
        "30 of 30 runs ended: ",
        "completed │    27",
        "failed    │     3",
        "PermissionError",
        "[(1, 9), (2, 9), (3, 9)]",
        "failed in charge",
    ):
        assert promised in everything, everything


@pytest.mark.ray
@pytest.mark.slow
def test_ray_data_and_a_training_that_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = run("05-ray-data-and-training.ipynb", tmp_path, monkeypatch)
    everything = "\n".join(outputs)
    [seen] = re.findall(r"loss after each epoch: \[([^\]]*)\]", everything)
    losses = [float(one) for one in seen.split(", ")]
    assert len(losses) == 6
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]
    for promised in ("'completed (1 retry)'", "4 of 5 items succeeded, 1 failed (ValueError 1)", "{'ValueError': 1}"):
        assert promised in everything, everything
