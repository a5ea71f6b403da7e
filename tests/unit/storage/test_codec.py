"""Values come back exactly, or encoding them is an error that names them."""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import decimal
import os
import pickle
import secrets
import subprocess
import sys
import threading
import types
import zoneinfo
from typing import Any

import pytest
from pydantic import BaseModel, Field, SecretStr

from pyworkflow_ray.engine.events import Payload, StepCompleted, event_adapter
from pyworkflow_ray.errors import PayloadError
from pyworkflow_ray.storage import payload as forms
from pyworkflow_ray.storage.codec import SPILL_BYTES, StorageCodec
from pyworkflow_ray.storage.payload import same
from pyworkflow_ray.testing.blobs import MemoryBlobs

RAN: list[str] = []


def ran(word: str) -> None:
    RAN.append(word)


def journaled(payload: Payload) -> Payload:
    """`payload` after it has been written to a journal and read again."""
    event = StepCompleted(position="1", dispatch=1, attempt=1, started_at=0, ended_at=0, result=payload)
    read = event_adapter.validate_json(event.model_dump_json())
    assert isinstance(read, StepCompleted)
    return read.result


def round_trip(value: Any, codec: StorageCodec | None = None) -> tuple[str, Any]:
    codec = codec or StorageCodec(MemoryBlobs())
    payload = journaled(codec.encode(value))
    return payload.enc, codec.decode(payload)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


class Address(BaseModel):
    street: str
    tags: tuple[str, ...] = ()


class Order(BaseModel):
    id: int
    total: decimal.Decimal
    at: dt.datetime
    address: Address | None = None
    note: str | None = None


class SubOrder(Order):
    extra: int = 0


class Loose(BaseModel):
    value: Any


class Aliased(BaseModel):
    user_name: str = Field(alias="userName")


class Evil:
    def __reduce__(self) -> Any:
        return (ran, ("evil",))


@dataclasses.dataclass
class Point:
    x: float
    y: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    name: str
    parent: Frozen | None = None


@dataclasses.dataclass
class Derived:
    x: int
    twice: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.twice = self.x * 2


AT = dt.datetime(2026, 11, 25, 1, 2, 3, 456789, tzinfo=dt.UTC)


@pytest.mark.parametrize(
    ("value", "enc"),
    [
        (None, "json"),
        (True, "json"),
        (1, "json"),
        (-(2**63) - 1, "json"),
        (2**1024 - 1, "json"),
        (2**1025, "pickle"),
        (1.0, "json"),
        (-0.0, "json"),
        (5e-324, "json"),
        (float("inf"), "pickle"),
        (float("nan"), "pickle"),
        ("", "json"),
        ("a\x00b\u2028\U0001f600", "json"),
        ("\ud800", "pickle"),
        ({"\udfff": 1}, "pickle"),
        ({"a": [1, {"b": None}]}, "json"),
        ({1: "a"}, "pickle"),
        ((1, 2), "pickle"),
        ([(1,)], "pickle"),
        ([float("nan")], "pickle"),
        ({"a", "b"}, "pickle"),
        (b"bytes", "pickle"),
        (AT, "pickle"),
        (nested(99), "json"),
        (nested(150), "pickle"),
        (
            Order(id=1, total=decimal.Decimal("1.00"), at=AT, address=Address(street="x", tags=("a",)), note=None),
            "model",
        ),
        (Order(id=1, total=decimal.Decimal("1.00"), at=AT), "model"),
        (Aliased(userName="u"), "model"),
        (Loose(value=[1, "a"]), "model"),
        (Loose(value=(1, 2)), "pickle"),
        (Loose(value=float("nan")), "pickle"),
        (Loose(value=Address(street="x")), "pickle"),
        (Order(id=1, total=decimal.Decimal(1), at=AT.astimezone(zoneinfo.ZoneInfo("Europe/Berlin"))), "pickle"),
        (Point(1.5, (1, 2)), "model"),
        (Frozen("a", Frozen("b")), "model"),
        (Derived(2), "model"),
        ([Point(1.0, ())], "pickle"),
    ],
)
def test_value_comes_back_exactly(value: Any, enc: str) -> None:
    found_enc, found = round_trip(value)
    assert (found_enc, same(value, found)) == (enc, True), found


