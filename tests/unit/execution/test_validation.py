"""Arguments against annotations: what the step gets is what was validated."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import threading
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

import pyworkflow_ray as pw


class Order(BaseModel):
    id: int
    amount: float = 1.0


@dataclasses.dataclass
class Address:
    city: str
    code: int


class Colour(enum.Enum):
    RED = "red"


def validated(fn: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return pw.step(fn).definition.validate(args, kwargs)  # type: ignore[no-any-return]


def test_text_for_a_number_arrives_as_the_number() -> None:
    def f(a: int, b: float, c: bool) -> None: ...

    args, kwargs = validated(f, "7", "1.5", c="yes")
    assert (args, kwargs) == ((7, 1.5), {"c": True})
    assert type(args[0]) is int


def test_dict_for_a_model_arrives_as_the_model() -> None:
    def f(order: Order, to: Address, when: dt.date, colour: Colour, tags: list[int]) -> None: ...

    args, _ = validated(f, {"id": "3"}, {"city": "Bern", "code": "3000"}, "2026-11-24", "red", ("1", 2))
    assert args == (Order(id=3), Address("Bern", 3000), dt.date(2026, 11, 24), Colour.RED, [1, 2])


def test_model_instance_passes_as_the_same_object() -> None:
    def f(order: Order) -> None: ...

    order = Order(id=1)
    (passed,), _ = validated(f, order)
    assert passed is order


def test_every_wrong_argument_is_named() -> None:
    def f(a: int, b: int, *, c: Literal["x", "y"] = "x") -> None: ...

    with pytest.raises(ValidationError) as caught:
        validated(f, "no", "neither", c="z")
    assert {error["loc"] for error in caught.value.errors()} == {(0,), (1,), ("c",)}


@pytest.mark.parametrize("call", [((), {}), ((1, 2, 3), {}), ((1,), {"d": 4}), ((1, 2), {"a": 1}), ((), {"b": 2})])
def test_call_that_does_not_fit_the_signature_is_a_type_error(call: tuple[Any, Any]) -> None:
    def plain(a, b=2): ...  # type: ignore[no-untyped-def]

    def typed(a: int, b: int = 2) -> None: ...

    for fn in (plain, typed):
        with pytest.raises(TypeError) as caught:
            validated(fn, *call[0], **call[1])
        assert type(caught.value) is TypeError


def test_keyword_only_argument_is_required() -> None:
    def f(*, a: int) -> None: ...

    with pytest.raises(TypeError, match="'a'"):
        validated(f)
    assert validated(f, a="1") == ((), {"a": 1})


def test_defaults_stay_the_functions_own() -> None:
    missing = object()

    def f(a: int, b: Any = missing, *, c: int = "not an int") -> None: ...  # type: ignore[assignment]

    assert validated(f, "1") == ((1,), {})
    assert validated(f, "1", c="2") == ((1,), {"c": 2})


def test_variable_arguments_are_validated_each() -> None:
    def f(first: int, *rest: int, **named: float) -> None: ...

    assert validated(f, "1", "2", 3, x="1.5") == ((1, 2, 3), {"x": 1.5})
    with pytest.raises(ValidationError):
        validated(f, 1, "x")
    with pytest.raises(ValidationError):
        validated(f, 1, y="x")


def test_positional_only_arguments_work() -> None:
    def f(a: int, /, b: int = 0) -> None: ...

    assert validated(f, "1", b="2") == ((1,), {"b": 2})


def test_annotated_constraints_hold() -> None:
    def f(a: Annotated[int, Field(gt=0)]) -> None: ...

    assert validated(f, 1) == ((1,), {})
    with pytest.raises(ValidationError):
        validated(f, 0)


def test_optional_and_unions_take_each_member() -> None:
    def f(a: int | None, b: int | str) -> None: ...

    assert validated(f, None, "x") == ((None, "x"), {})
    assert validated(f, "5", 2) == ((5, 2), {})


def test_foreign_class_is_checked_by_isinstance() -> None:
    def f(lock: threading.Event) -> None: ...

    event = threading.Event()
    assert validated(f, event)[0][0] is event
    with pytest.raises(ValidationError):
        validated(f, "no event")


def test_annotation_that_cannot_be_resolved_is_tolerated_and_the_others_hold() -> None:
    def f(a: NoSuchName, b: int) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    assert validated(f, object, "2") == ((object, 2), {})


def test_annotation_pydantic_has_no_schema_for_is_tolerated() -> None:
    class Hostile:
        @classmethod
        def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
            raise RuntimeError("no schema")

    def f(a: Annotated[Any, "note"], b: Hostile, c: int) -> None: ...

    assert validated(f, 1, 2, "3") == ((1, 2, 3), {})


def test_local_class_of_a_function_is_found() -> None:
    class Local(BaseModel):
        x: int

    def f(a: Local) -> None: ...

    (passed,), _ = validated(f, {"x": "4"})
    assert passed == Local(x=4)


def test_nothing_annotated_passes_everything_as_it_is() -> None:
    def f(a, b=None, *rest, **named): ...  # type: ignore[no-untyped-def]

    thing = object()
    assert validated(f, thing, "7", 1, x=thing) == ((thing, "7", 1), {"x": thing})


def test_plain_containers_pass_as_the_same_object() -> None:
    def f(a: list, b: dict) -> None: ...  # type: ignore[type-arg]

    one, two = [1], {"a": 1}
    args, _ = validated(f, one, two)
    assert args[0] is one
    assert args[1] is two


def test_bind_fills_in_defaults_so_that_equal_calls_are_equal() -> None:
    def f(a: int, b: int = 2, *, c: str = "x") -> None: ...

    bind = pw.step(f).definition.bind
    assert bind((1,), {}) == bind(("1",), {"b": "2"}) == bind((), {"c": "x", "a": 1}) == ((1, 2), {"c": "x"})
