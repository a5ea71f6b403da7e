"""What `@step` and `@workflow` make: the function with its checked options, registered so that other processes find it.

Made by `step.py` and `workflow.py`; used by `code` (where the code is found), by the attempt loop and by the runtime,
which never see the api classes. Rules:

* a definition is registered in its *home*: the module whose top-level code is running, else the function's module;
* a name means one definition in a home: a new one replaces the old one (a notebook cell run again);
* an explicit name belongs to one home: the same name from another is refused. Names given inside functions don't take
  part, for they can't be looked up in another process;
* a definition that another process can import is pickled by reference, any other by value with its function.

Fault: the registry is filled by imports; a module that defines steps only in some processes breaks the lookup there,
which the error of `resolve` says.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping
from types import FrameType
from typing import Any, ClassVar, Literal

from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.options import (
    StepOptions,
    WorkflowOptions,
    check_step_options,
    check_workflow_options,
    nearest,
    shown,
)
from pyworkflow_ray.execution.validation import Arguments, resolve_hints
from pyworkflow_ray.resilience.policy import RetryPolicy
from pyworkflow_ray.resilience.retry import DelayOf, ErrorFilter

Kind = Literal["step", "workflow"]


class DefinitionError(ConfigurationError, TypeError):
    """The decorated object can't be a step or workflow."""


class Definition:
    """A function under a name, with its options. Immutable in use; compared by identity.

    Attributes:
        name: What runs record: the explicit name, else `module:qualname`.
        home: Module whose import makes this definition, None where no import does.
        snapshot: (reference, key) where it was loaded from a snapshot.
        base: The definition that `.options()` was called on, None for the decorator's own.
        code_ref: Cache of `code.describe_step` / `describe_workflow`.
    """

    kind: ClassVar[Kind]

    def __init__(self, fn: Callable[..., Any], name: str | None, base: Definition | None = None) -> None:
        self.fn: Any = fn
        self.module: str = getattr(fn, "__module__", None) or "__main__"
        self.qualname: str = fn.__qualname__
        self.explicit = name is not None
        self.name = name or f"{self.module}:{self.qualname}"
        self.is_async = inspect.iscoroutinefunction(fn)
        self.home = _home(fn)
        self.base = base
        self.snapshot: tuple[str, str] | None = None
        self.code_ref: Any = None
        self._local_names: dict[str, Any] = _names_in_scope(fn) if base is None else base._local_names
        self._hints: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}>"

    @property
    def where(self) -> str:
        """File and line of the function, for messages."""
        code = getattr(inspect.unwrap(self.fn), "__code__", None)
        return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else self.module

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.fn)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that take one positional argument each."""
        return tuple(
            p.name for p in self.signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        )

    @functools.cached_property
    def arguments(self) -> Arguments:
        title = self.name if self.explicit else self.qualname
        return Arguments(self.signature, self.hints(), title)

    def hints(self) -> dict[str, Any]:
        """Resolved annotations of the parameters: in a snapshot they travel along, for their names do not."""
        if self._hints is None:
            self._hints = resolve_hints(inspect.unwrap(self.fn), self._local_names)
        return self._hints

    def validate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as validated, defaults left out.

        Raises:
            TypeError: they do not fit the signature.
            pydantic.ValidationError: a value does not fit its annotation.
        """
        return self.arguments.validate(args, kwargs)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As `validate`, with defaults filled in: two equal calls give equal arguments."""
        return self.arguments.bind(args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        found = reference(self)
        if found is not None:
            return (resolve, (self.kind, *found))
        return super().__reduce_ex__(protocol)

    def __getstate__(self) -> dict[str, Any]:
        self.hints()
        caches = ("signature", "names", "arguments", "code_ref")
        state = {key: value for key, value in self.__dict__.items() if key not in caches}
        state["_local_names"] = {}
        state["home"] = None
        if _leads_to_fn(self.module, self.qualname, self.fn):
            state["fn"] = _ImportedFunction(self.module, self.qualname)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.code_ref = None
        if isinstance(self.fn, _ImportedFunction):
            self.fn = self.fn.load()


class StepDefinition(Definition):
    """A step: function and policy. `retry_on`, `no_retry_on` and a callable `retry_delay` (`delay_of`) are code, and so
    no part of the policy's data."""

    kind: ClassVar[Kind] = "step"

    def __init__(self, fn: Callable[..., Any], options: StepOptions, base: StepDefinition | None = None) -> None:
        _check_function(fn, "@step")
        super().__init__(fn, options.name, base)
        for option in ("timeout", "total_timeout"):
            limit_s = getattr(options.policy, f"{option}_s")
            if self.is_async or options.executor != "local" or limit_s is None:
                continue
            raise ConfigurationError(
                f"@step {self.name}: {option}={limit_s:g} is not allowed on a sync step with "
                "executor='local': it can't be interrupted. Use executor='task', or make it async def"
            )
        self.policy: RetryPolicy = options.policy
        self.retry_on: ErrorFilter | None = options.retry_on
        self.no_retry_on: ErrorFilter = options.no_retry_on
        self.delay_of: DelayOf | None = options.delay_of
        self.executor: Literal["task", "local"] = options.executor
        self.ray_options: Mapping[str, Any] = dict(options.ray_options)
        self.breaker: Any = options.breaker
        self.given: Mapping[str, Any] = options.given
        register(self)

    def changed(self, options: Mapping[str, Any]) -> StepDefinition:
        """A copy with `options` changed; everything is checked again."""
        merged = {**self.given, **options}
        checked = check_step_options(merged, f"{self.name}.options()")
        copy = StepDefinition(self.fn, checked, base=self)
        if not copy.explicit:
            copy.name = self.name
        return copy

    @property
    def breaker_name(self) -> str | None:
        """Name of the breaker; asking a `CircuitBreaker` without one for it is its ConfigurationError."""
        if self.breaker is None or isinstance(self.breaker, str):
            return self.breaker
        return str(self.breaker.name)


