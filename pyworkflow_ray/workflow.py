"""`@workflow`: an `async def` whose runs survive the process that runs them.

Called by users; `runs.py` starts what it makes.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, Protocol, TypeVar, overload

from pyworkflow_ray.engine.loop import current_workflow
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.definitions import DefinitionError, WorkflowDefinition
from pyworkflow_ray.execution.options import RUN_OPTIONS, WORKFLOW_OPTIONS, check_workflow_options, nearest, shown
from pyworkflow_ray.ids import check_run_id

if TYPE_CHECKING:
    from pyworkflow_ray.durations import Duration

P = ParamSpec("P")
R = TypeVar("R")


class Workflow(Generic[P, R]):
    """A workflow. Made by `@workflow`; started by `pw.start` or `pw.run`, never called.

    Attributes:
        fn: The bare `async def`.
        run_id: Id of the run to be started, from `.options(run_id=...)`; None: a new one for each.
        attributes: Attributes of the runs to be started, from `.options(attributes=...)`.
    """

    definition: WorkflowDefinition
    fn: Callable[P, Coroutine[Any, Any, R]]
    run_id: str | None
    attributes: dict[str, Any]
    __name__: str
    __qualname__: str

    def __init__(self, definition: WorkflowDefinition) -> None:
        self.definition = definition
        self.fn = definition.fn
        self.run_id = None
        self.attributes = {}
        functools.update_wrapper(self, definition.fn, updated=())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> NoReturn:
        """Refused: a run needs an owner, which `pw.start` and `pw.run` give it.

        Raises:
            TypeError: outside a workflow.
            ConfigurationError: inside a workflow: child runs are not available in this version.
        """
        name = self.__name__
        if current_workflow() is not None:
            raise ConfigurationError(
                f"workflow {self.definition.name} was called inside a workflow: child runs are not available in this "
                f"version. Make it a plain async def that both call, or await {name}.fn(...) to run its body here"
            )
        raise TypeError(
            f"workflow {self.definition.name} can't be called: use pw.run({name}, ...) for its result, or "
            f"pw.start({name}, ...) for a handle"
        )

    def options(self, **options: Any) -> Workflow[P, R]:
        """A changed copy: `run_id` and `attributes` of the runs it starts, and every option of `@workflow`.

        Args:
            run_id: 1 to 128 of `A-Z a-z 0-9 . _ -`, beginning with a letter or digit. Starting a run whose id exists
                gives the handle of that run.
            attributes: A dict of names to JSON values, for `pw.list_runs(attributes=...)`.

        Raises:
            ConfigurationError: an option is unknown or its value not allowed.
        """
        for name in options:
            if name not in (*RUN_OPTIONS, *WORKFLOW_OPTIONS):
                known = (*RUN_OPTIONS, *WORKFLOW_OPTIONS)
                raise ConfigurationError(
                    f"{self.definition.name}.options(): unknown option {name}={shown(options[name])}."
                    f"{nearest(name, known)} Options: {', '.join(known)}"
                )
        of_flow = {name: value for name, value in options.items() if name in WORKFLOW_OPTIONS}
        changed: Workflow[P, R] = Workflow(self.definition.changed(of_flow)) if of_flow else copy.copy(self)
        changed.run_id, changed.attributes = self.run_id, dict(self.attributes)
        if "run_id" in options:
            changed.run_id = None if options["run_id"] is None else check_run_id(options["run_id"])
        if "attributes" in options:
            changed.attributes = _attributes(options["attributes"], self.definition.name)
        return changed

    def remote(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: a workflow is no Ray function."""
        raise DefinitionError(
            f"workflow {self.definition.name} has no .remote(): use pw.start({self.__name__}, ...) for a handle, "
            f"or pw.run({self.__name__}, ...) for its result"
        )

    def __repr__(self) -> str:
        return f"<workflow {self.definition.name}>"

    def __copy__(self) -> Workflow[P, R]:
        changed: Workflow[P, R] = Workflow(self.definition)
        changed.run_id, changed.attributes = self.run_id, dict(self.attributes)
        return changed

    def __reduce_ex__(self, protocol: Any) -> Any:
        # as of a step: by way of its state, for it may reach itself
        return (_blank, (), {"definition": self.definition, "run_id": self.run_id, "attributes": self.attributes})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "fn" in self.definition.__dict__:
            self.fn = self.definition.fn
            functools.update_wrapper(self, self.fn, updated=())

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # only what a cycle in a pickle left out: see __setstate__
            definition = self.__dict__.get("definition")
            if (
                name in ("fn", "__wrapped__", "__name__", "__qualname__")
                and definition is not None
                and "fn" in definition.__dict__
            ):
                self.fn = definition.fn
                functools.update_wrapper(self, definition.fn, updated=())
                return self.__dict__[name]
            raise AttributeError(
                f"workflow {definition.name if definition is not None else '?'} has no attribute {name!r}"
            )


def _blank() -> Workflow[Any, Any]:
    return Workflow.__new__(Workflow)


def _attributes(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    try:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
            raise TypeError("names must be texts")
        text = json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{where}.options(): attributes={shown(value)} is not allowed: a dict of names to JSON values ({error})"
        ) from None
    return dict(json.loads(text))


class WorkflowDecorator(Protocol):
    """What `workflow(...)` with options returns."""

    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Workflow[P, R]: ...


@overload
def workflow(fn: Callable[P, Coroutine[Any, Any, R]], /) -> Workflow[P, R]: ...
@overload
def workflow(
    *,
    name: str | None = None,
    version: str | int | None = None,
    max_duration: Duration | None = None,
    max_recoveries: int = 20,
    actor_options: None = None,
) -> WorkflowDecorator: ...


def workflow(fn: Any = None, /, **options: Any) -> Any:
    """Make an `async def` a workflow; bare or called with options.

    Args:
        name: Name in runs and logs; None: `module:qualname`. A name given by two modules is refused.
        version: Version of the code, recorded with each run; None: none.
        max_duration: Limit of a whole run, > 0 (seconds, timedelta, or text such as "2h"); None: none.
        max_recoveries: Activations lost without a step completed in between, ≥ 0 (default 20); beyond it the run
            pauses, saying why.

    Raises:
        ConfigurationError: an option is unknown, out of range or not available in this version, or the function is no
            `async def`.
    """
    if fn is not None:
        if options:
            raise DefinitionError(
                "@workflow takes either a function or options: write @workflow(...) above the function"
            )
        return Workflow(WorkflowDefinition(fn, check_workflow_options({})))
    checked = check_workflow_options(options)

    def decorate(fn: Callable[..., Any], /) -> Workflow[Any, Any]:
        return Workflow(WorkflowDefinition(fn, checked))

    return decorate