def test_subclass_in_a_field_of_its_base_keeps_its_class() -> None:
    class_of_field = type("Holder", (BaseModel,), {"__annotations__": {"order": Order}, "__module__": __name__})
    globals()["Holder"] = class_of_field
    value = class_of_field(order=SubOrder(id=1, total=decimal.Decimal(1), at=AT, extra=7))
    enc, found = round_trip(value)
    assert enc == "pickle"
    assert type(found.order) is SubOrder
    assert found.order.extra == 7


def test_fields_left_unset_stay_unset() -> None:
    _, found = round_trip(Order(id=1, total=decimal.Decimal(1), at=AT))
    assert found.model_dump(exclude_unset=True).keys() == {"id", "total", "at"}


def test_a_secret_survives_and_its_preview_does_not_show_it() -> None:
    secret = secrets.token_hex(8)
    codec = StorageCodec(MemoryBlobs())
    payload = codec.encode(Loose(value=SecretStr(secret)))
    assert codec.decode(payload).value.get_secret_value() == secret
    assert secret not in str(payload.preview)


def test_dict_with_type_tags_comes_back_as_that_dict_and_no_code_runs() -> None:
    RAN.clear()
    evil = base64.b64encode(pickle.dumps(Evil())).decode()
    value = {
        "__type__": "pickle",
        "__class__": "test_codec.Evil",
        "__reduce__": ["test_codec", "RAN"],
        "enc": "pickle",
        "data": evil,
        "py/object": "os.system",
        "nodes": [{"cls": "builtins:ValueError", "args": [["pickle", evil]]}],
    }
    assert round_trip(value) == ("json", value)
    assert RAN == []
    pickle.loads(base64.b64decode(evil))
    assert RAN == ["evil"]  # the bait was live


def test_recorded_value_cannot_be_changed_afterwards() -> None:
    codec = StorageCodec(MemoryBlobs())
    value = {"rows": [1]}
    payload = codec.encode(value)
    value["rows"].append(2)
    first = codec.decode(payload)
    first["rows"].append(3)
    assert codec.decode(payload) == {"rows": [1]}


def test_shared_parts_are_measured_once_and_come_back_equal() -> None:
    part: list[Any] = ["x" * 10]
    assert round_trip([part, part]) == ("json", [part, part])


def test_exploding_references_end_fast() -> None:
    value: list[Any] = ["x" * 100]
    for _ in range(60):
        value = [value, value]
    with pytest.raises(PayloadError, match="too large"):
        StorageCodec(MemoryBlobs()).encode(value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ((i for i in ()), "a generator"),
        ({"rows": [1, threading.Lock()]}, "['rows'][1]"),
        ([Point(1.0, threading.Lock())], "[0].y"),  # type: ignore[arg-type]
        (nested(10_000), "nested too deeply"),
        (types.SimpleNamespace(client=threading.Event()), ".client"),
    ],
)
def test_unpicklable_value_is_refused_and_its_part_named(value: Any, words: str) -> None:
    with pytest.raises(PayloadError) as caught:
        StorageCodec(MemoryBlobs()).encode(value)
    assert words in str(caught.value)


class Unloadable:
    def __init__(self, *, key: int) -> None:
        self.key = key

    def __reduce__(self) -> Any:
        return (Unloadable, (self.key,))


class Changeling:
    def __reduce__(self) -> Any:
        return (int, ())


@pytest.mark.parametrize(
    ("value", "words"), [(Unloadable(key=1), "can't be loaded"), (Changeling(), "comes back as a int")]
)
def test_pickle_that_would_not_come_back_is_refused_when_written(value: Any, words: str) -> None:
    with pytest.raises(PayloadError, match=words):
        StorageCodec(MemoryBlobs()).encode(value)


def test_cycle_comes_back_as_a_cycle_or_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    enc, found = round_trip(value)
    assert enc == "pickle"
    assert found[0] is found
    with pytest.raises(PayloadError, match="contains itself"):
        StorageCodec(MemoryBlobs(), allow_pickle=False).encode(value)


