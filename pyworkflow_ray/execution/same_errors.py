"""Errors that say nothing new: one raised at the same place with the same content is encoded once.

Called by `worker`, for a step that is retried fails in the same way again and again, and taking a traceback and an
exception apart costs more than all else of an attempt together. Only exceptions of which everything that a record holds
is compared take part: no attributes, notes, causes or members, arguments that are plain values, a text made by Python.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from pyworkflow_ray.engine.events import ErrorInfo

_KEPT = 256
_PLAIN = frozenset({str, int, float, bool, bytes, type(None)})
_MAX_ARGUMENT = 500
# They have fields that are not among their arguments, or members.
_RICHER = (ImportError, NameError, AttributeError, SyntaxError, UnicodeError, StopIteration, BaseExceptionGroup)

_known: dict[Any, ErrorInfo] = {}
_simple: dict[type, bool] = {}


def encoded_once(
    error: BaseException, kind: Any, codec: Any, encode: Callable[[BaseException, Any], ErrorInfo]
) -> ErrorInfo:
    """The record of `error`: that of an equal one before it, else a new one."""
    key = _key(error, kind)
    if key is None:
        return encode(error, kind)
    key = (codec, *key)
    found = _known.get(key)
    if found is None:
        if len(_known) >= _KEPT:
            _known.clear()
        found = _known[key] = encode(error, kind)
    return found


def _key(error: BaseException, kind: Any) -> tuple[Any, ...] | None:
    cls = type(error)
    simple = _simple.get(cls)
    if simple is None:
        if len(_simple) >= _KEPT:
            _simple.clear()
        simple = _simple[cls] = _is_simple(cls)
    if not simple or error.__cause__ is not None or error.__context__ is not None or error.__dict__:
        return None
    content = error.args
    if isinstance(error, OSError):
        content = (*content, error.errno, error.strerror, error.filename, error.filename2)
    if len(content) > 8:
        return None
    for part in content:
        if type(part) not in _PLAIN or (isinstance(part, (str, bytes)) and len(part) > _MAX_ARGUMENT):
            return None
    place: list[Any] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        place += [code.co_filename, code, trace.tb_lasti]  # equal code of two files is equal
        trace = trace.tb_next
    # 1, 1.0 and True are equal, and read differently
    return cls, kind, content, tuple(map(type, content)), error.__suppress_context__, tuple(place)


def _is_simple(cls: type[BaseException]) -> bool:
    if issubclass(cls, _RICHER) or not isinstance(cls.__str__, types.WrapperDescriptorType):
        return False
    return not any("__slots__" in base.__dict__ or "__getattribute__" in base.__dict__ for base in _users(cls))


def _users(cls: type[BaseException]) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__ != "builtins"]
