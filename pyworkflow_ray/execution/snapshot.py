"""Code by value: a workflow and all its steps in one cloudpickle, so that another process runs the same code.

Called by `code`; calls `definitions`. One snapshot, because what is pickled together stays one: the exception class a
step raises is the class that the workflow's `except` names. Values and errors that are pickled later find it again by
cloudpickle's class tracker: a class that came out of a snapshot goes back under the number it had there.

What is inside: a header line, then two pickles of one pickler. The first is the workflow, the second every step by
value that it reaches, under a key. Modules under the import roots stay references.

Faults: a global that can't be pickled (client, lock: named, with the remedy); another minor version of Python (refused:
bytecode fits only its own); a global that was changed since (a dump says whether it still is what a new one would be).
"""

from __future__ import annotations

import functools
import io
import json
import logging
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cloudpickle

from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.definitions import (
    Definition,
    StepDefinition,
    WorkflowDefinition,
    is_importable,
    reference,
)
from pyworkflow_ray.execution.environment import python_version
from pyworkflow_ray.execution.options import shown

_MAGIC = b"pyworkflow-ray code 1 "
_FIXED = (str, int, float, bool, bytes, type(None), types.ModuleType, types.BuiltinFunctionType, logging.Logger)


class Snapshot(NamedTuple):
    """Code loaded by value: the definition that was dumped, and the steps by value that it reaches, by key."""

    definition: Definition
    steps: dict[str, StepDefinition]


class Dump(NamedTuple):
    """Code by value, and how to tell whether it still is what a new dump would hold (`watched`; None: can't tell)."""

    data: bytes
    watched: list[tuple[Callable[[], Any], Any]] | None

    def is_current(self) -> bool:
        return self.watched is not None and all(look() is value for look, value in self.watched)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Notes what it pickles by value."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.steps: list[StepDefinition] = []
        self.functions: list[types.FunctionType] = []
        self.classes: list[type] = []

    def reducer_override(self, obj: Any) -> Any:
        reduced = super().reducer_override(obj)
        if isinstance(obj, StepDefinition):
            if reference(obj) is None:
                self.steps.append(obj)
        elif reduced is not NotImplemented:
            if isinstance(obj, type):
                self.classes.append(obj)
            elif isinstance(obj, types.FunctionType):
                self.functions.append(obj)
        return reduced


def dump_workflow(workflow: WorkflowDefinition) -> Dump:
    """The workflow and its steps by value.

    Raises:
        ConfigurationError: something it reaches can't be shipped; the message names it.
    """
    return _dump(workflow, workflow)


def dump_step(step: StepDefinition) -> bytes:
    """One step by value, with its options: for a step that no snapshot holds.

    Raises:
        ConfigurationError: as `dump_workflow`.
    """
    return _dump(step, step).data


def _dump(obj: Definition, owner: Definition) -> Dump:
    file = io.BytesIO()
    header = {"python": python_version(), "cloudpickle": cloudpickle.__version__, "name": owner.name}
    file.write(_MAGIC + json.dumps(header, sort_keys=True).encode() + b"\n")
    pickler = _Pickler(file)
    strange = _modules_by_value(owner)
    try:
        pickler.dump(obj)
        pickler.dump(dict(_keyed(pickler.steps)))
    except Exception as error:
        raise _explain(owner, pickler.functions, error) from error
    finally:
        for module in strange:
            cloudpickle.unregister_pickle_by_value(module)
    return Dump(file.getvalue(), _watch(pickler))


def load(data: bytes, where: str = "") -> Snapshot:
    """What `dump_workflow` or `dump_step` wrote.

    Raises:
        ConfigurationError: it is no snapshot, of another Python, or its modules can't be imported here.
    """
    head, _, body = data.partition(b"\n")
    if not head.startswith(_MAGIC):
        raise ConfigurationError(f"code {where} is no snapshot of pyworkflow-ray of version 1")
    header = json.loads(head[len(_MAGIC) :])
    if header["python"] != python_version():
        raise ConfigurationError(
            f"the code of {header['name']!r} was stored by Python {header['python']}, this is {python_version()} "
            f"({sys.executable}). Use the same minor version"
        )
    unpickler = pickle.Unpickler(io.BytesIO(body))
    try:
        return Snapshot(unpickler.load(), unpickler.load())
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"the stored code of {header['name']!r} can't be loaded here: {type(error).__name__}: {error}. "
            f"Import path: {', '.join(sys.path[:8])}"
        ) from error