@pytest.mark.parametrize(
    "make", [lambda n: "x" * n, lambda n: b"x" * n, lambda n: {"a": ["x" * n]}, lambda n: [b"x" * n]]
)
def test_too_large_value_is_refused_and_not_copied(make: Any) -> None:
    import tracemalloc

    limit = 1_000_000
    value = make(20 * limit)
    blobs = MemoryBlobs()
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError, match="1,000,000 bytes"):
            StorageCodec(blobs, max_payload_bytes=limit).encode(value)
        assert tracemalloc.get_traced_memory()[1] < 2 * limit
    finally:
        tracemalloc.stop()
    assert blobs.blobs == {}


@pytest.mark.parametrize(
    "value", ["x" * SPILL_BYTES, ["y" * 10] * 10_000, Loose(value="z" * SPILL_BYTES), b"b" * SPILL_BYTES]
)
def test_large_value_goes_to_a_blob_and_comes_back(value: Any) -> None:
    blobs = MemoryBlobs()
    codec = StorageCodec(blobs)
    payload = journaled(codec.encode(value))
    assert payload.data is None
    assert payload.ref in blobs.blobs
    assert payload.preview
    assert len(payload.model_dump_json()) < 1000
    assert same(codec.decode(payload), value)


def test_damaged_blob_is_refused() -> None:
    blobs = MemoryBlobs()
    codec = StorageCodec(blobs)
    payload = codec.encode("x" * SPILL_BYTES)
    assert payload.ref is not None
    blobs.blobs[payload.ref] = blobs.blobs[payload.ref].replace(b"x", b"y", 1)
    with pytest.raises(PayloadError, match=payload.ref):
        codec.decode(payload)


@pytest.mark.parametrize("value", [(1, 2), b"x", float("nan"), nested(150), AT, Loose(value=(1,))])
def test_pickles_switched_off_are_refused_on_write_and_on_read(value: Any) -> None:
    strict = StorageCodec(MemoryBlobs(), allow_pickle=False)
    with pytest.raises(PayloadError, match="allow_pickle=False"):
        strict.encode(value)
    with pytest.raises(PayloadError, match="allow_pickle=False"):
        strict.decode(StorageCodec(MemoryBlobs()).encode(value))


def test_switched_off_pickle_is_not_loaded_before_it_is_refused() -> None:
    RAN.clear()
    payload = Payload(enc="pickle", data=base64.b64encode(pickle.dumps(Evil())).decode(), py=forms.PYTHON)
    with pytest.raises(PayloadError):
        StorageCodec(MemoryBlobs(), allow_pickle=False).decode(payload)
    assert RAN == []


@pytest.mark.parametrize("py", ["3.10", "3.99", None])
def test_pickle_of_another_python_is_refused_and_not_loaded(py: str | None) -> None:
    RAN.clear()
    payload = Payload(enc="pickle", data=base64.b64encode(pickle.dumps(Evil())).decode(), py=py)
    with pytest.raises(PayloadError, match=f"Python {py}.*Python {forms.PYTHON}"):
        StorageCodec(MemoryBlobs()).decode(payload)
    assert RAN == []


def test_digests_tell_types_apart_and_ignore_the_order_of_keys() -> None:
    codec = StorageCodec(MemoryBlobs())
    values = [1, True, 1.0, "1", None, [1], "true", {"a": 1}, Loose(value=1), Address(street="1")]
    digests = [codec.encode(value).digest for value in values]
    assert None not in digests
    assert len(set(digests)) == len(digests)
    assert codec.encode({"a": 1, "b": 2}).digest == codec.encode({"b": 2, "a": 1}).digest
    assert codec.encode((1,)).digest is None


@pytest.mark.parametrize("enc", ["msgpack", "custom", ""])
def test_unknown_encoding_is_refused(enc: str) -> None:
    with pytest.raises(PayloadError):
        StorageCodec(MemoryBlobs()).decode(Payload(enc=enc, data="eA=="))


@pytest.mark.parametrize("cls", ["no_such_module:X", "os:path", "builtins:int", "test_codec:Gone"])
def test_model_whose_class_is_gone_is_refused_by_name(cls: str) -> None:
    with pytest.raises(PayloadError, match=cls):
        StorageCodec(MemoryBlobs()).decode(Payload(enc="model", data={}, cls=cls))


