"""Recipes that rebuild exceptions without calling their constructors. Called by the codec and the pickler.

The errors of httpx, aiohttp, openai and grpc don't survive pickle: it calls their constructor with `args`, which their
keyword-only parameters refuse. A recipe holds, for the exception and everything it hangs on, the class, `args`,
`__dict__`, slots (those of the built-in classes are there as well: `OSError.errno`, `UnicodeError.start`), notes, and
by index `__cause__`, `__context__` and the members of a group. It is JSON where the parts are, so that plain exceptions
come back with pickles switched off.

Rules: what can't be stored is left out and named in a note of the rebuilt exception; a cycle is cut; an exception of
which nothing can be rebuilt has no recipe. Nothing here raises because of what an exception holds.
"""

from __future__ import annotations

import base64
import functools
import pickle
import threading
import types
from typing import Any, cast

from pydantic_core import to_json

from pyworkflow_ray.errors import PayloadError
from pyworkflow_ray.storage import pickling
from pyworkflow_ray.storage.payload import (
    NotJson,
    TooLarge,
    class_ref,
    clean_text,
    copy_json,
    decode_model,
    encode_json,
    encode_model,
    find_class,
    is_model,
)

MAX_PART_BYTES = 1 << 20  # one argument or attribute: a response's body may be worth keeping, a gigabyte of it is not
MAX_NODES = 100  # exceptions in one recipe: chains and groups beyond it are cut
MAX_NOTES, MAX_NOTE_CHARS = 50, 4000
_HEAP_TYPE = 1 << 9
_SKIPPED_SLOTS = {"obj"}  # AttributeError.obj and NameError.obj: a live object of the user's, left out by CPython too
_LEFT_OUT = "pyworkflow-ray: left out when this exception was stored: "

Recipe = dict[str, Any]
_local = threading.local()
_BASE: Any = BaseException  # its descriptors, for the __setattr__ of a frozen dataclass would refuse


# Taking apart -----------------------------------------------------------------------------------------------------


def take_apart(error: BaseException, allow_pickle: bool) -> Recipe | None:
    """The recipe of `error`, tried once; None where it can't be rebuilt."""
    try:
        recipe: Recipe = {"nodes": [None]}
        writer = _Writer(allow_pickle)
        writer.node(error)
        recipe["nodes"] = writer.nodes
        if all(node.get("plain") for node in writer.nodes):
            return recipe
        if type(rebuild(recipe, allow_pickle)) is type(error):
            return recipe
    except Exception:
        pass
    return _whole(error) if allow_pickle else None


def _whole(error: BaseException) -> Recipe | None:
    """For classes that can only be made by their own means, such as pydantic's ValidationError."""
    try:
        text = pickle.dumps(error, protocol=pickling.PROTOCOL)
        if len(text) <= MAX_PART_BYTES and type(pickle.loads(text)) is type(error):
            return {"whole": base64.b64encode(text).decode()}
    except Exception:
        pass
    return None


