"""Which values JSON keeps exactly, and the forms a value may be stored in. Called by codec and exceptions.

Rules:
* A value is stored as JSON only if it consists of exactly `None bool int float str list dict` (`type(x) is …`, keys are
  str), with finite floats, no lone surrogates, no cycle, at most 100 levels deep. JSON libraries turn int keys to
  strings and NaN to null without a word, so the walk is ours.
* A pydantic model or dataclass that other processes can import is stored in its JSON form if decoding that form gives
  back an equal value of the same types all the way down; else it is pickled.
* Everything else is pickled, and the pickle is loaded once before it is accepted.

Two lists in one value that are the same object come back as two equal lists, as from any JSON.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import hashlib
import importlib
import json
import marshal
import math
import reprlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, TypeAdapter
from pydantic_core import TzInfo, from_json, to_json

from pyworkflow_ray.errors import PayloadError

MAX_DEPTH = 100  # the journal's JSON reader gives up at 200 levels, and an event puts some of its own round a value
MAX_INT_BITS = 1024  # 309 digits: Python may refuse to read ints of more than 640
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PREVIEW_CHARS = 120

_canonical_text = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


class Encoded(NamedTuple):
    """A value in stored form. `text` is the JSON text or the pickle; `data` the JSON value, None for a pickle.

    buffers: large buffers that were taken out of the pickle. secret: one of pydantic's secrets is in the pickle.
    """

    enc: str
    text: bytes
    data: Any
    cls: str | None
    digest: str | None
    buffers: Sequence[memoryview] = ()
    secret: bool = False


class NotJson(Exception):
    """The value, or a part of it, is not exactly JSON. Never leaves this package."""


class TooLarge(Exception):
    """The stored form would be larger than the limit. Never leaves this package."""


# The walk ---------------------------------------------------------------------------------------------------------


def json_size(value: Any, limit: int) -> int:
    """Lower bound of the bytes that `value` takes as JSON.

    Raises:
        NotJson: it is not exactly JSON; the text says what and where.
        TooLarge: it takes more than `limit` bytes. What is shared is measured once, so that sixty nested lists of two
            references each are refused in sixty steps.
    """
    return _Walk(limit).size(value, 0)


class _Walk:
    __slots__ = ("limit", "seen")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.seen: dict[int, int] = {}

    def size(self, value: Any, depth: int) -> int:
        kind = type(value)
        if kind is str:
            return self._text(value)
        if kind is int:
            if -(2**63) <= value < 2**63:
                return 1
            if value.bit_length() > MAX_INT_BITS:
                raise NotJson(f"an int of {value.bit_length()} bits")
            return 20
        if kind is float:
            if not math.isfinite(value):
                raise NotJson(f"the float {value}")
            return 3
        if kind is bool or value is None:
            return 4
        if kind is list or kind is dict:
            return self._container(value, depth)
        raise NotJson(f"a {kind.__name__}")

    def _text(self, value: str) -> int:
        size = len(value) + 2
        if size > self.limit:
            raise TooLarge
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise NotJson("text with a lone surrogate") from None
        return size

    def _container(self, value: list[Any] | dict[Any, Any], depth: int) -> int:
        known = self.seen.get(id(value))
        if known is not None:
            if known < 0:
                raise NotJson("a value that contains itself")
            return known
        if depth >= MAX_DEPTH:
            raise NotJson(f"a value nested more than {MAX_DEPTH} deep")
        self.seen[id(value)] = -1
        total = 2
        if type(value) is dict:
            for key, item in value.items():
                if type(key) is not str:
                    raise NotJson(f"a dict with a key of type {type(key).__name__}")
                total += self._text(key) + self.size(item, depth + 1) + 2
                if total > self.limit:
                    raise TooLarge
        else:
            for item in value:
                total += self.size(item, depth + 1) + 1
                if total > self.limit:
                    raise TooLarge
        self.seen[id(value)] = total
        return total


def copy_json(value: Any) -> Any:
    """A copy of a JSON value that shares no list or dict with it, nor within itself."""
    return marshal.loads(marshal.dumps(value, 2)) if type(value) in (list, dict) else value


# Forms ------------------------------------------------------------------------------------------------------------


def digest_of(text: bytes, cls: str | None = None) -> str:
    """32 hexadecimal digits for a canonical encoding: 1, True, 1.0 and "1" differ, the order of keys does not count."""
    return hashlib.blake2b(text if cls is None else cls.encode() + b"\0" + text, digest_size=16).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON text with sorted keys and no spaces."""
    return _canonical_text(value).encode()


