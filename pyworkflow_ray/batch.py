"""Many at once and one after another: `Step.map` with its `BatchResult`, and `first_success`.

Called by users and by `step`; calls the engine (`loop.map_items`) in a workflow, plain calls elsewhere.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import Counter
from collections.abc import Awaitable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from pyworkflow_ray.engine.calls import MapRequest
from pyworkflow_ray.engine.loop import current_workflow
from pyworkflow_ray.engine.maps import RATIO_SAMPLE, MapOutcome
from pyworkflow_ray.errors import ConfigurationError, ItemNotDoneError
from pyworkflow_ray.execution.code import describe_step
from pyworkflow_ray.execution.options import shown

if TYPE_CHECKING:
    from pyworkflow_ray.step import Step

T = TypeVar("T")
R = TypeVar("R")

CONCURRENCY = 8
CHUNK_MAX = 1_000
CHUNK_UNKNOWN = 100
GROUP_MAX = 1_000  # exceptions in the group that `raise_if_failed` raises; its message counts them all


@dataclass(frozen=True)
class BatchResult(Generic[R]):
    """What `step.map` came to.

    Attributes:
        results: One an item, in input order: its value, or its exception itself.
        failed: Pairs of index and exception, in order.
        stopped: Why the map stopped early; None: it did not. Items that were not drawn by then are not in `results`.
        not_done: Indices of items that had not ended when it stopped early; their result is an `ItemNotDoneError`.
            They may have been executed in part.
        retried: Attempts that were made again, by type of the error before them.
        failed_items: The items themselves, as they were drawn, of `failed` and `not_done`, by index.
    """

    results: list[Any]
    failed: list[tuple[int, Exception]] = field(default_factory=list)
    stopped: str | None = None
    not_done: list[int] = field(default_factory=list)
    retried: dict[str, int] = field(default_factory=dict)
    failed_items: dict[int, Any] = field(default_factory=dict)
    _step: Any = field(default=None, repr=False, compare=False)
    _position: str = field(default="", repr=False, compare=False)

    @property
    def succeeded(self) -> list[R]:
        """The values of the items that succeeded, in input order."""
        without = {index for index, _ in self.failed} | set(self.not_done)
        return [value for index, value in enumerate(self.results) if index not in without]

    @property
    def by_type(self) -> dict[str, int]:
        """How many items failed with which type of exception, the most frequent first."""
        return dict(Counter(type(error).__name__ for _, error in self.failed).most_common())

    def raise_if_failed(self, max_failures: int = 0, max_ratio: float | None = None) -> None:
        """Raise where more has failed than allowed.

        `pw.resume` of a run that failed of it executes the failed items alone again, with fresh attempts.

        Args:
            max_failures: So many failed items are allowed (default none).
            max_ratio: This share of the items that were done is allowed, 0 to 1. With it, `max_failures` counts only
                where it is above 0.

        Raises:
            ExceptionGroup: of the failures, the first 1,000 of them; its message counts them by type.
        """
        done = len(self.results) - len(self.not_done)
        limits = [] if max_ratio is not None and max_failures == 0 else [max_failures]
        if max_ratio is not None:
            limits.append(math.floor(max_ratio * done + 1e-9))
        if len(self.failed) > min(limits):
            group = ExceptionGroup(self._summary(), [error for _, error in self.failed[:GROUP_MAX]])
            engine = current_workflow()
            if engine is not None and self._position:
                engine.blame(group, self._position)  # a run that fails of it is resumed from this map
            raise group

    async def rerun_failed(self, *, concurrency: int | None = None, chunk_size: int | None = None) -> BatchResult[R]:
        """Map the failed items again, and those that are not done: the batch with their new results in their places.

        They are new executions, with fresh attempts and other idempotency keys.
        """
        indices = sorted(self.failed_items)
        again: BatchResult[R] = await self._step.map(
            [self.failed_items[index] for index in indices], concurrency=concurrency, chunk_size=chunk_size
        )
        results = list(self.results)
        for index, result in zip(indices, again.results, strict=True):
            results[index] = result
        failed = [(indices[index], error) for index, error in again.failed]
        retried = dict(Counter(self.retried) + Counter(again.retried))
        items = {indices[index]: item for index, item in again.failed_items.items()}
        return BatchResult(results, failed, None, [], retried, items, self._step)

    def _summary(self) -> str:
        done = len(self.results) - len(self.not_done)
        types = ", ".join(f"{name} {count}" for name, count in self.by_type.items())
        return f"{len(self.failed)} of {done} items failed" + (f" ({types})" if types else "")

    def _repr_html_(self) -> str:
        from pyworkflow_ray.observability.lists import batch_html

        return batch_html(*self._shown(traces=True))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        from pyworkflow_ray.observability.lists import batch_text

        printer.text(batch_text(*self._shown(traces=False)))

    def _shown(self, *, traces: bool) -> tuple[Any, list[tuple[int, str, str]], int]:
        import traceback

        from pyworkflow_ray.observability.lists import FAILURES_SHOWN, batch_lines

        lines = batch_lines(
            len(self.results), len(self.failed), len(self.not_done), self.by_type, self.retried, self.stopped
        )
        failures = [
            (
                index,
                "".join(traceback.format_exception_only(error)).partition("\n")[0],
                "".join(traceback.format_exception(error)) if traces else "",
            )
            for index, error in self.failed[:FAILURES_SHOWN]
        ]
        return lines, failures, max(0, len(self.failed) - FAILURES_SHOWN)

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.results)

    def __str__(self) -> str:
        return self._summary() + (f"; stopped early: {self.stopped}" if self.stopped else "")


@dataclass(slots=True, frozen=True)
class MapOptions:
    """Checked options of one map. `total`: number of items, None where they do not say."""

    concurrency: int
    chunk_size: int
    max_failures: int | None
    max_ratio: float | None
    total: int | None

    @classmethod
    def checked(
        cls,
        step: Step[..., Any],
        items: object,
        concurrency: int | None,
        chunk_size: int | None,
        max_failures: int | None,
        max_ratio: float | None,
    ) -> MapOptions:
        """Raises what `Step.map` raises."""
        definition = step.definition
        where = f"{definition.name}.map()"
        for name, value, least in (
            ("concurrency", concurrency, 1),
            ("chunk_size", chunk_size, 1),
            ("max_failures", max_failures, 0),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigurationError(f"{where}: {name}={shown(value)} is not allowed: a whole number ≥ {least}")
        if max_ratio is not None and (
            isinstance(max_ratio, bool) or not isinstance(max_ratio, (int, float)) or not 0 <= max_ratio <= 1
        ):
            raise ConfigurationError(f"{where}: max_ratio={shown(max_ratio)} is not allowed: a number from 0 to 1")
        if not isinstance(items, Iterable):
            hint = "; collect it in a step first" if hasattr(items, "__aiter__") else ""
            raise ConfigurationError(f"{where}: items is a {type(items).__name__}, which can't be iterated{hint}")
        for name, refused in (("on_exhausted", "pause"), ("on_open", "wait")):
            if definition.given.get(name) == refused:
                raise ConfigurationError(
                    f"{where}: {name}={refused!r} is not available for the items of a map, which end one by one. "
                    f"Map {definition.name}.options({name}='raise'), and rerun_failed() later"
                )
        definition.signature.bind(None)
        total = len(items) if isinstance(items, Sized) else None
        concurrency = CONCURRENCY if concurrency is None else concurrency
        if chunk_size is None:
            chunk_size = CHUNK_UNKNOWN
            if not definition.policy.idempotent:
                chunk_size = 1
            elif total is not None:
                chunk_size = max(1, min(CHUNK_MAX, math.ceil(total / (4 * concurrency))))
        return cls(concurrency, chunk_size, max_failures, max_ratio, total)


async def map_durably(step: Step[..., R], engine: Any, items: Iterable[Any], options: MapOptions) -> BatchResult[R]:
    """In a workflow: the engine's map."""
    definition = step.definition
    request = MapRequest(
        step=definition.name,
        code=describe_step(definition),
        policy=definition.policy,
        executor=definition.executor,
        ray_options=dict(definition.ray_options),
        breaker=definition.breaker_name,
        chunk_size=options.chunk_size,
        concurrency=options.concurrency,
        max_failures=options.max_failures,
        max_ratio=options.max_ratio,
    )
    outcome: MapOutcome = await engine.map_items(request, items, options.total)
    return BatchResult(
        outcome.results,
        outcome.failed,
        outcome.stopped,
        outcome.not_done,
        outcome.retried,
        outcome.inputs,
        step,
        outcome.position,
    )