class _Writer:
    def __init__(self, allow_pickle: bool) -> None:
        self.allow_pickle = allow_pickle
        self.nodes: list[dict[str, Any]] = []
        self.index: dict[int, int] = {}
        self.open = _open_ids()

    def node(self, error: BaseException) -> int | None:
        """Index of the node of `error`; None where a cycle or a long chain is cut."""
        if id(error) in self.open or (id(error) not in self.index and len(self.nodes) >= MAX_NODES):
            return None
        if id(error) in self.index:
            return self.index[id(error)]
        index = self.index[id(error)] = len(self.nodes)
        self.open.add(id(error))
        node: dict[str, Any] = {}
        self.nodes.append(node)
        left_out: list[str] = []
        try:
            self._own(error, node, left_out)
            self._links(error, node, left_out)
        finally:
            self.open.discard(id(error))
        if left_out:
            node["left_out"] = left_out
        plain = class_ref(type(error)) == node["cls"] and node["cls"].startswith("builtins:")
        if plain and set(node) <= {"cls", "args", "cause", "context", "suppress"} and _all_json(node["args"]):
            node["plain"] = 1
        return index

    def _own(self, error: BaseException, node: dict[str, Any], left_out: list[str]) -> None:
        cls = type(error)
        ref = class_ref(cls)
        if ref is None and self.allow_pickle:
            node["cls"] = {"value": _base64(pickling.dump(cls, MAX_PART_BYTES))}
        elif ref is None:
            raise PayloadError(f"{cls.__qualname__} can't be imported elsewhere, and pickles are switched off")
        else:
            node["cls"] = ref
        args = tuple(_BASE.args.__get__(error))
        if isinstance(error, BaseExceptionGroup):
            node["message"] = clean_text(str(error.message), MAX_NOTE_CHARS)
            args = ()
        node["args"] = [self._part(f"args[{i}]", arg, left_out, keep=True) for i, arg in enumerate(args)]
        for field, values in (("state", dict(error.__dict__)), ("slots", _slots(error))):
            notes = values.pop("__notes__", None) if field == "state" else None
            if isinstance(notes, list) and notes:
                node["notes"] = [clean_text(str(note), MAX_NOTE_CHARS) for note in notes[:MAX_NOTES]]
            parts = {name: self._part(name, value, left_out) for name, value in values.items() if type(name) is str}
            kept = {name: part for name, part in parts.items() if part is not None}
            if kept:
                node[field] = kept

    def _links(self, error: BaseException, node: dict[str, Any], left_out: list[str]) -> None:
        if isinstance(error, BaseExceptionGroup):
            members = [self.node(member) for member in error.exceptions]
            node["members"] = [member for member in members if member is not None]
            if None in members:
                left_out.append(f"{members.count(None)} of its {len(members)} members")
        for name, linked in (("cause", error.__cause__), ("context", error.__context__)):
            index = self.node(linked) if linked is not None else None
            if index is not None:
                node[name] = index
        if error.__suppress_context__:
            node["suppress"] = 1

    def _part(self, name: str, value: Any, left_out: list[str], keep: bool = False) -> list[Any] | None:
        """The stored form of one argument or attribute. One that has none is named; `keep` puts a text in its place."""
        try:
            if isinstance(value, BaseException):
                index = self.node(value)
                if index is None:
                    raise PayloadError("a cycle")
                return ["error", index]
            if type(value) is str and value.isascii() and len(value) <= MAX_PART_BYTES:
                return ["json", value]  # what most errors have: their text
            try:
                return ["json", encode_json(value, MAX_PART_BYTES).data]
            except NotJson:
                pass
            encoded = encode_model(value, MAX_PART_BYTES) if is_model(value) else None
            if encoded is not None:
                return ["model", encoded.data, encoded.cls]
            if not self.allow_pickle:
                raise PayloadError("pickles are switched off")
            inner: list[str] = []
            text = pickling.dump(value, MAX_PART_BYTES, inner)
            pickle.loads(text)
            if inner:
                left_out.append(f"{name} without its {', '.join(sorted(set(inner)))}")
            return ["pickle", _base64(text)]
        except Exception as error:
            why = "larger than 1 MiB" if isinstance(error, TooLarge) else pickling.type_name(value)
            left_out.append(f"{name} ({why})")
            return ["json", f"<{pickling.type_name(value)}>"] if keep else None


def _slots(error: BaseException) -> dict[str, Any]:
    """Values outside `__dict__`: slots of the user's classes, and the fields of the built-in ones."""
    values: dict[str, Any] = {}
    made_by: Any = type(error)
    for name, cls, descriptor in _descriptors(made_by):
        if name not in values:
            try:
                value = descriptor.__get__(error, cls)
            except AttributeError:
                continue
            if value is not None:
                values[name] = value
    return values


@functools.lru_cache(512)
def _descriptors(of: type) -> tuple[tuple[str, type, Any], ...]:
    """Name, class and descriptor of each such field, nearest class first."""
    plain = (BaseException, Exception, object, BaseExceptionGroup, ExceptionGroup)
    return tuple(
        (name, cls, descriptor)
        for cls in of.__mro__
        if cls not in plain
        for name, descriptor in cls.__dict__.items()
        if isinstance(descriptor, types.MemberDescriptorType) and name not in _SKIPPED_SLOTS
    )


def _all_json(parts: list[Any]) -> bool:
    return all(part[0] == "json" for part in parts)


def _base64(text: bytes) -> str:
    return base64.b64encode(text).decode()


def _open_ids() -> set[int]:
    """Ids of the exceptions that this thread is taking apart: one met again inside itself, wherever, is cut."""
    ids: set[int] | None = getattr(_local, "ids", None)
    if ids is None:
        ids = _local.ids = set()
    return ids


# Putting together -------------------------------------------------------------------------------------------------


