"""Executes a chunk of a map: its items one after another, each with the step's whole attempt loop.

Called by `worker` for a call that carries a chunk; calls `attempts` through `perform`, as a single step does. Rules:

* each item has its own attempts, timeout, breaker, `current_step()`, and an idempotency key that includes its index;
* an item that waits for its next attempt is put aside and the others go on; the chunk ends when all items have, or when
  those that are left wait longer than `wait_max_s`: they are handed back, and dispatched again when they are due;
* what goes wrong with one item (its value can't be stored, its argument does not fit) is that item's failure alone;
* once more items have failed than the map allows, the chunk ends early: items that wait end with their last error, and
  those that were not begun are not done.

Faults: the user's function may raise anything; a step stuck beyond its timeout ends the process, chunk and all, and the
run's owner has the chunk executed again in parts.
"""

from __future__ import annotations

import dataclasses
import heapq
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from pyworkflow_ray.engine.calls import ChunkResult, Codec, Outcome, PreviousFailure, StepCall
from pyworkflow_ray.engine.chunks import chunk_position, parse_position
from pyworkflow_ray.engine.events import ErrorInfo, ItemFailure, ItemWaiting, Payload, PreviousAttempt
from pyworkflow_ray.execution.attempts import Ended, FailedAttempt, Guard, Plan, attempts, message_of
from pyworkflow_ray.execution.context import KeyScope
from pyworkflow_ray.execution.definitions import StepDefinition
from pyworkflow_ray.execution.hooks import hooked
from pyworkflow_ray.execution.interrupt import Interrupt
from pyworkflow_ray.execution.perform import Work, drive, drive_async, wait_async
from pyworkflow_ray.execution.worker import RNG, Execution, tell_retry
from pyworkflow_ray.execution.worker_loop import WorkerLoop, worker_loop

MAX_PREVIOUS = 20  # failures of an item that are kept while it waits without a worker
WHOLE_TRACEBACKS = 20  # of distinct errors of a chunk; of further ones only type, message and the exception are kept


def execute_chunk(
    call: StepCall,
    step: StepDefinition,
    codec: Codec,
    *,
    interrupt: Interrupt,
    breaker: Guard | None = None,
    worker: str = "",
    node: str = "",
    clock: Callable[[], float] = time.time,
    rng: random.Random = RNG,
    wait_max_s: float | None = None,
    kill_stuck: bool = True,
    loop: WorkerLoop | None = None,
) -> Outcome:
    """All items of the chunk, blocking the calling thread. The arguments are those of `worker.execute_call`."""
    chunk = _Chunk(call, step, codec, worker, node, clock, rng, time.sleep, breaker, interrupt)
    chunk.kill_stuck = kill_stuck and call.executor == "task"
    chunk.owns_loop, chunk.wait_max_s = True, wait_max_s
    broken = chunk.open()
    if broken is not None:
        return broken
    if step.is_async:
        (loop or worker_loop()).run(_run_async(chunk))
    else:
        while (turn := chunk.next()) is not None:
            if isinstance(turn, float):
                interrupt.wait(turn)
            else:
                chunk.ended(turn, drive(attempts(chunk.plan(turn)), chunk.work(turn)))
    return chunk.outcome()


async def execute_chunk_async(
    call: StepCall,
    step: StepDefinition,
    codec: Codec,
    *,
    interrupt: Interrupt | None = None,
    breaker: Guard | None = None,
    wait_max_s: float | None = None,
    worker: str = "",
    node: str = "",
    clock: Callable[[], float] = time.time,
    rng: random.Random = RNG,
    sleep: Callable[[float], Any] = time.sleep,
    settle: Callable[[], Awaitable[None]] | None = None,
    owns_loop: bool = False,
) -> Outcome:
    """As `execute_chunk`, on the running event loop. The arguments are those of `worker.execute_call_async`."""
    chunk = _Chunk(call, step, codec, worker, node, clock, rng, sleep, breaker, interrupt)
    chunk.owns_loop, chunk.settle, chunk.wait_max_s = owns_loop, settle, wait_max_s
    broken = chunk.open()
    if broken is not None:
        return broken
    await _run_async(chunk)
    return chunk.outcome()


async def _run_async(chunk: _Chunk) -> None:
    while (turn := chunk.next()) is not None:
        if isinstance(turn, float):
            await wait_async(turn, chunk.interrupt)
        else:
            chunk.ended(turn, await drive_async(attempts(chunk.plan(turn)), chunk.work(turn)))


