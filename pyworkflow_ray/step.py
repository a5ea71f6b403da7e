"""`@step`: a function whose calls are durable inside a workflow, and ordinary, with the same retries, elsewhere.

Called by users. Inside a workflow it calls the engine (`engine.loop.current_workflow`), elsewhere `execution.plain`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, ParamSpec, Protocol, TypeVar, cast, overload

from pyworkflow_ray.engine.calls import StepRequest
from pyworkflow_ray.engine.loop import current_workflow
from pyworkflow_ray.execution.code import describe_step
from pyworkflow_ray.execution.definitions import DefinitionError, StepDefinition
from pyworkflow_ray.execution.options import check_step_options

if TYPE_CHECKING:
    from pyworkflow_ray.batch import BatchResult
    from pyworkflow_ray.budget import RetryBudget
    from pyworkflow_ray.durations import Duration
    from pyworkflow_ray.resilience.policy import Jitter

P = ParamSpec("P")
R = TypeVar("R")


class Step(Generic[P, R]):
    """A step. Made by `@step`; `.options()` gives a changed copy, `.fn` the bare function.

    Calling it inside a workflow gives a coroutine whose result is the function's, whether that is `def` or `async
    def`: the type says so. Elsewhere a call is that of the function itself (so a `def` step gives its value, not a
    coroutine) with retries, timeout and breaker; inside another step it runs as part of that step. For a plain call
    that type checkers understand use `.fn`.
    """

    definition: StepDefinition
    fn: Callable[P, Any]
    __wrapped__: Callable[P, Any]
    __name__: str
    __qualname__: str

    def __init__(self, definition: StepDefinition) -> None:
        self.definition = definition
        self.fn = definition.fn
        functools.update_wrapper(self, definition.fn, updated=())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Run the step.

        Raises:
            TypeError: the arguments do not fit the signature.
            pydantic.ValidationError: an argument does not fit its annotation; inside a workflow when awaited.
        """
        engine = current_workflow()
        if engine is not None:
            return self._call_durably(engine, args, kwargs)
        from pyworkflow_ray.execution.plain import call_plain

        definition = self.definition
        if definition.policy.retry_budget is not None or definition.breaker is not None:
            _join_cluster()
        given, named = self.definition.validate(args, kwargs)
        return cast("Coroutine[Any, Any, R]", call_plain(self.definition, given, named))

    async def _call_durably(self, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        # The arguments are checked when the call is awaited, so that a wrong one in `gather(a(1), b("x"))` neither
        # leaves the calls before it unawaited nor is raised outside the task it belongs to.
        return cast(R, await engine.call_step(self.request(args, kwargs)))

    def request(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepRequest:
        """What a workflow asks the engine for: the step with these arguments, validated."""
        definition = self.definition
        given, named = definition.validate(args, kwargs)
        return StepRequest(
            step=definition.name,
            code=describe_step(definition),
            args=given,
            names=definition.names,
            kwargs=named,
            policy=definition.policy,
            executor=definition.executor,
            ray_options=dict(definition.ray_options),
            breaker=definition.breaker_name,
        )

    def options(self, **options: Any) -> Step[P, R]:
        """A copy with these options changed, all options of `@step` among them; the original stays as it is.

        Raises:
            ConfigurationError: as `@step`.
        """
        return Step(self.definition.changed(options))

    async def map(
        self,
        items: Iterable[Any],
        *,
        concurrency: int | None = None,
        chunk_size: int | None = None,
        max_failures: int | None = None,
        max_ratio: float | None = None,
    ) -> BatchResult[R]:
        """The step for each of many items, in chunks; one bad item never loses the others.

            batch = await thumbnail.map(paths, concurrency=16)
            batch.raise_if_failed(max_ratio=0.01)

        In a workflow a chunk is one event of the log and one call of a worker, which executes its items one after
        another, each with the step's own retries, timeout and breaker, and with an idempotency key of its own. After a
        crash finished chunks are not executed again; a chunk whose worker is lost is executed again in parts, under
        `max_recoveries`. Items are drawn lazily, also from an endless iterable, and drawn anew on replay: they must
        come out the same. A long wait between an item's attempts keeps no worker. Elsewhere the items are plain calls.

        Args:
            items: One positional argument of the step each.
            concurrency: Chunks at the same time, ≥ 1 (default 8).
            chunk_size: Items in a chunk, ≥ 1. Default: a quarter of an even share, up to 1,000, where `items` has a
                length, else 100; 1 for a step with idempotent=False, whose items are never executed again when their
                worker is lost.
            max_failures: Stop early once more items than this have failed; None: never.
            max_ratio: Stop early once more than this share (0 to 1) has failed: of all items where `items` has a
                length, else of those done once they are 100; None: never.

        Returns:
            A `BatchResult`; of a map that stopped early with what was done until then.

        Raises:
            ConfigurationError: an option is out of range, `items` is no iterable, or the step has
                on_exhausted="pause" or on_open="wait", which wait for a single step's run and not for an item.
            TypeError: the step does not take one positional argument.
        """
        from pyworkflow_ray import batch

        options = batch.MapOptions.checked(self, items, concurrency, chunk_size, max_failures, max_ratio)
        engine = current_workflow()
        if engine is not None:
            return await batch.map_durably(self, engine, items, options)
        return await batch.map_plainly(self, items, options)

    def remote(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: a step is no Ray function."""
        raise DefinitionError(
            f"step {self.definition.name} has no .remote(): call it plainly, {self.__name__}(...), in a workflow, "
            "and start the workflow with pw.start(flow, ...)"
        )

    def __repr__(self) -> str:
        return f"<step {self.definition.name}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # by way of its state, not of constructor arguments: a step may reach itself through its function's globals
        return (_blank, (), {"definition": self.definition})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.definition = state["definition"]
        fn = getattr(self.definition, "fn", None)  # None inside a cycle: the definition is then still being made
        if fn is not None:
            self.__init__(self.definition)  # type: ignore[misc]

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # only what a cycle in a pickle left out: see __setstate__
            definition = self.__dict__.get("definition")
            if (
                name in ("fn", "__wrapped__", "__name__", "__qualname__")
                and definition is not None
                and "fn" in definition.__dict__
            ):
                self.__init__(definition)
                return self.__dict__[name]
            raise AttributeError(f"step {definition.name if definition is not None else '?'} has no attribute {name!r}")


def _join_cluster() -> None:
    """In a process of a Ray cluster, such as a user's own task or actor, budgets and breakers are the cluster's."""
    ray = sys.modules.get("ray")  # never imported here: a plain script needs no Ray
    if ray is not None and getattr(ray, "is_initialized", bool)():
        import pyworkflow_ray.runtime.breaker_actor
        import pyworkflow_ray.runtime.budget_actor  # noqa: F401


def _blank() -> Step[Any, Any]:
    return Step.__new__(Step)


class StepDecorator(Protocol):
    """What `step(...)` with options returns."""

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Step[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> Step[P, R]: ...


@overload
def step(fn: Callable[P, Coroutine[Any, Any, R]], /) -> Step[P, R]: ...
@overload
def step(fn: Callable[P, R], /) -> Step[P, R]: ...
@overload
def step(
    *,
    name: str | None = None,
    max_retries: int | None = 0,
    retry_delay: Duration | Sequence[Duration] | Callable[[int, Any], Duration] = 1,
    retry_backoff: float = 1,
    max_retry_delay: Duration | None = None,
    jitter: Jitter = "auto",
    retry_on: type[BaseException] | Sequence[type[BaseException]] | Callable[[BaseException], bool] | None = None,
    no_retry_on: type[BaseException] | Sequence[type[BaseException]] | Callable[[BaseException], bool] = (),
    timeout: Duration | None = None,
    total_timeout: Duration | None = None,
    breaker: Any = None,
    idempotent: bool = True,
    durability: Literal["strict", "relaxed"] = "strict",
    max_recoveries: int = 3,
    executor: Literal["task", "local"] = "task",
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    memory: float | None = None,
    memory_growth: float | None = None,
    max_memory: float | None = None,
    resources: Mapping[str, float] | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    scheduling_strategy: Any = None,
    ray_remote_args: Mapping[str, Any] | None = None,
    on_exhausted: Literal["raise", "pause"] = "raise",
    on_open: Literal["raise", "wait"] = "raise",
    retry_budget: RetryBudget | str | None = None,
) -> StepDecorator: ...


def step(fn: Any = None, /, **options: Any) -> Any:
    """Make a function (`def` or `async def`) a step; bare or called with options.

    With the defaults a step is tried once, has no timeout, and runs as a Ray task with one CPU. A failed attempt is
    tried again after `retry_delay * retry_backoff**(n - 1)` seconds, capped at `max_retry_delay`, then jittered.

    Args:
        name: Name in runs and logs; None: `module:qualname`. A name given by two modules is refused.
        max_retries: Retries after the first attempt, ≥ 0 (default 0); 5 means up to 6 attempts, None for ever.
        retry_delay: Wait before the first retry, ≥ 0 (default 1 s): seconds, timedelta, or text such as "30s". Or a
            list of delays, one a retry, of which the last repeats. Or a callable `(attempt, error) -> delay`, asked
            after each failed attempt (1 is the first) in the process that made it.
        retry_backoff: Factor for each further retry, ≥ 1 (default 1: a fixed delay).
        max_retry_delay: Cap on one delay; None: an hour where `retry_backoff` > 1.
        jitter: "auto" (none where the delay is fixed, a list or a callable, else ±12.5 %), "none", "proportional",
            "full", "equal", "decorrelated"; formulas: `pyworkflow_ray.resilience.retry.retry_delay`.
        retry_on: Exception types, or a predicate of the exception, that decide what is retried; None: the taxonomy of
            `pw.classify`.
        no_retry_on: Exception types, or a predicate, that are never retried; wins over `retry_on`.
        timeout: Limit of one attempt, > 0; None: none. Not on a `def` step with `executor="local"`.
        total_timeout: Limit of all attempts and waits together, > 0, from the begin of the first attempt; None: none. A
            wait that cannot end before it is not begun: the step fails at once with the last error. An attempt that
            still runs is stopped with `StepTimeoutError`. Not on a `def` step with `executor="local"`.
        on_exhausted: "raise": a step whose attempts or total timeout are used up fails. "pause": its run pauses for a
            person, once what else it executes has ended; `pw.resume(run_id)` grants a fresh set of attempts, by the
            options that the code then gives. A plain call raises in both cases.
        breaker: A `CircuitBreaker`, a key of one (`breaker.key("host-7")`), or its name.
        on_open: "raise": an attempt that the breaker refuses fails the step with `CircuitOpenError`. "wait": the step
            waits, durably and without a worker, until the breaker lets it through; no attempt is spent. Whoever has
            waited longest is let through first. A wait that cannot end before `total_timeout` is not begun. Needs
            `breaker`.
        retry_budget: A `RetryBudget` or its name: each retry takes tokens from it, across the cluster; where it is
            empty the step fails with `RetryBudgetExhausted` from its last error.
        idempotent: False: an attempt whose outcome is unknown is never repeated; the workflow gets `StepLostError`.
        durability: "strict": the step begins once everything before it is durable. "relaxed", for steps whose
            repetition is harmless, after a crash perhaps with other arguments: it begins while the records of relaxed
            steps before it are still being written, so that a chain of them waits for the storage once and not once a
            step. All of them are durable before a strict step begins, the run ends, parks or pauses, or a compensation
            runs.
        max_recoveries: Executions again after a lost worker, node, or out of memory, ≥ 0 (default 3).
        executor: "task": a Ray task; "local": inside the run's actor, for tiny steps.
        num_cpus: CPUs of the task; None: 1. `num_gpus`, `memory` (bytes), `resources`, `runtime_env`,
            `scheduling_strategy` and, by Ray's own names, `ray_remote_args` are handed to Ray as they are.
        memory_growth: After an out-of-memory kill the step is executed again with so many times the `memory` it had,
            ≥ 1 (Ray kills by `memory` only what it must; the larger claim finds a node, or a time, with room); needs
            `memory`. None: the same again.
        max_memory: The most that `memory_growth` leads to, in bytes; None: no limit.

    Raises:
        ConfigurationError: an option is unknown, out of range, or not available in this version.
    """
    if fn is not None:
        if options:
            raise DefinitionError("@step takes either a function or options: write @step(...) above the function")
        return Step(StepDefinition(fn, check_step_options({})))
    checked = check_step_options(options)

    def decorate(fn: Callable[..., Any], /) -> Step[Any, Any]:
        return Step(StepDefinition(fn, checked))

    return decorate
