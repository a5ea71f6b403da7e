"""What a notebook and a terminal show of runs, batches and breakers: over a real storage, with no Ray."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import pyworkflow_ray as pw
from pyworkflow_ray.batch import BatchResult
from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability.live import Drawing, Told, bar, block
from pyworkflow_ray.observability.model import RunView
from pyworkflow_ray.watching import RunList, looks, view_of
from tests.cli.conftest import completed_step, payload
from tests.cli.test_reading import on_terminal

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = '<script>alert("x")</script>'


class Page(HTMLParser):
    """The text of some HTML, and the names of its tags. An unclosed tag is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def plain_of(value: Any) -> str:
    """What IPython shows where no HTML can be shown."""

    class Printer:
        shown = ""

        def text(self, text: str) -> None:
            self.shown += text

    printer = Printer()
    value._repr_pretty_(printer, False)
    return printer.shown


@pytest.fixture
def handles(shop: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunList[Any]]:
    monkeypatch.setenv("PYWORKFLOW_STORAGE", str(shop.root))
    return lambda *ids: RunList(pw.get_run(run_id) for run_id in ids)


def test_a_list_of_runs_is_a_list_and_shows_itself_as_a_table(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYWORKFLOW_STORAGE", str(shop.root))
    runs = pw.list_runs()
    assert isinstance(runs, list)
    assert [run.run_id for run in runs] == ["order-42", "order-41", "order-39", "order-40"]
    page = Page(runs._repr_html_())
    assert page.tags == {"div", "table", "thead", "tbody", "tr", "th", "td"}
    for shown in (page.text, plain_of(runs)):
        assert "RUN" in shown
        assert "⟳ retrying 4/6" in shown
        assert "CardDeclined: insufficient funds" in shown
        assert "4 runs: 1 retrying, 1 failed, 1 completed, 1 parked" in shown
    assert Page(RunList()._repr_html_()).text == "no runs"


def test_a_damaged_run_does_not_spoil_the_list_nor_its_own_view(
    shop: Any, handles: Callable[..., RunList[Any]]
) -> None:
    runs = handles("order-41", "order-40")
    shop.journal_of("order-40").write_bytes(b"nonsense\n" * 100)
    for shown in (Page(runs._repr_html_()).text, plain_of(runs)):
        assert "order-41" in shown
        assert "can't be read: order-40: " in shown
    for shown in (Page(runs[1]._repr_html_()).text, plain_of(runs[1])):
        assert "can't be shown" in shown


def test_a_handle_shows_its_three_lines_table_and_timeline(handles: Callable[..., RunList[Any]]) -> None:
    (run,) = handles("order-42")
    page = Page(run._repr_html_())
    assert "script" not in page.tags
    assert {"svg", "details", "table"} <= page.tags
    for shown in (page.text, plain_of(run)):
        assert "retrying charge, attempt 4 of 6 failed" in " ".join(shown.split())
        assert "ConnectionError: 503 from payments" in shown
        assert "runs timeline order-42" in shown
    assert repr(run) == "<run order-42>"


def batch() -> BatchResult[int]:
    failures: list[tuple[int, Exception]] = [(i, ValueError(HOSTILE)) for i in range(30)]
    return BatchResult(
        [1] * 70 + [error for _, error in failures],
        failed=[(70 + i, error) for i, error in failures],
        retried={"ConnectionError": 4},
        stopped="max_failures=29",
    )


def test_a_batch_shows_what_failed_and_how_often() -> None:
    page = Page(batch()._repr_html_())
    assert "script" not in page.tags
    for shown in (page.text, plain_of(batch())):
        assert "✗ 70 of 100 items succeeded, 30 failed (ValueError 30)" in shown
        assert "stopped early: max_failures=29" in shown
        assert "retried: ConnectionError 4" in shown
        assert HOSTILE in shown
        assert "10 more failures: .failed" in shown
    assert "✓ 2 of 2 items succeeded" in plain_of(BatchResult([1, 2]))


def test_a_breaker_shows_state_why_and_what_comes_next() -> None:
    breaker = pw.CircuitBreaker(f"views-{HOSTILE[1:7]}", failure_threshold=1, recovery_timeout="1h")

    @breaker.call
    def call() -> None:
        raise ConnectionError(HOSTILE)

    assert "is closed" in Page(breaker._repr_html_() or "").text
    with pytest.raises(ConnectionError):
        call()
    page = Page(breaker._repr_html_() or "")
    assert "script" not in page.tags
    for shown in (page.text, plain_of(breaker), plain_of(breaker.snapshot())):
        assert "is open" in shown
        assert "half-open in" in shown
        assert "failure_threshold=1" in shown
    breaker.force_open()
    assert "nothing by itself: .reset()" in plain_of(breaker)
    breaker.reset()


def test_a_breaker_without_a_name_is_shown_as_it_was() -> None:
    unnamed = [pw.CircuitBreaker()][0]
    assert unnamed._repr_html_() is None
    assert plain_of(unnamed) == repr(unnamed)


# Live -----------------------------------------------------------------------------------------------------------------


def test_a_bar_is_never_longer_than_its_room() -> None:
    assert [bar(done, total, 4) for done, total in ((0, 4), (1, 4), (4, 4), (9, 4), (0, 0))] == [
        "░░░░", "█░░░", "████", "████", "████"
    ]  # fmt: skip


def test_many_runs_are_a_bar_and_those_that_need_a_look(handles: Callable[..., RunList[Any]]) -> None:
    views = [view_of(run) for run in handles("order-42", "order-41", "order-40", "order-39")]
    ended = [view for view in views if view.ended_at is not None]
    rest = [view for view in views if view.ended_at is None]
    lines = block(rest, ended)
    assert lines[0].endswith("2 of 4 runs ended: 1 failed, 1 completed, 1 retrying, 1 parked")
    assert lines[1].startswith("order-42  ⟳ retrying 4/6  charge  ConnectionError: 503 from payments")
    assert lines[2].startswith("order-40  ⏸ parked")


def test_a_log_is_told_each_piece_of_news_once(handles: Callable[..., RunList[Any]]) -> None:
    views = [view_of(run) for run in handles("order-42", "order-40")]
    told = Told()
    first = told.news(views[:1])
    assert first == ["charge attempt 4 of 6 failed: ConnectionError: 503 from payments"]
    assert told.news(views[:1]) == []
    assert told.news(views)[0].startswith("order-40: ⏸ parked until")


class Stream(io.StringIO):
    def __init__(self, terminal: bool, encoding: str) -> None:
        super().__init__()
        self._terminal, self._encoding = terminal, encoding

    def isatty(self) -> bool:
        return self._terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


@pytest.mark.parametrize("columns", [40, 80, 160])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_terminals_block_fits_and_is_drawn_over_itself(
    handles: Callable[..., RunList[Any]], monkeypatch: pytest.MonkeyPatch, columns: int, encoding: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    views = [view_of(run) for run in handles("order-42")]
    stream = Stream(True, encoding)
    drawing = Drawing(stream)
    drawing.show(views)
    height = stream.getvalue().count("\n")
    assert all(len(line) < columns for line in stream.getvalue().splitlines())
    stream.getvalue().encode(encoding)
    drawing.show(views)
    drawing.clear()
    assert stream.getvalue().count(f"\x1b[{height}F\x1b[J") == 2
    assert stream.getvalue().endswith("\x1b[J")


def test_a_wide_character_takes_two_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "21")
    drawing = Drawing(Stream(True, "utf-8"))
    assert drawing._fitting("a" * 20) == "a" * 20
    assert drawing._fitting("工" * 20) == "工" * 9 + "…"


def test_off_a_terminal_nothing_is_drawn_over(handles: Callable[..., RunList[Any]]) -> None:
    stream = Stream(False, "ascii")
    drawing = Drawing(stream)
    drawing.show([view_of(run) for run in handles("order-42")])
    drawing.clear()
    assert stream.getvalue() == "charge attempt 4 of 6 failed: ConnectionError: 503 from payments\n"


def test_looking_ends_when_all_have_ended(handles: Callable[..., RunList[Any]]) -> None:
    runs = handles("order-39", "order-41")
    ((rest, ended),) = list(looks(runs, 60.0))
    assert rest == []
    assert [view.run_id for view in ended] == ["order-39", "order-41"]
    with pytest.raises(TimeoutError, match="1 of 1 runs have not ended in time"):
        pw.watch(handles("order-40"), timeout=0, every=60)


WATCH = "import pyworkflow_ray as pw; pw.watch(pw.get_run('order-42'), every='50ms')"


def test_a_run_is_watched_on_a_real_terminal_until_it_ends(shop: Any) -> None:
    parent, child = pty.openpty()
    watcher = subprocess.Popen(
        [sys.executable, "-c", WATCH],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYWORKFLOW_STORAGE": str(shop.root), "TERM": "xterm"},
        stdout=subprocess.PIPE, stderr=child,
    )  # fmt: skip
    os.close(child)
    seen = b""
    try:
        while b"retrying" not in seen:
            seen += os.read(parent, 65536)
        finish(shop)
        while b"completed" not in seen:
            seen += os.read(parent, 65536)
        out, _ = watcher.communicate(timeout=60)
    finally:
        watcher.kill()
        os.close(parent)
    assert (watcher.returncode, out) == (0, b"")  # nothing on stdout, which is the program's own
    assert re.search(rb"\x1b\[\d+F\x1b\[J", seen)


def finish(shop: Any) -> None:
    """Order 42 completes."""
    journal, log = shop.storage.activate("order-42", shop.lease.id)
    first = len(log)
    ends = [ev.RunActivated(epoch=journal.epoch, cause="recovery"), completed_step(0, "2")]
    ends.append(ev.RunCompleted(result=payload("done")))  # type: ignore[arg-type]
    numbered = [one.model_copy(update={"seq": first + i, "at": time.time()}) for i, one in enumerate(ends)]
    journal.append(numbered).result(timeout=10)
    journal.finish()
    journal.close()


CELLS = [
    "import pyworkflow_ray as pw\npw.list_runs()",
    "pw.get_run('order-42')",
    "pw.watch(pw.get_run('order-39'))",
    "pw.watch(pw.list_runs(status=['completed', 'failed']))",
    "await pw.get_run('order-39')",
]


@pytest.mark.slow
def test_a_real_kernel_shows_them_and_awaits_at_top_level(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYWORKFLOW_STORAGE", str(shop.root))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])  # type: ignore[no-untyped-call]
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [cell.outputs for cell in notebook.cells]
    for output, shown in zip(outputs, ("4 runs:", "order-42", "order-39", "2 of 2 runs ended"), strict=False):
        (one,) = output
        assert shown in one.data["text/plain"]
        assert shown in Page(one.data["text/html"]).text
    assert outputs[4][0].data["text/plain"] == "{'total': 1999}"


def test_views_are_the_views_of_explain(handles: Callable[..., RunList[Any]]) -> None:
    (run,) = handles("order-41")
    assert isinstance(view_of(run), RunView)
    assert view_of(run).verdict == run.explain().verdict


def screens(shop: Any) -> list[list[str]]:
    storage = ["--storage", str(shop.root)]
    return [
        ["runs", "list", *storage],
        ["runs", "show", "order-42", *storage],
        ["runs", "show", "order-41", "--step", "1", *storage],
        ["runs", "timeline", "order-42", *storage],
    ]


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_screen_fits_a_terminal_and_loses_nothing(shop: Any, columns: int, encoding: str) -> None:
    for arguments in screens(shop):
        shown = on_terminal(arguments, columns, PYTHONIOENCODING=encoding, NO_COLOR="1")
        plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
        assert all(len(line) <= columns for line in plain.splitlines()), plain
        plain.encode(encoding)
        words = " ".join(plain.split())
        assert arguments[2] in words or arguments[1] == "list"
        if arguments[1:3] == ["show", "order-42"]:
            assert "(same error 4" in words
            assert "then charge fails" in words
            assert re.search(r"runs cancel order-42$", plain.strip())  # a command is never broken


def test_off_a_terminal_no_line_is_broken(
    shop: Any, invoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = invoke(*screens(shop)[1]).stdout
    (next_,) = [line for line in shown.splitlines() if line.startswith("  next")]
    assert next_.endswith("then charge fails")
    assert "\u00a0" not in shown