class _Item(Execution):
    """One item: an execution of its own. `failures` are its failed attempts."""

    def __init__(self, chunk: _Chunk, index: int, args: tuple[Any, ...]) -> None:
        # what an execution asks for as it is made (hooks, kinds, the budget) is the chunk's
        self.__dict__.update(chunk.execution.__dict__)
        call = chunk.call
        self.index = index
        self.args = args
        self.chunk = chunk
        self.scope = KeyScope(call.storage_id, call.run_uid, call.generation, chunk.position, index)
        self.key = self.scope.key
        self.failures: list[PreviousFailure] = []
        self.last_error: BaseException | None = None
        # the total timeout of an item counts from its own first attempt
        self.began_at = chunk.clock() if call.began_at is None else call.began_at
        self.call = dataclasses.replace(call, began_at=self.began_at)

    def started(self, attempt: int, at: float) -> None:
        """Not told: a chunk is one event."""

    def failed(self, failure: FailedAttempt) -> None:
        name = type(failure.error).__name__
        self.failures.append(
            PreviousFailure(failure.attempt, failure.kind, name, message_of(failure.error), failure.delay_s)
        )
        self.last_error = failure.error
        if failure.retry_at is not None:
            retried = self.chunk.retried
            retried[name] = retried.get(name, 0) + 1
            if hooked("retry"):
                call = self.call
                place = chunk_position(self.chunk.position, self.index, 1)
                tell_retry(failure, call.step, call.run_id, call.workflow, place)

    def put_aside(self, ended: Ended) -> None:
        """Its next attempt begins later."""
        self.call = dataclasses.replace(
            self.chunk.call,
            first_attempt=ended.attempt + 1,
            retries_used=self.chunk.call.retries_used + len(self.failures),
            previous=[*self.chunk.call.previous, *self.failures],
            not_before=ended.retry_at,
            began_at=self.began_at,
        )

    def handed_back(self) -> ItemWaiting:
        """It waits without this worker."""
        call = self.call
        assert call.not_before is not None
        return ItemWaiting(
            index=self.index,
            attempt=call.first_attempt - 1,
            retries_used=call.retries_used,
            retry_at=call.not_before,
            began_at=self.began_at,
            previous=[self._recorded(p) for p in call.previous[-MAX_PREVIOUS:]],
        )

    def _recorded(self, failure: PreviousFailure) -> PreviousAttempt:
        message = self.codec.hide(self.codec.readable(failure.message))
        return PreviousAttempt(
            attempt=failure.attempt,
            kind=failure.kind,  # type: ignore[arg-type]
            type=failure.type,
            message=message,
            delay_s=failure.delay,
        )


def _unheard(event: Any) -> None:
    """A chunk streams nothing."""