async def map_plainly(step: Step[..., R], items: Iterable[Any], options: MapOptions) -> BatchResult[R]:
    """Outside of a workflow: plain calls, those of an async step `concurrency` at a time."""
    run = _PlainMap(step, items, options)
    if not step.definition.is_async:
        await run.one_after_another()
    else:
        workers = [asyncio.ensure_future(run.one_after_another()) for _ in range(options.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return run.result()


class _PlainMap:
    def __init__(self, step: Step[..., Any], items: Iterable[Any], options: MapOptions) -> None:
        self.step = step
        self.options = options
        self.waiting = enumerate(items)
        self.open: dict[int, Any] = {}
        self.results: dict[int, Any] = {}
        self.failed: dict[int, Exception] = {}
        self.items: dict[int, Any] = {}
        self.stopped: str | None = None

    async def one_after_another(self) -> None:
        while self.stopped is None:
            drawn = next(self.waiting, None)
            if drawn is None:
                return
            index, item = drawn
            self.open[index] = item
            try:
                value = self.step(item)
                self.results[index] = await value if self.step.definition.is_async else value
            except Exception as error:
                self.results[index] = self.failed[index] = error
                self.items[index] = item
            del self.open[index]
            self.stopped = self.stopped or self._too_many()

    def _too_many(self) -> str | None:
        options, failed = self.options, len(self.failed)
        if options.max_failures is not None and failed > options.max_failures:
            return f"{failed} items failed (max_failures={options.max_failures})"
        of = options.total if options.total is not None else len(self.results)
        sure = options.total is not None or len(self.results) >= RATIO_SAMPLE
        if options.max_ratio is not None and sure and failed > options.max_ratio * of:
            return f"{failed} of {of} items failed (max_ratio={options.max_ratio:g})"
        return None

    def result(self) -> BatchResult[Any]:
        not_done = sorted(self.open)
        for index in not_done:
            self.results[index] = ItemNotDoneError(f"item {index} was not executed to its end", index=index)
        results = [self.results[index] for index in range(len(self.results))]
        failed = sorted(self.failed.items())
        return BatchResult(
            results, failed, self.stopped, not_done, {}, {**self.items, **self.open}, cast(Any, self.step)
        )


async def first_success(*coroutines: Awaitable[T]) -> T:
    """The value of the first that succeeds: each is started only when the one before it has failed.

        price = await pw.first_success(primary(key), replica(key), cached(key))

    What was not started is closed, never run: so is everything after a success, and after a cancellation, which is no
    failure and is raised at once. In a workflow each failed step is recorded, and a crash goes on with the one that
    was running.

    Raises:
        ExceptionGroup: all have failed; it holds their exceptions, in order.
        ConfigurationError: nothing was given, or a value that can't be awaited (a `def` step that was called outside a
            workflow has run already: its call gives the value itself).
    """
    waiting = list(coroutines)
    failures: list[Exception] = []
    try:
        _check(waiting)
        while waiting:
            try:
                return await waiting.pop(0)
            except Exception as error:
                failures.append(error)
        raise ExceptionGroup(f"none of {len(failures)} succeeded", failures)
    finally:
        failures = []  # no cycle of frame and exceptions
        for unstarted in waiting:
            if inspect.iscoroutine(unstarted):
                unstarted.close()


def _check(given: list[Any]) -> None:
    if not given:
        raise ConfigurationError("first_success() was given nothing to await")
    for number, item in enumerate(given, 1):
        if not inspect.isawaitable(item):
            raise ConfigurationError(
                f"first_success: argument {number} is a {type(item).__name__}, which can't be awaited. Give calls of "
                "async steps; a def step gives a coroutine in a workflow only, elsewhere its call is the value"
            )