def _keyed(steps: list[StepDefinition]) -> Iterator[tuple[str, StepDefinition]]:
    """Steps under their names; two of one name (a function called twice, an `.options()` copy) are told apart."""
    seen: dict[str, int] = {}
    for step in steps:
        number = seen[step.name] = seen.get(step.name, 0) + 1
        yield (step.name if number == 1 else f"{step.name}#{number}"), step


# Is a dump still current? -----------------------------------------------------------------------------------------


def _watch(pickler: _Pickler) -> list[tuple[Callable[[], Any], Any]] | None:
    """What the dumped functions look up, with what it was; None where something may change without a new object."""
    watched: list[tuple[Callable[[], Any], Any]] = []
    for fn in pickler.functions:
        if fn.__dict__ and not all(_is_fixed(value) for value in fn.__dict__.values()):
            return None
        for _, look, value in _reached(fn):
            if not _is_fixed(value):
                return None
            watched.append((look, value))
        watched.append((functools.partial(getattr, fn, "__code__"), fn.__code__))
    for cls in pickler.classes:
        for name, value in vars(cls).items():
            if not name.startswith("__"):
                if isinstance(value, (list, dict, set, bytearray)):
                    return None
                watched.append((functools.partial(vars(cls).get, name), value))
    return watched


def _is_fixed(value: Any) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(_is_fixed(item) for item in value)
    if isinstance(value, (*_FIXED, types.FunctionType, type, Definition)):
        return True
    if isinstance(getattr(value, "definition", None), Definition):
        return True
    return type(value).__module__.startswith("pyworkflow_ray.")  # resources and breakers travel by name


def _reached(fn: types.FunctionType) -> Iterator[tuple[str, Callable[[], Any], Any]]:
    """(description, look-up, value) for each global, closed-over variable and default of a function."""
    names = _global_names(fn.__code__)
    for name in sorted(names):
        if name in fn.__globals__:
            yield f"global {name!r}", functools.partial(fn.__globals__.get, name), fn.__globals__[name]
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not yet bound
            continue
        yield f"variable {name!r}", functools.partial(getattr, cell, "cell_contents", None), value
    for value in (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()):
        yield "a default argument", functools.partial(_itself, value), value


def _itself(value: Any) -> Any:
    return value


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= _global_names(const)
    return names


# What can't be shipped --------------------------------------------------------------------------------------------


def _explain(owner: Definition, functions: list[types.FunctionType], error: Exception) -> ConfigurationError:
    """The global that can't be pickled, by trying each: the deepest that is not itself code."""
    if isinstance(error, ConfigurationError):
        return error
    for fn in reversed(functions):
        for what, _, value in _reached(fn):
            if isinstance(value, (types.FunctionType, type, types.ModuleType)) or _is_fixed(value):
                continue
            cause = _cannot_pickle(value)
            if cause is None:
                continue
            name = what.partition("'")[2].rstrip("'") or "client"
            return ConfigurationError(
                f"{owner.kind} {owner.name!r} can't be sent to other processes: {what} ({type(value).__module__}."
                f"{type(value).__qualname__}) of {fn.__qualname__} ({fn.__code__.co_filename}:"
                f"{fn.__code__.co_firstlineno}) can't be pickled: {cause}. Make it once in each worker instead: "
                f"{name} = pw.resource(lambda: ...) at module level, and {name}() in the step"
            )
    return ConfigurationError(
        f"{owner.kind} {owner.name!r} ({owner.where}) can't be sent to other processes: {type(error).__name__}: "
        f"{shown(str(error))}. Move it into a module that workers can import, or make what it uses with pw.resource"
    )


def _cannot_pickle(value: Any) -> str | None:
    try:
        _Pickler(io.BytesIO()).dump(value)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _modules_by_value(owner: Definition) -> list[types.ModuleType]:
    """The owner's own module where no other process could import it: its functions and classes then go by value."""
    module = sys.modules.get(owner.module)
    if module is None or owner.module == "__main__" or is_importable(owner.module):
        return []
    if owner.module in cloudpickle.list_registry_pickle_by_value():
        return []
    cloudpickle.register_pickle_by_value(module)
    return [module]
