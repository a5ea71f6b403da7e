"""Where code is found: a `CodeRef` for a workflow or step, and the definition for a `CodeRef`.

Called by `step.py` (for each step call of a workflow) and by the runtime; calls `definitions` and `snapshot`. In order
of preference:

1. "import": module and qualified name lead back to the same object;
2. "registered": importing the module makes it, and it is found by its name (a step in a dict, one function under
   several steps);
3. "snapshot": by value, workflow and steps together (`__main__`, notebooks, functions defined in functions);
4. "value": by value, alone: a step made while its workflow ran, or one whose `retry_on` was changed by `.options()`.

An `.options()` copy whose code is its base's is found as its base: the changed policy travels with the call.

Fault: code by value is a pickle; whoever can write the storage can run code, as the docs say.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from pyworkflow_ray.engine.events import CodeRef, Payload
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.definitions import (
    Definition,
    StepDefinition,
    WorkflowDefinition,
    forget_modules,
    reference,
    resolve,
)
from pyworkflow_ray.execution.environment import python_version
from pyworkflow_ray.execution.snapshot import (
    Dump,
    Snapshot,
    dump_step,
    dump_workflow,
    load,
)

_LOCAL = "local"  # the `ref` of code that stays in this process
_KEPT = 64  # snapshots and steps by value kept in a process: a notebook makes a new one for each edited cell


def describe_workflow(
    definition: WorkflowDefinition, put_snapshot: Callable[[bytes], str], *, allow_pickle: bool = True
) -> CodeRef:
    """Where the workflow's code is; by value it is handed to `put_snapshot` (durable, returns its reference) first.

    Raises:
        ConfigurationError: it must go by value, and pickles are switched off (`allow_pickle=False`) or something it
            uses can't be pickled; the message names it.
    """
    base = _code_base(definition)
    found = _described(base)
    if found is not None:
        return found
    _check_pickle(allow_pickle, definition.kind, definition.name)
    dump: Dump | None = _dumps.get(base)
    if dump is None or not dump.is_current():
        dump = dump_workflow(base)
        _dumps.put(base, dump)
    return CodeRef(how="snapshot", name=definition.name, ref=put_snapshot(dump.data))


def describe_step(definition: StepDefinition) -> CodeRef:
    """Where the step's code is. Cheap but for a step by value, pickled at each call, as its closure may change.

    Raises:
        ConfigurationError: as `describe_workflow`.
    """
    if definition.code_ref is not None:
        return definition.code_ref  # type: ignore[no-any-return]
    base = _code_base(definition)
    found = _described(base)
    if found is None:
        data = dump_step(base)
        return CodeRef(how="value", name=base.name, payload=_payload(data))
    if found.ref != _LOCAL:
        definition.code_ref = found
    return found


def load_workflow(
    code: CodeRef, get_snapshot: Callable[[str], bytes], *, allow_pickle: bool = True
) -> WorkflowDefinition:
    """The workflow that `code` describes, in this process; enter its environment first.

    Raises:
        ConfigurationError: it is not to be had here; the message says what is missing.
    """
    if code.how in ("import", "registered"):
        found = _resolve("workflow", code)
    elif code.ref == _LOCAL:
        found = _local_definition(code)
    else:
        _check_pickle(allow_pickle, "workflow", code.name)
        found = _snapshot(code, get_snapshot).definition
    if not isinstance(found, WorkflowDefinition):
        raise ConfigurationError(f"the stored code {code.ref} holds no workflow {code.name!r}")
    return found


def load_step(
    code: CodeRef,
    get_snapshot: Callable[[str], bytes],
    decode: Callable[[Payload], Any],
    *,
    allow_pickle: bool = True,
) -> StepDefinition:
    """The step that `code` describes, in this process; enter its environment first.

    Args:
        decode: The codec's: gives the bytes of a step by value, or refuses them (pickles switched off).

    Raises:
        ConfigurationError: it is not to be had here; the message says what is missing.
    """
    if code.how in ("import", "registered"):
        found = _resolve("step", code)
    elif code.how == "value":
        found = _step_by_value(code, decode)
    elif code.ref == _LOCAL:
        found = _local_definition(code)
    else:
        _check_pickle(allow_pickle, "step", code.name)
        snapshot = _snapshot(code, get_snapshot)
        found = snapshot.steps.get(code.name)
        if found is None:
            raise ConfigurationError(
                f"the stored code {code.ref} holds no step {code.name!r}, only: {', '.join(snapshot.steps) or 'none'}"
            )
    if not isinstance(found, StepDefinition):
        raise ConfigurationError(f"the code of step {code.name!r} holds no step")
    return found


def forget(modules: set[str]) -> None:
    """These modules are imported anew: code by value that has objects of them is loaded anew as well."""
    forget_modules(modules)
    for kept in (_dumps, _snapshots, _values):
        kept.clear()


@contextlib.contextmanager
def local_code() -> Iterator[None]:
    """Within it, code that would go by value stays in this process: for tests, whose steps close over variables."""
    global _local_depth
    with _lock:
        _local_depth += 1
    try:
        yield
    finally:
        with _lock:
            _local_depth -= 1
            if _local_depth == 0:
                _local.clear()


# Describing -------------------------------------------------------------------------------------------------------


def _code_base(definition: Any) -> Any:
    """The definition whose code this one runs: an `.options()` copy runs its base's unless its code was changed."""
    while definition.base is not None:
        base = definition.base
        if isinstance(definition, StepDefinition) and (
            definition.retry_on != base.retry_on
            or definition.no_retry_on != base.no_retry_on
            or definition.delay_of != base.delay_of
        ):
            break
        if reference(definition) is not None or definition.snapshot is not None:
            break
        definition = base
    return definition