class _Chunk:
    """What is left of the chunk, and what came of the rest."""

    kill_stuck = False
    owns_loop = False
    settle: Callable[[], Awaitable[None]] | None = None
    wait_max_s: float | None = None

    def __init__(
        self,
        call: StepCall,
        step: StepDefinition,
        codec: Codec,
        worker: str,
        node: str,
        clock: Callable[[], float],
        rng: random.Random,
        sleep: Callable[[float], Any],
        guard: Guard | None,
        interrupt: Interrupt | None,
    ) -> None:
        assert call.chunk is not None
        place = parse_position(call.position)
        self.call = call
        self.given = call.chunk
        self.position = call.position if place is None else place[0]
        self.step = step
        self.clock = clock
        self.rng = rng
        self.sleep = sleep
        self.guard = guard
        self.interrupt = interrupt
        self.retried: dict[str, int] = {}
        self.execution = Execution(call, step, codec, _unheard, worker, node, clock, rng, sleep)
        self.codec = self.execution.codec
        self._started_at = clock()
        self._items: list[Any] = []
        self._begun = 0
        self._waiting: list[tuple[float, int, _Item]] = []
        self._values: list[Any] = []
        self._failures: dict[int, ItemFailure] = {}
        self._errors: list[ErrorInfo] = []
        self._numbers: dict[tuple[str, str, str, str], int] = {}
        self._cancelled = False

    # The items -----------------------------------------------------------------------------------------------------

    def open(self) -> Outcome | None:
        """Decode the items; an outcome where that fails for the chunk as a whole."""
        given = self.given
        try:
            self.execution.function()  # raises what keeps the call from being begun
            if given.packed:
                first = given.items[0]
                assert isinstance(first, Payload)
                self._items = self.codec.decode(first)
                if len(self._items) != given.count:
                    raise ValueError(f"a chunk of {given.count} items came with {len(self._items)}")
            else:
                self._items = list(given.items)
        except Exception as error:
            return self.execution.broken(error)
        return None

    def next(self) -> _Item | float | None:
        """The item whose turn it is, or seconds to wait for one, or None: the chunk is over."""
        while True:
            if self.interrupt is not None and self.interrupt.cancelled:
                self._cancelled = True
            if self._cancelled or self._too_many():
                return None
            if self._waiting:
                wait = self._waiting[0][0] - self.clock()
                if wait <= 0:
                    return heapq.heappop(self._waiting)[2]
                if self._begun == self.given.count:
                    return wait if self.wait_max_s is None or wait <= self.wait_max_s else None
            elif self._begun == self.given.count:
                return None
            item = self._begin()
            if item is not None:
                return item

    def _begin(self) -> _Item | None:
        """The next item that was not begun; None where its argument is no good, which is its failure."""
        offset, self._begun = self._begun, self._begun + 1
        value = self._items[offset]
        self._items[offset] = None
        self._values.append(None)
        index = self.given.first + offset
        try:
            if not self.given.packed:
                if isinstance(value, ErrorInfo):
                    self._fail(index, value, 0, "permanent")
                    return None
                value = self.codec.decode(value)
            args, _ = self.step.validate((value,), {})
        except Exception as error:
            self._fail(index, self.execution.error_info(error), 0, "permanent")
            return None
        return _Item(self, index, args)

    def plan(self, item: _Item) -> Plan:
        plan = item.plan(self.guard, self.interrupt, 0.0)
        plan.accept = None  # values are stored together, at the end
        plan.where = f"run {self.call.run_id}, item {item.index}"
        return plan

    def work(self, item: _Item) -> Work:
        fn, args = self.step.fn, item.args
        work = item.work(lambda: fn(*args), self.guard, self.interrupt)
        work.kill_stuck, work.owns_loop, work.settle = self.kill_stuck, self.owns_loop, self.settle
        return work

    def ended(self, item: _Item, ended: Ended) -> None:
        """What came of an item's turn."""
        if ended.status == "completed":
            self._values[item.index - self.given.first] = ended.value
        elif ended.status == "cancelled":
            self._cancelled = True
        elif ended.status == "failed" and ended.error is not None:
            self._fail(item.index, item.error_info(ended.error), ended.attempt, ended.why)
        else:
            assert ended.retry_at is not None
            item.put_aside(ended)
            heapq.heappush(self._waiting, (ended.retry_at, item.index, item))

    def _too_many(self) -> bool:
        return self.given.stop_after is not None and len(self._failures) > self.given.stop_after

    def _fail(self, index: int, error: ErrorInfo, attempt: int, why: str) -> None:
        recipe = "" if error.exception is None else error.exception.model_dump_json()
        key = (error.type, error.module, error.message, recipe)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._errors)
            if number >= WHOLE_TRACEBACKS:
                error = error.model_copy(update={"traceback": ""})
            self._errors.append(error)
        self._failures[index] = ItemFailure(index=index, error=number, attempt=attempt, why=why)

    # The end -------------------------------------------------------------------------------------------------------

    def outcome(self) -> Outcome:
        execution = self.execution
        if self._cancelled:
            return execution.new_outcome("cancelled", self.call.first_attempt)
        waiting: list[ItemWaiting] = []
        for _, index, item in sorted(self._waiting, key=lambda turn: turn[1]):
            if self._too_many():
                assert item.last_error is not None
                self._fail(index, item.error_info(item.last_error), item.call.first_attempt - 1, "stopped")
            else:
                waiting.append(item.handed_back())
        results, single = self._store()
        outcome = execution.new_outcome("completed", self.call.first_attempt)
        outcome.started_at, outcome.ended_at = self._started_at, self.clock()
        if self.guard is not None:
            outcome.breaker_generation = self.guard.generation
        outcome.chunk = ChunkResult(
            done=self._begun,
            results=results,
            single=single,
            failures=[self._failures[index] for index in sorted(self._failures)],
            errors=self._errors,
            retried=self.retried,
            items=self.given.digest,
            waiting=waiting,
        )
        return outcome

    def _store(self) -> tuple[Payload | None, bool]:
        """The values as one JSON list, or where that is not exact as a payload each."""
        if len(self._failures) == self._begun:
            return None, False
        try:
            together = self.codec.encode(self._values)
            if together.enc == "json":
                return together, False
        except Exception:
            pass
        stored: list[Any] = []
        for offset, value in enumerate(self._values):
            index = self.given.first + offset
            single = None
            if index not in self._failures:
                try:
                    single = self.codec.encode(value).model_dump(mode="json", exclude_defaults=True)
                except Exception as error:
                    self._fail(index, self.execution.error_info(error), 1, "permanent")
            stored.append(single)
        return self.codec.encode(stored), True
