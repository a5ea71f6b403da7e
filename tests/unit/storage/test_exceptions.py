"""Exceptions come back whole, without their constructors being called; what can't is left out and named."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import traceback
from collections.abc import Callable
from typing import Any

import httpx
import pydantic
import pytest
import requests

from pyworkflow_ray.engine.events import ErrorInfo
from pyworkflow_ray.errors import CircuitOpenError, RetryableError, StepFailedError
from pyworkflow_ray.storage.codec import StorageCodec
from pyworkflow_ray.storage.exceptions import MAX_PART_BYTES
from pyworkflow_ray.testing.blobs import MemoryBlobs

CODEC = StorageCodec(MemoryBlobs())


def stored(error: BaseException, codec: StorageCodec = CODEC) -> ErrorInfo:
    return ErrorInfo.model_validate_json(codec.encode_error(error, "transient").model_dump_json())


def restored(error: BaseException, codec: StorageCodec = CODEC) -> Any:
    return codec.decode_error(stored(error, codec))


def raised(fn: Callable[[], object]) -> BaseException:
    try:
        fn()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


class KeywordOnly(Exception):
    def __init__(self, *, code: int, where: str) -> None:
        super().__init__(f"{code} at {where}")
        self.code = code
        self.where = where


class Slotted(Exception):
    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        self.code = code


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    code: int


class BadText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Counted(Exception):
    made = 0

    def __init__(self, text: str) -> None:
        super().__init__(text)
        Counted.made += 1


class GroupOfOurs(ExceptionGroup[Exception]):
    pass


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x", 1, None),
        KeyError("k"),
        OSError(2, "no", "file", None, "other"),
        raised(lambda: b"\xff".decode()),
        raised(lambda: compile("a b", "f.py", "exec")),
        raised(lambda: __import__("no_such_module")),
        StopIteration(3),
        SystemExit(2),
        KeyboardInterrupt(),
        asyncio.CancelledError("why"),
        KeywordOnly(code=7, where="here"),
        FrozenError(3),
        Counted("c"),
        RetryableError("later", retry_after="30s"),
        CircuitOpenError("open", name="b", key="k", reason="r", retry_after=3.5),
        raised(lambda: pydantic.TypeAdapter(int).validate_python("x")),
        json.JSONDecodeError("bad", "doc", 1),
        RuntimeError((1, 2), {1: 2}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_exception_comes_back_equal(error: BaseException) -> None:
    found = restored(error)
    assert type(found) is type(error)
    assert (str(found), repr(found), found.__dict__) == (str(error), repr(error), error.__dict__)
    if not isinstance(error, pydantic.ValidationError):  # made by its own means, which fill `args`
        assert found.args == error.args


def test_fields_of_built_in_and_slotted_errors_come_back() -> None:
    error = OSError(2, "no", "a", None, "b")
    found = restored(error)
    assert (found.errno, found.strerror, found.filename, found.filename2) == (2, "no", "a", "b")
    assert restored(raised(lambda: b"\xff".decode())).start == 0
    assert restored(raised(lambda: compile("a b", "f.py", "exec"))).lineno == 1
    assert restored(raised(lambda: __import__("no_such_module"))).name == "no_such_module"
    assert restored(StopIteration(3)).value == 3
    assert restored(Slotted(4)).code == 4


def test_no_constructor_is_called() -> None:
    error = Counted("x")
    Counted.made = 0
    assert restored(error).args == ("x",)
    assert Counted.made == 0


def test_httpx_status_error_comes_back_with_request_and_response() -> None:
    response = httpx.Response(
        503, request=httpx.Request("POST", "http://pay/charge"), headers={"Retry-After": "2"}, text="busy"
    )
    found = restored(raised(response.raise_for_status))
    assert type(found) is httpx.HTTPStatusError
    assert (found.response.status_code, found.response.text, found.response.headers["retry-after"]) == (
        503,
        "busy",
        "2",
    )
    assert (found.request.method, str(found.request.url)) == ("POST", "http://pay/charge")
    assert not hasattr(found, "__notes__")


def test_connection_errors_of_httpx_and_requests_come_back_with_their_causes() -> None:
    found = restored(raised(lambda: httpx.get("http://127.0.0.1:1/", trust_env=False)))
    assert type(found) is httpx.ConnectError
    assert str(found.request.url) == "http://127.0.0.1:1/"
    assert type(found.__cause__).__name__ == "ConnectError"
    other = restored(raised(lambda: requests.get("http://127.0.0.1:1/", timeout=1)))
    assert type(other) is requests.exceptions.ConnectionError
    assert other.request.url == "http://127.0.0.1:1/"


def test_causes_contexts_and_notes_come_back() -> None:
    def fail() -> None:
        try:
            try:
                raise KeyError("first")
            except KeyError as error:
                raise ValueError("second") from error
        except ValueError:
            raise RuntimeError("third")  # noqa: B904

    error = raised(fail)
    error.add_note("a note")
    found = restored(error)
    assert found.__notes__ == ["a note"]
    assert repr(found.__context__) == "ValueError('second')"
    assert found.__cause__ is None
    assert repr(found.__context__.__cause__) == "KeyError('first')"
    assert found.__context__.__suppress_context__
    assert not found.__suppress_context__


def test_members_of_groups_come_back() -> None:
    inner = GroupOfOurs("inner", [KeyError("k")])
    error = ExceptionGroup("outer", [ValueError(1), KeywordOnly(code=7, where="x"), inner])
    found = restored(error)
    assert repr(found) == repr(error)
    assert type(found.exceptions[2]) is GroupOfOurs
    assert found.exceptions[1].code == 7
    assert found.split(KeyError)[0] is not None
    base = BaseExceptionGroup("base", [KeyboardInterrupt(), ValueError()])
    assert repr(restored(base)) == repr(base)


def test_cycle_of_causes_is_cut() -> None:
    a, b = ValueError("a"), ValueError("b")
    a.__cause__, b.__context__ = b, a
    found = restored(a)
    assert repr(found.__cause__) == "ValueError('b')"
    assert found.__cause__.__context__ is None


@pytest.mark.parametrize(
    "hide", [lambda e: e, lambda e: [e], lambda e: {"deep": (e,)}, lambda e: ExceptionGroup("g", [e])]
)
def test_exception_that_contains_itself_is_cut_fast(hide: Callable[[Exception], Any]) -> None:
    error = ValueError("a")
    error.inside = hide(error)  # type: ignore[attr-defined]
    error.other = KeywordOnly(code=7, where="x")  # type: ignore[attr-defined]
    info = stored(error)
    assert info.exception is not None
    assert info.exception.size < 2000
    found: Any = CODEC.decode_error(info)
    assert repr(found) == "ValueError('a')"
    assert found.other.code == 7
    assert "left out" in str(getattr(found, "__notes__", None) or found.inside.__notes__)


def test_exception_met_twice_is_one_object() -> None:
    shared = KeyError("shared")
    found = restored(ExceptionGroup("g", [shared, ExceptionGroup("h", [shared])]))
    assert found.exceptions[1].exceptions[0] is found.exceptions[0]


def test_long_chain_is_cut_and_memory_stays_bounded() -> None:
    error = ValueError(0)
    for number in range(3000):
        following = ValueError(number)
        following.__context__, error = error, following
    info = stored(error)
    assert info.exception is not None
    assert info.exception.size < 20_000
    assert len(info.traceback) < 17_000
    assert repr(CODEC.decode_error(info)) == "ValueError(2999)"


def test_what_cannot_be_pickled_is_left_out_and_named() -> None:
    error = KeywordOnly(code=7, where="x")
    error.rows = (row for row in ())  # type: ignore[attr-defined]
    error.box = {"rows": (row for row in ()), "kept": 1}  # type: ignore[attr-defined]
    error.lock = threading.RLock()  # type: ignore[attr-defined]
    error.huge = b"x" * (MAX_PART_BYTES + 1)  # type: ignore[attr-defined]
    found = restored(error)
    assert found.code == 7
    assert found.box == {"rows": None, "kept": 1}
    assert not hasattr(found, "huge")
    note = found.__notes__[0]
    assert "rows without its generator" in note
    assert "box without its generator" in note
    assert "huge (larger than" in note


def test_argument_that_cannot_be_stored_keeps_its_place() -> None:
    found = restored(RuntimeError("a", b"x" * (MAX_PART_BYTES + 1), "c"))
    assert found.args == ("a", "<bytes>", "c")
    assert "args[1]" in found.__notes__[0]


def test_str_that_raises_does_no_harm() -> None:
    info = stored(BadText(1))
    assert info.message == "<the __str__ of BadText raised RuntimeError>"
    assert type(CODEC.decode_error(info)) is BadText


def test_texts_are_bounded_and_free_of_lone_surrogates() -> None:
    info = stored(ValueError("\ud800" + "x" * 1_000_000))
    assert len(info.message) < 9000
    assert "\\ud800" in info.message
    assert "characters left out" in info.message
    assert len(info.traceback) < 17_000


def test_exception_that_cannot_be_restored_is_step_failed_error() -> None:
    def local_class() -> BaseException:
        lock = threading.Lock()

        class Local(Exception):
            def held(self) -> Any:
                return lock

        return Local("boom")

    found = restored(local_class())
    assert type(found) is StepFailedError
    assert (found.message, found.type.split(".")[-1]) == ("boom", "Local")
    assert "boom" in found.traceback_text


def test_plain_exceptions_come_back_with_pickles_switched_off() -> None:
    strict = StorageCodec(MemoryBlobs(), allow_pickle=False)
    for error in (ValueError("x"), OSError(2, "no", "f"), KeywordOnly(code=1, where="h"), RetryableError("r")):
        assert repr(restored(error, strict)) == repr(error)
    partly = RuntimeError("x")
    partly.at = {1, 2}  # type: ignore[attr-defined]
    assert "at (set)" in restored(partly, strict).__notes__[0]
    with_pickle = StorageCodec(MemoryBlobs()).encode_error(partly, "transient")
    assert type(strict.decode_error(with_pickle)) is StepFailedError


def test_recipe_naming_no_exception_class_is_refused() -> None:
    info = stored(ValueError("x"))
    assert info.exception is not None
    recipe = json.loads(json.dumps(info.exception.data).replace("builtins:ValueError", "builtins:print"))
    for cls in ("builtins:print", "subprocess:Popen", "builtins:int"):
        recipe["nodes"][0]["cls"] = cls
        bad = info.model_copy(update={"exception": info.exception.model_copy(update={"data": recipe})})
        assert type(CODEC.decode_error(bad)) is StepFailedError


def test_exceptions_inside_values_come_back() -> None:
    error = KeywordOnly(code=7, where="x")
    payload = CODEC.encode([error, {"e": ExceptionGroup("g", [error])}])
    found = CODEC.decode(payload)
    assert found[0].code == 7
    assert found[1]["e"].exceptions[0].where == "x"
    assert CODEC.encode(error).enc == "exception"
    assert CODEC.decode(CODEC.encode(error)).code == 7


def test_where_is_the_users_innermost_frame() -> None:
    def user() -> None:
        json.loads("{")

    info = stored(raised(user))
    assert info.where is not None
    assert (info.where.file, info.where.function.split(".")[-1]) == (__file__, "user")
    assert stored(ValueError("never raised")).where is None


def test_traceback_names_cause_and_line() -> None:
    def user() -> None:
        try:
            json.loads("{")
        except ValueError as error:
            raise RuntimeError("outer") from error

    error = raised(user)
    text = stored(error).traceback
    assert text == "".join(traceback.format_exception(error))
    assert "direct cause" in text
    assert "json.loads" in text
