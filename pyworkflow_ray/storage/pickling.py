"""Values as pickles: protocol 5, bounded, loaded once before they are accepted. Called by codec and exceptions.

Faults: a pickle runs code when it is loaded, so whoever can write the storage can run code as its reader;
`allow_pickle` of the codec switches this module off. A pickle of another minor Python is refused by the codec.

Classes and functions of `__main__` and of functions travel by value (cloudpickle). Exceptions inside a value are stored
by our recipe, for those of httpx, aiohttp, openai and grpc don't survive pickle.
"""

from __future__ import annotations

import io
import pickle
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

from pyworkflow_ray.errors import PayloadError
from pyworkflow_ray.storage.payload import TooLarge
from pyworkflow_ray.storage.redaction import SECRETS

PROTOCOL = 5
OUT_OF_BAND_BYTES = 64 * 1024  # buffers of arrays and tables from this size on are stored apart, uncopied
_LOCKS = {type(threading.Lock()): threading.Lock, type(threading.RLock()): threading.RLock}
_TABLES = ("pyarrow.", "polars.")
_BY_NAME = (type, types.FunctionType, types.BuiltinFunctionType)  # pickled as a name, never reduced


class _Bounded(io.BytesIO):
    """A buffer that refuses to grow beyond a limit, so that pickling a gigabyte ends at once."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > self._limit:
            raise TooLarge
        return super().write(data)


def _is_proxy(obj: Any) -> bool:
    """Whether it is a read-only view of a mapping: aiohttp keeps an answer's headers in one."""
    cls = type(obj)
    return cls is types.MappingProxyType or (cls.__module__.startswith("multidict.") and cls.__name__.endswith("Proxy"))


def _nothing() -> None:
    """What stands for a part that can't be pickled."""
    return None


def _pickler_class() -> Any:
    import cloudpickle

    class ValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
        """`left_out` None: strict. A list: what can't be pickled is replaced by None and its type named there,
        locks by new ones (grpc's errors read their own code under a lock)."""

        def __init__(self, file: Any, left_out: list[str] | None, take: Any) -> None:
            super().__init__(file, protocol=PROTOCOL, buffer_callback=take)
            self._left_out = left_out
            self.secrets: list[str] | None = None

        def reducer_override(self, obj: Any) -> Any:
            if self.secrets is not None and isinstance(obj, SECRETS):
                self.secrets.append(type(obj).__name__)
            if isinstance(obj, BaseException):
                from pyworkflow_ray.storage.exceptions import reduce_exception

                return reduce_exception(obj)
            if type(obj).__module__.startswith(_TABLES):
                from pyworkflow_ray.storage.table_values import reduce_table

                reduced = reduce_table(obj)
                if reduced is not None:
                    return reduced
            reduced = super().reducer_override(obj)
            if reduced is not NotImplemented or self._left_out is None or isinstance(obj, _BY_NAME):
                return reduced
            if type(obj) in _LOCKS:
                return (_LOCKS[type(obj)], ())
            if _is_proxy(obj):
                return (type(obj), (obj.copy(),))
            try:
                reducer = self.dispatch_table.get(type(obj))
                return reducer(obj) if reducer is not None else obj.__reduce_ex__(PROTOCOL)
            except Exception:
                self._left_out.append(type(obj).__qualname__)
                return (_nothing, ())

    return ValuePickler


_pickler: Any = None  # made on first use: cloudpickle need not be imported where only JSON is stored


def dump(
    value: Any,
    limit: int,
    left_out: list[str] | None = None,
    buffers: list[memoryview] | None = None,
    buffers_limit: int | None = None,
    secrets: list[str] | None = None,
) -> bytes:
    """The pickle of `value`; raises whatever pickling raises, and TooLarge beyond `limit` bytes.

    Args:
        buffers: Where large buffers go, out of the pickle; None: they stay in it. More than `buffers_limit` bytes of
            them are TooLarge.
        secrets: Where the types of pydantic's secrets in it are noted.
    """
    global _pickler
    if _pickler is None:
        _pickler = _pickler_class()
    left = [limit if buffers_limit is None else buffers_limit]

    def take(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if raw.nbytes < OUT_OF_BAND_BYTES:
            return True
        left[0] -= raw.nbytes
        if left[0] < 0:
            raise TooLarge
        assert buffers is not None
        buffers.append(raw)
        return False

    file = _Bounded(limit)
    pickler = _pickler(file, left_out, None if buffers is None else take)
    pickler.secrets = secrets
    pickler.dump(value)
    return file.getvalue()


def dump_checked(
    value: Any, limit: int, buffers_limit: int | None = None, secrets: list[str] | None = None
) -> tuple[bytes, list[memoryview]]:
    """The pickle of `value` and its large buffers, which have been loaded once and gave a value of the same type.

    Raises:
        TooLarge: the pickle takes more than `limit` bytes, or the buffers more than `buffers_limit`.
        PayloadError: it can't be pickled, or not loaded again; the message names the part to blame.
    """
    buffers: list[memoryview] = []
    try:
        text = dump(value, limit, None, buffers, buffers_limit, secrets)
    except TooLarge:
        raise
    except Exception as error:
        if isinstance(error.__cause__, TooLarge) or isinstance(error.__context__, TooLarge):
            raise TooLarge from None  # cloudpickle and the reducers of others raise their own
        if isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError):
            raise PayloadError(f"a {type_name(value)} can't be stored: it is nested too deeply to be pickled") from None
        where = _culprit(value, lambda part: dump(part, limit))
        raise PayloadError(
            f"a {type_name(value)} can't be stored: {where}can't be pickled ({type(error).__name__}: {error}). "
            "Pass plain data, a pydantic model or a dataclass, and make clients with pw.resource(factory)"
        ) from error
    try:
        back = pickle.loads(text, buffers=[buffer.toreadonly() for buffer in buffers])
    except Exception as error:
        where = _culprit(value, lambda part: pickle.loads(dump(part, limit)))
        raise PayloadError(
            f"a {type_name(value)} can't be stored: {where}is pickled but can't be loaded again "
            f"({type(error).__name__}: {error})"
        ) from error
    if type(back) is not type(value) and type_name(back) != type_name(value):
        raise PayloadError(f"a {type_name(value)} can't be stored: its pickle comes back as a {type_name(back)}")
    return text, buffers


def load(text: bytes | memoryview, buffers: Sequence[memoryview] = ()) -> Any:
    """What the pickle holds. Raises PayloadError with the cause where it can't be loaded here."""
    try:
        return pickle.loads(text, buffers=buffers)
    except Exception as error:
        raise PayloadError(
            f"a stored value can't be unpickled here ({type(error).__name__}: {error}): "
            "run where the code that made it is installed"
        ) from error


def type_name(value: Any) -> str:
    cls = type(value)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _culprit(value: Any, attempt: Callable[[Any], object], depth: int = 8) -> str:
    """The smallest part of `value` that fails, in words such as "its part ['rows'][3], a generator, "."""
    path = ""
    for _ in range(depth):
        for step, part in _parts(value)[:1000]:
            try:
                attempt(part)
            except Exception:
                path, value = path + step, part
                break
        else:
            break
    return f"its part {path}, a {type_name(value)}, " if path else "it "


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r:.40}]", part) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", part) for index, part in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [("{...}", part) for part in value]
    state = getattr(value, "__dict__", None)
    if isinstance(state, dict) and not isinstance(value, type):
        return [(f".{name}", part) for name, part in state.items()]
    return []
