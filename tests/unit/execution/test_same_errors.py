"""Errors that say nothing new are encoded once, and whatever differs is encoded anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.execution.same_errors import encoded_once
from tests.unit.execution.calls import CODEC


class Plain(Exception):
    pass


class Counting(Exception):
    def __str__(self) -> str:
        return f"text {next(TEXTS)}"


class Slotted(Exception):
    __slots__ = ("code",)


TEXTS = iter(range(1_000))


def infos(*errors: BaseException) -> list[Any]:
    found = []
    for error in errors:
        try:
            raise error
        except BaseException as caught:
            caught.__context__ = None
            found.append(encoded_once(caught, "transient", CODEC, CODEC.encode_error))
    return found


def same(one: BaseException, other: BaseException) -> bool:
    first, second = infos(one, other)
    assert first == CODEC.encode_error(one, "transient").model_copy(update={"traceback": first.traceback})
    return first is second


@pytest.mark.parametrize("make", [Plain, ConnectionError, lambda *a: OSError(5, *a), lambda *a: KeyError(*a, 1, None)])
def test_an_equal_error_of_the_same_place_is_encoded_once(make: Any) -> None:
    assert same(make("refused"), make("refused"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Plain("a"), Plain("b")),
        (Plain(1), Plain(True)),
        (Plain(1), Plain(1.0)),
        (Plain("a"), ConnectionError("a")),
        (OSError(2, "x", "file-1"), OSError(2, "x", "file-2")),
        (Plain([1]), Plain([1])),
        (Counting(), Counting()),
        (Slotted(), Slotted()),
        (ModuleNotFoundError("x", name="a"), ModuleNotFoundError("x", name="b")),
        (ExceptionGroup("g", [Plain("a")]), ExceptionGroup("g", [Plain("b")])),
    ],
    ids=repr,
)
def test_what_may_differ_is_encoded_anew(one: BaseException, other: BaseException) -> None:
    first, second = infos(one, other)
    assert first is not second


def test_causes_contexts_notes_and_attributes_are_not_lost() -> None:
    plain = Plain("a")
    noted, caused, carrying = Plain("a"), Plain("a"), Plain("a")
    noted.add_note("a note")
    caused.__cause__ = KeyError("k")
    carrying.code = 7  # type: ignore[attr-defined]
    assert len({id(info) for info in infos(plain, noted, caused, carrying)}) == 4
    back: Any = CODEC.decode_error(infos(carrying)[0])
    assert back.code == 7


def test_another_place_is_told() -> None:
    def here() -> None:
        raise Plain("a")

    def there() -> None:
        raise Plain("a")

    traces = []
    for function in (here, there):
        try:
            function()
        except Plain as error:
            traces.append(encoded_once(error, "transient", CODEC, CODEC.encode_error).traceback)
    assert "in here" in traces[0]
    assert "in there" in traces[1]


def test_equal_code_of_another_file_is_another_place(tmp_path: Path) -> None:
    traces = []
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text("def fail():\n    raise ConnectionError('refused')\n")
        space: dict[str, Any] = {}
        exec(compile((tmp_path / name).read_text(), str(tmp_path / name), "exec"), space)
        try:
            space["fail"]()
        except ConnectionError as error:
            traces.append(encoded_once(error, "transient", CODEC, CODEC.encode_error).traceback)
    assert "one.py" in traces[0]
    assert "two.py" in traces[1]


def test_another_kind_is_another_record() -> None:
    try:
        raise Plain("a")
    except Plain as error:
        kinds = [encoded_once(error, kind, CODEC, CODEC.encode_error).kind for kind in ("transient", "permanent")]
    assert kinds == ["transient", "permanent"]