def rebuild(recipe: Recipe, allow_pickle: bool) -> BaseException:
    """The exception of `recipe`. Raises PayloadError, or what importing its class raises, where it can't be made."""
    if "whole" in recipe:
        found = _unpickle(recipe["whole"], allow_pickle)
        if not isinstance(found, BaseException):
            raise PayloadError(f"a stored exception was decoded as {pickling.type_name(found)}")
        return found
    nodes: list[dict[str, Any]] = recipe["nodes"]
    made: dict[int, BaseException] = {}
    for index, node in enumerate(nodes):
        error = _make(index, nodes, made, allow_pickle)
        if "cause" in node:
            _BASE.__cause__.__set__(error, _make(node["cause"], nodes, made, allow_pickle))
        if "context" in node:
            _BASE.__context__.__set__(error, _make(node["context"], nodes, made, allow_pickle))
        _BASE.__suppress_context__.__set__(error, bool(node.get("suppress")))
    return made[0]


def _make(index: int, nodes: list[dict[str, Any]], made: dict[int, BaseException], allow_pickle: bool) -> BaseException:
    """Exception number `index`, made once, and before it the exceptions among its members and attributes."""
    if index in made:
        return made[index]
    node = nodes[index]

    def value(part: list[Any]) -> Any:
        return _make(part[1], nodes, made, allow_pickle) if part[0] == "error" else _value(part, allow_pickle)

    ref = node["cls"]
    cls = find_class(ref) if isinstance(ref, str) else _unpickle(ref["value"], allow_pickle)
    if not (isinstance(cls, type) and issubclass(cls, BaseException)):
        raise PayloadError(f"{ref} of a stored exception is no exception class")
    error: BaseException
    if issubclass(cls, BaseExceptionGroup):
        members = [_make(member, nodes, made, allow_pickle) for member in node.get("members", [])]
        members = members or [RuntimeError("the members of this group were left out")]  # an empty group can't exist
        error = BaseExceptionGroup.__new__(cls, node.get("message", ""), cast(Any, members))
    else:
        base: type = cls
        while base.__flags__ & _HEAP_TYPE:
            base = cast(type, base.__base__)
        error = base.__new__(cls)  # type: ignore[call-overload]
        args = tuple(value(part) for part in node["args"])
        _BASE.args.__set__(error, args)
    for name, part in node.get("slots", {}).items():
        _set_slot(error, name, value(part))
    made[index] = error
    error.__dict__.update({name: value(part) for name, part in node.get("state", {}).items()})
    notes = list(node.get("notes", ()))
    if node.get("left_out"):
        notes.append(_LEFT_OUT + "; ".join(node["left_out"]))
    if notes:
        error.__dict__["__notes__"] = notes
    return error


def _set_slot(error: BaseException, name: str, value: Any) -> None:
    for cls in type(error).__mro__:
        descriptor = cls.__dict__.get(name)
        if isinstance(descriptor, types.MemberDescriptorType):
            try:
                descriptor.__set__(error, value)
            except (AttributeError, TypeError):  # a field that is read-only
                pass
            return


def _value(part: list[Any], allow_pickle: bool) -> Any:
    if part[0] == "json":
        return copy_json(part[1])
    if part[0] == "model":
        return decode_model(to_json(part[1]), part[2])
    return _unpickle(part[1], allow_pickle)


def _unpickle(text: str, allow_pickle: bool) -> Any:
    if not allow_pickle:
        raise PayloadError("a stored exception holds a pickle, and pickles are switched off (allow_pickle=False)")
    return pickling.load(base64.b64decode(text))


def holds_pickle(recipe: Recipe) -> bool:
    """Whether a part of `recipe` is a pickle, so that its version of Python matters."""
    if "whole" in recipe:
        return True
    for node in recipe["nodes"]:
        parts = [*node["args"], *node.get("state", {}).values(), *node.get("slots", {}).values()]
        if not isinstance(node["cls"], str) or any(part[0] == "pickle" for part in parts):
            return True
    return False


# Inside pickles ---------------------------------------------------------------------------------------------------


def reduce_exception(error: BaseException) -> Any:
    """How the pickler stores an exception that lies somewhere inside a value: by its recipe, else by its own means."""
    if id(error) in _open_ids():
        raise PayloadError(f"a {pickling.type_name(error)} contains itself")
    recipe = take_apart(error, allow_pickle=True)
    if recipe is None or "whole" in recipe:
        return NotImplemented
    return (_rebuild_pickled, (recipe,))


def _rebuild_pickled(recipe: Recipe) -> BaseException:
    return rebuild(recipe, allow_pickle=True)