def encode_json(value: Any, limit: int) -> Encoded:
    """`value` as JSON; NotJson and TooLarge as `json_size`."""
    json_size(value, limit)
    text = canonical(value)
    if len(text) > limit:
        raise TooLarge
    digest = digest_of(text)
    if type(value) in (list, dict):
        text, value = to_json(value), copy_json(value)
    return Encoded("json", text, value, None, digest)


def is_model(value: Any) -> bool:
    cls = type(value)
    return (issubclass(cls, BaseModel) or dataclasses.is_dataclass(cls)) and not issubclass(cls, BaseException)


def encode_model(value: Any, limit: int) -> Encoded | None:
    """`value`, a model or dataclass, in its JSON form; None where that form would not bring it back exactly.

    A model of which fields were left unset comes back with the same fields unset: `model_dump(exclude_unset=True)` of a
    partial update must not begin to send nulls.
    """
    ref = class_ref(type(value))
    adapter = _adapter(type(value)) if ref else None
    if ref is None or adapter is None:
        return None
    for exclude_unset in (False, True):
        try:
            text = adapter.dump_json(value, by_alias=True, round_trip=True, exclude_unset=exclude_unset, warnings=False)
            if len(text) > limit:
                raise TooLarge
            if same(value, adapter.validate_json(text)):
                data = from_json(text, allow_inf_nan=True)
                json_size(data, limit)
                return Encoded("model", text, data, ref, digest_of(canonical(data), ref))
        except TooLarge:
            raise
        except Exception:  # the user's serializers and validators may raise anything
            pass
    return None


def decode_model(text: bytes, ref: str) -> Any:
    """The model or dataclass `ref` whose JSON form is `text`."""
    cls = find_class(ref)
    adapter = _adapter(cls) if issubclass(cls, BaseModel) or dataclasses.is_dataclass(cls) else None
    if adapter is None:
        raise PayloadError(f"{ref} is no pydantic model or dataclass any more: a stored value of it can't be decoded")
    try:
        value = adapter.validate_json(text)
    except Exception as error:
        raise PayloadError(f"a stored {ref} does not fit its class any more: {error}") from error
    if type(value) is not cls:
        raise PayloadError(f"a stored {ref} was decoded as {type(value).__name__}")
    return value


_adapters: dict[type, TypeAdapter[Any] | None] = {}


def _adapter(cls: type) -> TypeAdapter[Any] | None:
    if cls not in _adapters:
        if len(_adapters) > 10_000:  # classes redefined in a notebook, again and again
            _adapters.clear()
        try:
            _adapters[cls] = TypeAdapter(cls)
        except Exception:  # annotations pydantic can't make a schema of
            _adapters[cls] = None
    return _adapters[cls]


# Classes by name --------------------------------------------------------------------------------------------------


def class_ref(cls: type) -> str | None:
    """The name "module:qualname" if that leads to `cls` in any process; None for `__main__`'s and functions'."""
    module, qualname = getattr(cls, "__module__", None), cls.__qualname__
    if not isinstance(module, str) or module in ("__main__", "__mp_main__") or "<" in qualname or "[" in qualname:
        return None
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return f"{module}:{qualname}" if found is cls else None


def find_class(ref: str) -> type:
    """The class of `ref`, its module imported where needed.

    Raises:
        PayloadError: module or class is not there, or it is no class.
    """
    module, _, qualname = ref.partition(":")
    try:
        found: Any = sys.modules.get(module) or importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise PayloadError(
            f"the class {ref} of a stored value can't be imported here ({type(error).__name__}: {error}): "
            "run where that code is installed"
        ) from error
    if not isinstance(found, type):
        raise PayloadError(f"{ref} of a stored value is a {type(found).__name__}, not a class")
    return found