class Xor:
    """No cipher, but a hook that leaves nothing readable."""

    digest_key: bytes | None = b"key"

    def protect(self, data: bytes, place: bytes) -> bytes:
        return bytes(byte ^ 0x5A for byte in data)

    reveal = protect


@pytest.mark.parametrize(
    "value", ["secret", {"a": "secret"}, ("secret",), Loose(value="secret"), "secret" * SPILL_BYTES]
)
def test_hook_sees_every_payload_and_nothing_is_left_readable(value: Any) -> None:
    blobs = MemoryBlobs()
    codec = StorageCodec(blobs, hook=Xor())
    payload = journaled(codec.encode(value))
    stored = payload.model_dump_json().encode() + b"".join(blobs.blobs.values())
    assert payload.enc == "custom"
    assert b"secret" not in stored
    assert payload.digest not in (None, StorageCodec(blobs).encode(value).digest) or isinstance(value, tuple)
    assert same(codec.decode(payload), value)
    with pytest.raises(PayloadError, match="encrypted"):
        StorageCodec(blobs).decode(payload)


def test_hook_is_told_the_place_of_each_payload() -> None:
    places: list[bytes] = []

    class Noting(Xor):
        def protect(self, data: bytes, place: bytes) -> bytes:
            places.append(place)
            return super().protect(data, place)

        reveal = protect

    codec = StorageCodec(MemoryBlobs(), hook=Noting())
    assert codec.at("order-1", "3").decode(codec.at("order-1", "3").encode("secret")) == "secret"
    assert places == [b"order-1\x003"] * 2


def test_hook_leaves_nothing_of_an_error_readable() -> None:
    codec = StorageCodec(MemoryBlobs(), hook=Xor())
    try:
        raise ValueError("secret")
    except ValueError as error:
        info = codec.encode_error(error, "permanent")
    assert "secret" not in info.model_dump_json()
    assert repr(codec.decode_error(info)) == "ValueError('secret')"


def test_class_of_main_travels_by_value_to_another_process(tmp_path: Any) -> None:
    writer = tmp_path / "script.py"
    writer.write_text(
        "import sys\n"
        "from pyworkflow_ray.storage.codec import StorageCodec\n"
        "from pyworkflow_ray.testing.blobs import MemoryBlobs\n"
        "class Mine:\n"
        "    def __init__(self, x): self.x = x\n"
        "    def twice(self): return self.x * 2\n"
        "class MyError(Exception):\n"
        "    def __init__(self, *, code): super().__init__(code); self.code = code\n"
        "codec = StorageCodec(MemoryBlobs())\n"
        "print(codec.encode(Mine(21)).model_dump_json())\n"
        "print(codec.encode_error(MyError(code=7), 'transient').exception.model_dump_json())\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    lines = subprocess.run([sys.executable, str(writer)], capture_output=True, text=True, env=env, check=True).stdout
    value, error = (
        StorageCodec(MemoryBlobs()).decode(Payload.model_validate_json(line)) for line in lines.splitlines()
    )
    assert value.twice() == 42
    assert (type(error).__name__, error.code) == ("MyError", 7)


def test_codec_loads_neither_duckdb_nor_pyarrow_nor_ray() -> None:
    code = (
        "import sys, pyworkflow_ray.storage.codec as c; from pyworkflow_ray.testing.blobs import MemoryBlobs as M; "
        "x = c.StorageCodec(M()); x.decode(x.encode({'a': 1})); "
        "print({'duckdb', 'pyarrow', 'ray', 'cloudpickle'} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == "set()"


def test_sets_of_nan_are_the_same_when_every_member_has_its_twin() -> None:
    nan, other = float("nan"), float("nan")
    assert same(frozenset({nan, 1, (2, nan)}), frozenset({other, 1, (2, other)}))
    assert not same({nan, 1}, {other, True})
    assert not same({nan, 1}, {2, 1})
    assert not same({nan, (nan,)}, {other, (1,)})


def test_a_set_of_nan_comes_back() -> None:
    value = frozenset({float("nan"), 1.5})
    _, found = round_trip(value)
    assert same(value, found)
