"""Texts of failures: what is kept of a stack gives the same text as Python's own, whatever came before."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.storage.failure_text import MAX_FRAMES, traceback_of


def caught(call: Callable[[], Any]) -> BaseException:
    """What `call` raises, its traceback without the frame here."""
    try:
        call()
    except BaseException as error:
        trace = error.__traceback__
        return error.with_traceback(None if trace is None else trace.tb_next)
    raise AssertionError("it raised nothing")


def refuse(order: int) -> None:
    raise ConnectionError(f"503 from payments, order {order}")


def twice(order: int) -> None:
    if order % 2: refuse(order)  # fmt: skip # noqa: E701
    refuse(order + 1); refuse(order)  # fmt: skip # noqa: E702


def deep(levels: int) -> None:
    if levels == 0:
        raise RecursionError("too deep")
    deep(levels - 1)


def chained() -> None:
    try:
        refuse(1)
    except ConnectionError as error:
        raise TimeoutError("no answer") from error


def noted() -> None:
    error = ConnectionError("refused")
    error.add_note("at the second try")
    raise error


def mistyped() -> None:
    print(undefned)  # type: ignore[name-defined] # noqa: F821


def undefined_attribute() -> None:
    [].apend(1)  # type: ignore[attr-defined]


def group() -> None:
    raise ExceptionGroup("all failed", [ConnectionError("a"), TimeoutError("b")])


def syntax() -> None:
    compile("a b", "somewhere.py", "exec")


CALLS: list[Callable[[], Any]] = [
    lambda: refuse(1),
    lambda: refuse(2),
    lambda: twice(1),
    lambda: twice(2),
    lambda: deep(3),
    lambda: deep(2 * MAX_FRAMES),
    chained,
    noted,
    mistyped,
    undefined_attribute,
    group,
    syntax,
    lambda: {}["a"],
]


@pytest.mark.parametrize("call", CALLS)
def test_it_is_pythons_own_text_the_first_time_and_again(call: Callable[[], Any]) -> None:
    for _ in range(3):
        error = caught(call)
        expected = "".join(traceback.format_exception(type(error), error, error.__traceback__, limit=-MAX_FRAMES))
        assert traceback_of(error) == expected


def test_equal_code_in_two_files_is_told_apart(tmp_path: Path) -> None:
    texts = []
    for name in ("one", "two"):
        file = tmp_path / f"{name}.py"
        file.write_text("def fail():\n    raise ConnectionError('refused')\n")
        space: dict[str, Any] = {}
        exec(compile(file.read_text(), str(file), "exec"), space)
        texts.append(traceback_of(caught(space["fail"])))
    assert "one.py" in texts[0]
    assert "two.py" in texts[1]


def test_without_a_traceback_there_is_the_error_alone() -> None:
    assert traceback_of(ConnectionError("refused")) == "ConnectionError: refused\n"
    assert sys.exc_info() == (None, None, None)