# Equality ---------------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Whether `a` and `b` are equal and of the same types all the way down: 1 is not True, (1,) is not [1]."""
    cls = type(a)
    if cls is not type(b):
        return False
    if cls is float:
        return (a == b and math.copysign(1.0, a) == math.copysign(1.0, b)) or (a != a and b != b)
    if cls in (str, int, bool, bytes, type(None)):
        return bool(a == b)
    if cls is list or cls is tuple:
        return len(a) == len(b) and all(map(same, a, b))
    if cls is dict:  # its order can be seen
        return all(map(same, a, b)) and all(map(same, a.values(), b.values())) if len(a) == len(b) else False
    if cls is set or cls is frozenset:
        return len(a) == len(b) and _same_members(a, b)
    if issubclass(cls, BaseModel):
        return same(a.__dict__, b.__dict__) and all(
            same(getattr(a, name, None), getattr(b, name, None))
            for name in ("__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")
        )
    if issubclass(cls, enum.Enum):
        return a is b
    if issubclass(cls, dt.datetime) or issubclass(cls, dt.time):
        return bool(a == b) and a.fold == b.fold and _same_zone(a.tzinfo, b.tzinfo)
    if cls is decimal.Decimal:
        return bool(a.as_tuple() == b.as_tuple())
    if dataclasses.is_dataclass(cls):
        names = [field.name for field in dataclasses.fields(cls)]
        rest = [{k: v for k, v in getattr(x, "__dict__", {}).items() if k not in names} for x in (a, b)]
        return all(same(getattr(a, name), getattr(b, name)) for name in names) and same(rest[0], rest[1])
    return bool(a == b)


def _same_members(a: Iterable[Any], b: Iterable[Any]) -> bool:
    twins = {item: item for item in b}
    strangers = []
    for item in a:
        if item not in twins:  # NaN is not found by hash, neither alone nor inside a tuple
            strangers.append(item)
        elif not same(item, twins.pop(item)):
            return False
    for item in strangers:
        twin = next((other for other in twins if same(item, other)), None)
        if twin is None:
            return False
        del twins[twin]
    return True


def _same_zone(a: dt.tzinfo | None, b: dt.tzinfo | None) -> bool:
    fixed = (dt.timezone, TzInfo)  # pydantic gives its own class for a fixed offset
    if isinstance(a, fixed) and isinstance(b, fixed):
        return a.utcoffset(None) == b.utcoffset(None)
    return a is b or (type(a) is type(b) and a == b)


# Texts ------------------------------------------------------------------------------------------------------------


def clean_text(text: str, limit: int) -> str:
    """`text` that any JSON writer takes (lone surrogates escaped), its middle left out beyond `limit` characters."""
    if len(text) > limit:
        head, tail = limit // 4, limit - limit // 4
        text = f"{text[:head]}\n... {len(text) - limit} characters left out ...\n{text[-tail:]}"
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


class _Short(reprlib.Repr):
    _SHOWN = (dt.date, dt.time, dt.timedelta, decimal.Decimal, complex, bytes)

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, 60, 60, 40

    def repr_instance(self, x: Any, level: int) -> str:
        # The repr of a user's object may be slow, huge, secret, or raise.
        if isinstance(x, enum.Enum):
            return f"{type(x).__name__}.{x.name}"
        if type(x).__module__ in ("datetime", "decimal", "uuid", "pathlib") or isinstance(x, self._SHOWN):
            return super().repr_instance(x, level)
        return f"<{type(x).__name__}>"

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 1000 else f"<int of {x.bit_length()} bits>"


_short = _Short()


def preview(value: Any) -> str:
    """A text of at most 120 characters for people; objects of the user's classes are named, not shown."""
    try:
        text = _short.repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    text = clean_text(text, 10 * PREVIEW_CHARS)
    return text if len(text) <= PREVIEW_CHARS else text[: PREVIEW_CHARS - 3] + "..."
