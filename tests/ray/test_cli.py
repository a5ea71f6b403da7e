"""The command line changes runs of a living cluster: each command is a process of its own, as a person starts it."""

from __future__ import annotations

import json
import os
import pty
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


@pytest.mark.slow
def test_run_shows_what_it_is_at_on_a_terminal_and_news_in_a_log(terminal: Terminal, tmp_path: Path) -> None:
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    given = json.dumps({"ledger": str(ledger), "gate": str(gate), "gated": 2})
    parent, child = pty.openpty()
    address = ray.get_runtime_context().gcs_address
    run = subprocess.Popen(
        [sys.executable, "-m", "pyworkflow_ray", "run", "flows:ten", "--input", given],
        cwd=HERE,
        env={**os.environ, "RAY_ADDRESS": address, "PYWORKFLOW_STORAGE": str(terminal.storage), "TERM": "xterm"},
        stdout=subprocess.PIPE, stderr=child,
    )  # fmt: skip
    os.close(child)
    terminal.begun.append(run)  # type: ignore[arg-type]
    seen = b""
    while b"running numbered" not in seen or b"steps 2 of 3" not in seen:
        seen += os.read(parent, 65536)
    gate.touch()
    out, _ = run.communicate(timeout=PATIENCE_S)
    os.close(parent)
    assert (run.returncode, out) == (0, b"45\n")  # the result alone
    assert b"\x1b[J" in seen  # drawn over, and over again


@pytest.mark.slow
def test_a_log_is_told_of_a_failed_attempt_and_of_parking(terminal: Terminal, tmp_path: Path) -> None:
    run = terminal.begin("run", "flows:flagged", "--input", json.dumps({"flag": str(tmp_path / "flag"), "far": True}))
    assert run.stderr is not None
    lines = [run.stderr.readline()]
    while not any("parked until" in line for line in lines):
        lines.append(run.stderr.readline())
    assert any("retries_far attempt 1 of 2 failed: ConnectionError: no flag" in line for line in lines)
    assert not any("\x1b" in line for line in lines)
