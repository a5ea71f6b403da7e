"""The command line changes runs of a living cluster: each command is a process of its own, as a person starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flows
import pytest
import ray
from processes import until

import pyworkflow_ray as pw

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("runtime")]
HERE = Path(__file__).resolve().parent
PATIENCE_S = 120

Command = subprocess.Popen[str]


class Terminal:
    """Starts commands on the cluster and the storage of this process."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.begun: list[Command] = []

    def begin(self, *args: str) -> Command:
        address = ray.get_runtime_context().gcs_address
        environment = {**os.environ, "RAY_ADDRESS": address, "PYWORKFLOW_STORAGE": str(self.storage), "NO_COLOR": "1"}
        command = subprocess.Popen(
            [sys.executable, "-m", "pyworkflow_ray", *args],
            cwd=HERE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.begun.append(command)
        return command


@pytest.fixture
def terminal(runtime: Path) -> Iterator[Terminal]:
    terminal = Terminal(runtime)
    yield terminal
    for command in terminal.begun:
        command.kill()
        command.communicate()


def ended(command: Command, code: int) -> dict[str, Any]:
    out, err = command.communicate(timeout=PATIENCE_S)
    assert command.returncode == code, err
    shown: dict[str, Any] = json.loads(out)
    return shown


def test_runs_are_cancelled_woken_and_resumed_from_the_command_line(terminal: Terminal, tmp_path: Path) -> None:
    flag, late, ledger = tmp_path / "flag", tmp_path / "late", tmp_path / "ledger"
    failed = pw.start(flows.flagged, str(flag), False)
    parked = pw.start(flows.flagged, str(late), True)
    running = pw.start(flows.cancellable, str(ledger))
    with pytest.raises(ValueError, match="no flag"):
        failed.result(60)
    until(lambda: parked.status() == "parked", "it is parked")
    until(lambda: flows.lines(ledger), "it runs")
    flag.touch()
    late.touch()
    resume = terminal.begin("runs", "resume", failed.run_id, "--json")
    wake = terminal.begin("runs", "wake", parked.run_id, "--json")
    cancel = terminal.begin("runs", "cancel", running.run_id, "--reason", "a person said so", "--json")
    assert ended(resume, 0)["status"] == "completed"
    assert ended(wake, 0)["status"] == "completed"
    assert ended(cancel, 0)["status"] == "cancelled"
    assert (failed.result(0), parked.result(0)) == ("ok", "ok")
    with pytest.raises(pw.RunCancelledError, match="a person said so"):
        running.result(0)
    assert "cleaned" in flows.lines(ledger)  # the cancelled step may say its last word after it


def test_run_and_recover_from_the_command_line(terminal: Terminal) -> None:
    run = terminal.begin("run", "flows:three", "--input", '{"x": 5}', "--json")
    recover = terminal.begin("recover", "--json")  # nothing that lives is taken
    shown = ended(run, 0)
    assert (shown["status"], pw.get_run(shown["run_id"]).result(0)) == ("completed", 11)
    out, err = recover.communicate(timeout=PATIENCE_S)
    assert (recover.returncode, json.loads(out)) == (0, []), err
