"""What a person sees of the demo: progress on stderr, table and proof on stdout. Called by `main`; calls rich.

Off a terminal: no bar but a line now and then, no colours, nothing cut, ASCII only.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pyworkflow_ray.demo.report import ROLES, Report


class Meter:
    """How far the demo is: a bar on a terminal, a line each tenth elsewhere, nothing where `console` is None."""

    def __init__(self, console: Console | None, total: int, bar: Progress | None) -> None:
        self._console = console
        self._total = total
        self._bar = bar
        self._task = bar.add_task("orders", total=total) if bar is not None else None
        self._step = max(1, total // 10)

    def advance(self, done: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)
        elif self._console is not None and (done % self._step == 0 or done == self._total):
            self._console.print(f"{done} of {self._total} orders done", highlight=False)

    def note(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, style="yellow", highlight=False)


class Screen:
    """stdout for the result, stderr for what happens meanwhile. `quiet`: a machine reads, nothing is said meanwhile."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = None if quiet else Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        if self._err is not None:
            self._err.print(text, style="dim")

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Meter]:
        if self._err is None or not sys.stderr.isatty():
            yield Meter(self._err, total, None)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._err, transient=True) as bar:
            yield Meter(self._err, total, bar)

    def show(self, result: Report, storage: Path) -> None:
        """The table, the proof, and the commands that go on from here."""
        figures = result.figures()
        names = ["orders", "completed", "failed", "retries", "recoveries", "kills", "requests", "charges", "seconds"]
        self._table([[name.upper() for name in names], [str(figures[name]) for name in names]])
        reasons = Counter(result.tally.failed.values()).most_common()
        self._line("failed", ", ".join(f"{count} {reason}" for reason, count in reasons) or "none")
        self._line("killed", ", ".join(f"{result.kills[role]} {role}" for role in ROLES) + " (SIGKILL, each proven)")
        proof = result.proof
        self._line("ledger", f"{proof.charges} charges for {figures['completed']} completed orders")
        self._line("", f"{proof.requests} requests, {proof.repeated} of them repeated with the same idempotency key")
        twice, lost = len(proof.charged_twice), result.lost
        good = result.proven
        self._line(
            "proof", f"charged twice: {twice}, lost: {lost}, charged though rejected: {len(proof.overcharged)}", good
        )
        for fault in result.faults():
            self._line("", fault, good=False)
        if result.example is not None:
            self._out.print()
            command = f"PYWORKFLOW_STORAGE={storage} pyworkflow-ray"
            self._line("look", f"{command} runs timeline {result.example}")
            self._line("", f"{command} runs list --limit 20")

    def _line(self, label: str, text: str, good: bool | None = None) -> None:
        style = None if good is None else "bold green" if good else "bold red"
        self._out.print(f"{label:<8} {text}", style=style, markup=False)

    def _table(self, rows: list[list[str]]) -> None:
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for number, row in enumerate(rows):
            text = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            self._out.print(text, style="bold" if number else "dim", markup=False)
        self._out.print()