def _described(definition: Definition) -> CodeRef | None:
    found = reference(definition)
    if found is not None:
        how, module, name = found
        return CodeRef(
            how=how, name=definition.name, module=module, qualname=name if how == "import" else definition.qualname
        )
    if definition.snapshot is not None:
        ref, key = definition.snapshot
        return CodeRef(how="snapshot", name=key, ref=ref)
    if _local_depth:
        return CodeRef(how="snapshot", name=_keep_local(definition), ref=_LOCAL)
    return None


def _check_pickle(allowed: bool, kind: str, name: str) -> None:
    if not allowed:
        raise ConfigurationError(
            f"{kind} {name!r} can only travel by value, as a pickle, and allow_pickle is off. Define it at the top of "
            "a module that workers can import"
        )


def _payload(data: bytes) -> Payload:
    """One step by value in the codec's form: a pickle of bytes, so that it decodes to `data`."""
    pickled = pickle.dumps(data, protocol=5)
    return Payload(
        enc="pickle",
        data=base64.b64encode(pickled).decode(),
        size=len(pickled),
        cls="builtins:bytes",
        py=python_version(),
        preview="code of a step",
    )


# Loading ----------------------------------------------------------------------------------------------------------

_lock = threading.RLock()
_local: dict[str, Definition] = {}
_local_depth = 0


class _Recent:
    """The last few values by key, thread-safe."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any) -> Any:
        with _lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Any, value: Any) -> None:
        with _lock:
            self._values[key] = value
            while len(self._values) > self._size:
                self._values.popitem(last=False)

    def clear(self) -> None:
        with _lock:
            self._values.clear()


_dumps = _Recent(_KEPT)
_snapshots = _Recent(_KEPT)
_values = _Recent(_KEPT)


def _resolve(kind: Any, code: CodeRef) -> Any:
    name = code.qualname if code.how == "import" else code.name
    return resolve(kind, code.how, code.module or "", name or code.name)


def _snapshot(code: CodeRef, get_snapshot: Callable[[str], bytes]) -> Snapshot:
    ref = code.ref or ""
    with _lock:  # two threads must not load it twice: there would be two of each class
        snapshot: Snapshot | None = _snapshots.get(ref)
        if snapshot is None:
            snapshot = load(get_snapshot(ref), ref)
            snapshot.definition.snapshot = (ref, snapshot.definition.name)
            for key, step in snapshot.steps.items():
                step.snapshot = (ref, key)
            _snapshots.put(ref, snapshot)
    return snapshot


def _step_by_value(code: CodeRef, decode: Callable[[Payload], Any]) -> Any:
    if code.payload is None:
        raise ConfigurationError(f"the code of step {code.name!r} is missing from its event")
    data = decode(code.payload)  # always asked: it may refuse
    key = hashlib.sha256(data).digest()
    with _lock:
        found = _values.get(key)
        if found is None:
            found = load(data, f"of step {code.name!r}").definition
            _values.put(key, found)
    return found


def _keep_local(definition: Definition) -> str:
    with _lock:
        number = 1
        while True:
            key = definition.name if number == 1 else f"{definition.name}#{number}"
            kept = _local.setdefault(key, definition)
            if kept is definition:
                return key
            number += 1


def _local_definition(code: CodeRef) -> Definition:
    with _lock:
        found = _local.get(code.name)
    if found is None:
        raise ConfigurationError(
            f"the code of {code.name!r} was kept in the process of a test environment that has ended"
        )
    return found