class WorkflowDefinition(Definition):
    """A workflow: an async function with the options of its runs."""

    kind: ClassVar[Kind] = "workflow"

    def __init__(
        self, fn: Callable[..., Any], options: WorkflowOptions, base: WorkflowDefinition | None = None
    ) -> None:
        _check_function(fn, "@workflow")
        if not inspect.iscoroutinefunction(fn):
            raise DefinitionError(
                f"@workflow {fn.__qualname__}: a workflow is an async def; write: async def {fn.__name__}"
            )
        super().__init__(fn, options.name, base)
        self.version = options.version
        self.max_duration_s = options.max_duration_s
        self.max_recoveries = options.max_recoveries
        self.given: Mapping[str, Any] = options.given
        register(self)

    def changed(self, options: Mapping[str, Any]) -> WorkflowDefinition:
        """A copy with `options` changed; everything is checked again."""
        checked = check_workflow_options({**self.given, **options}, f"{self.name}.options()")
        copy = WorkflowDefinition(self.fn, checked, base=self)
        if not copy.explicit:
            copy.name = self.name
        return copy


# The registry -----------------------------------------------------------------------------------------------------

_by_home: dict[tuple[Kind, str], dict[str, Definition]] = {}
_explicit: dict[tuple[Kind, str], Definition] = {}


def register(definition: Definition) -> None:
    """Enter a definition under its name; a copy made by `.options()` only under a name of its own.

    Raises:
        ConfigurationError: another module has given the same explicit name.
    """
    if definition.base is not None and (not definition.explicit or definition.name == definition.base.name):
        return
    home = definition.home or definition.module
    if definition.explicit and "<locals>" not in definition.qualname:
        other = _explicit.get((definition.kind, definition.name))
        if other is not None and not _same_module(other, definition):
            raise ConfigurationError(
                f"{definition.kind} name {definition.name!r} is taken: {other.home or other.module} ({other.where}) "
                f"and {home} ({definition.where}) both give it. Rename one of them"
            )
        _explicit[definition.kind, definition.name] = definition
    names = _by_home.setdefault((definition.kind, home), {})
    replaced = names.get(definition.name)
    if replaced is not None:
        replaced.code_ref = None
    names[definition.name] = definition


def forget_modules(modules: Collection[str]) -> None:
    """Definitions of these modules are no more: the modules are imported anew."""
    for key in [key for key in _by_home if key[1] in modules]:
        del _by_home[key]
    for name in [name for name, found in _explicit.items() if (found.home or found.module) in modules]:
        del _explicit[name]
    _importable.clear()


def registered(kind: Kind) -> list[Definition]:
    """Every definition of this process that no other has replaced."""
    return [found for (sort, _), names in _by_home.items() if sort == kind for found in names.values()]


def short_name(definition: Definition) -> str:
    """`qualname` where no other registered definition has it, else the full name; an explicit name as it is."""
    if definition.explicit:
        return definition.name
    same = {other.name for other in registered(definition.kind) if other.qualname == definition.qualname}
    return definition.qualname if len(same | {definition.name}) == 1 else definition.name


def _same_module(one: Definition, other: Definition) -> bool:
    if (one.home or one.module) == (other.home or other.module):
        return True
    # `python -m pkg.mod` makes the module twice, as __main__ and under its name
    return "__main__" in (one.home or one.module, other.home or other.module) and (
        one.where.rpartition(":")[0] == other.where.rpartition(":")[0]
    )


# References -------------------------------------------------------------------------------------------------------


def reference(definition: Definition) -> tuple[Literal["import", "registered"], str, str] | None:
    """(how, module, qualname or name) by which another process gets this very definition; None: only by value."""
    found = attribute(definition.module, definition.qualname)
    if found is not None and getattr(found, "definition", None) is definition and is_importable(definition.module):
        return ("import", definition.module, definition.qualname)
    home = definition.home
    if home is not None and _by_home.get((definition.kind, home), {}).get(definition.name) is definition:
        return ("registered", home, definition.name) if is_importable(home) else None
    return None


