"""Any value comes back exactly, whatever it is made of, or encoding it is a PayloadError."""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from pyworkflow_ray.engine.events import Payload
from pyworkflow_ray.errors import PayloadError
from pyworkflow_ray.storage.codec import StorageCodec
from pyworkflow_ray.storage.payload import same
from pyworkflow_ray.testing.blobs import MemoryBlobs


class Model(BaseModel):
    name: str
    number: int | float | None = None
    rows: list[tuple[int, str]] = []
    anything: Any = None


@dataclasses.dataclass
class Data:
    at: dt.datetime
    tags: frozenset[str]
    anything: Any = None


text = st.text(st.characters(codec=None), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text | st.binary(max_size=8)
json_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    models = st.builds(Model, name=text, number=st.integers() | st.floats(), anything=children)
    data = st.builds(
        Data,
        at=st.datetimes(timezones=st.none() | st.just(dt.UTC)),
        tags=st.frozensets(text),
        anything=children,
    )
    return (
        st.lists(children, max_size=4)
        | st.tuples(children, children)
        | st.dictionaries(text | st.integers() | st.booleans(), children, max_size=4)
        | st.frozensets(scalars, max_size=3)
        | models
        | data
    )


values = st.recursive(scalars, containers, max_leaves=12)
json_values = st.recursive(
    json_scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_every_value_comes_back_exactly(value: Any) -> None:
    codec = StorageCodec(MemoryBlobs())
    payload = Payload.model_validate_json(codec.encode(value).model_dump_json())
    assert same(value, codec.decode(payload)), payload


@given(json_values)
def test_json_values_are_stored_as_json_with_equal_digests(value: Any) -> None:
    codec = StorageCodec(MemoryBlobs(), allow_pickle=False)
    payload = Payload.model_validate_json(codec.encode(value).model_dump_json())
    found = codec.decode(payload)
    assert payload.enc == "json"
    assert same(value, found)
    assert codec.encode(found).digest == payload.digest


@given(json_values, json_values)
def test_digests_are_equal_only_for_equal_values(a: Any, b: Any) -> None:
    codec = StorageCodec(MemoryBlobs())
    if codec.encode(a).digest == codec.encode(b).digest:
        assert a == b


@given(values)
def test_without_pickles_a_value_is_exact_or_refused(value: Any) -> None:
    codec = StorageCodec(MemoryBlobs(), allow_pickle=False)
    try:
        payload = codec.encode(value)
    except PayloadError:
        return
    assert payload.enc in ("json", "model")
    assert same(value, codec.decode(payload))