def resolve(kind: Kind, how: str, module: str, name: str) -> Any:
    """The definition that `reference` described, in this process.

    Raises:
        ConfigurationError: the module can't be imported, or has no such definition.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"{kind} {name!r} needs module {module!r}, which can't be imported here: {error}. Import path: "
            f"{', '.join(sys.path[:8])}"
        ) from error
    names = _by_home.get((kind, module), {})
    if how == "import":
        found = getattr(attribute(module, name), "definition", None)
        known = [d.qualname for d in names.values()]
    else:
        found = names.get(name)
        known = list(names)
    if not isinstance(found, Definition) or found.kind != kind:
        raise ConfigurationError(
            f"module {module!r} ({getattr(sys.modules[module], '__file__', '?')}) has no {kind} {name!r}."
            f"{nearest(name, known)} It must be made whenever the module is imported; restore it, or start a new run"
        )
    return found


def attribute(module: str, qualname: str) -> Any:
    """The object at `module`, `qualname`, None where there is none. Imports nothing."""
    found: Any = sys.modules.get(module)
    if found is None or "<" in qualname:
        return None
    for part in qualname.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found


def is_importable(module: str) -> bool:
    """Whether a process with the same import roots can import `module`: not `__main__`, nor one made by hand."""
    if module == "__main__" or module not in sys.modules:
        return False
    top = sys.modules.get(module.partition(".")[0])
    spec = getattr(top, "__spec__", None)
    if spec is None or getattr(sys.modules[module], "__spec__", None) is None:
        return False
    known = _importable.get(spec.name)
    if known is None or known[0] is not spec or known[1] != len(sys.path):
        known = (spec, len(sys.path), _can_find(spec))
        _importable[spec.name] = known
    return known[2]


_importable: dict[str, tuple[Any, int, bool]] = {}


def _can_find(spec: Any) -> bool:
    # importlib.util.find_spec answers from sys.modules; only the finders know whether a new process would find it
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        try:
            found = find(spec.name, None) if find is not None else None
        except Exception:  # a foreign finder
            continue
        if found is not None:
            return bool(found.origin == spec.origin)
    return False


class _ImportedFunction:
    """Stands in a pickle for the bare function of a step that can be imported."""

    def __init__(self, module: str, qualname: str) -> None:
        self.module = module
        self.qualname = qualname

    def load(self) -> Callable[..., Any]:
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            raise ConfigurationError(f"module {self.module!r} can't be imported here: {error}") from error
        fn = getattr(attribute(self.module, self.qualname), "fn", None)
        if fn is None:
            raise ConfigurationError(f"module {self.module!r} has no step {self.qualname!r}")
        return fn  # type: ignore[no-any-return]


def _leads_to_fn(module: str, qualname: str, fn: Callable[..., Any]) -> bool:
    """Whether the name leads to a step or workflow of `fn`: cloudpickle, which looks for `fn` itself, would copy it."""
    found = attribute(module, qualname)
    return found is not None and found is not fn and getattr(found, "fn", None) is fn and is_importable(module)


# Where a definition is made ---------------------------------------------------------------------------------------


def _home(fn: Callable[..., Any]) -> str | None:
    """The module whose top-level code is running: importing it makes this definition again."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            name = frame.f_globals.get("__name__")
            module = sys.modules.get(name) if isinstance(name, str) else None
            if module is not None and module.__dict__ is frame.f_globals:
                return name if name != "__main__" else None
            return None
        frame = frame.f_back
    return None


def _names_in_scope(fn: Callable[..., Any]) -> dict[str, Any]:
    """Local names that annotations written as text may mean, of a function defined inside a function."""
    if "<locals>" not in fn.__qualname__ or sys.version_info >= (3, 14):
        return {}
    texts = [value for value in getattr(fn, "__annotations__", {}).values() if isinstance(value, str)]
    wanted = set(re.findall(r"[A-Za-z_]\w*", " ".join(texts)))
    scope = fn.__qualname__.rpartition(".<locals>")[0].rpartition(".")[2]
    frame: FrameType | None = sys._getframe(2)
    while wanted and frame is not None:
        if frame.f_code.co_name == scope and frame.f_globals is getattr(fn, "__globals__", None):
            return {name: frame.f_locals[name] for name in wanted if name in frame.f_locals}
        frame = frame.f_back
    return {}


def _check_function(fn: Any, where: str) -> None:
    if hasattr(fn, "definition") and isinstance(fn.definition, Definition):
        raise DefinitionError(
            f"{where}: {fn.definition.name} is a {fn.definition.kind} already; use .options(...) for a changed copy"
        )
    if isinstance(fn, (staticmethod, classmethod)) or not inspect.isfunction(fn):
        raise DefinitionError(
            f"{where}: {shown(fn)} is no function. Decorate a def or async def; wrap anything else in one"
        )
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise DefinitionError(f"{where}: {fn.__qualname__} is a generator; return a list, or make one step an item")
