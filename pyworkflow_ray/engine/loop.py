"""A private, deterministic asyncio event loop for the body of one workflow run.

Called by `machine`, which spins it until it is quiet between two inputs. Rules:

* Callbacks run in the order in which they were scheduled; nothing else ever runs.
* `call_later` and `call_at` (so `asyncio.sleep` and `asyncio.timeout`) are durable timers: commands, like steps.
* A command is identified by its place: the path of its task and a counter ("3", "t2.1").
* Tasks and futures hash by creation number: asyncio keeps tasks in sets, and sets ordered by address would make
  `wait`, `as_completed` and TaskGroup's aborts come out in another order in another process.
* Once evicted the loop emits nothing: dropping a suspended coroutine runs the user's `finally` blocks.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import datetime as dt
import hashlib
import sys
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, NoReturn

from pyworkflow_ray.engine.calls import Codec, MapRequest, StepRequest, encode_arguments
from pyworkflow_ray.engine.events import Event, Payload, StepCancelled, StepScheduled, TimerCancelled, TimerStarted
from pyworkflow_ray.engine.maps import MapInProgress, MapOutcome, map_event
from pyworkflow_ray.errors import ConfigurationError, PyWorkflowError

_MAX_DELAY_S = 100 * 365 * 86400.0


class WorkflowTask(asyncio.Task[Any]):
    """A task of a workflow. `path` is its place in the tree of tasks, `number` its order of creation in the loop."""

    def __init__(self, coro: Any, *, loop: WorkflowLoop, path: str, number: int, **kwargs: Any) -> None:
        self.path = path
        self.number = number
        self.commands = 0
        self.children = 0
        self.draws = 0
        super().__init__(coro, loop=loop, **kwargs)

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other


class WorkflowFuture(asyncio.Future[Any]):
    """A future that hashes by its order of creation."""

    def __init__(self, *, loop: WorkflowLoop, number: int) -> None:
        self.number = number
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other


class _Timer(asyncio.TimerHandle):
    __slots__ = ("position",)

    def __init__(self, when: float, callback: Callable[..., Any], args: Any, loop: Any, context: Any) -> None:
        super().__init__(when, callback, args, loop, context)
        self.position = ""


class WorkflowLoop(asyncio.AbstractEventLoop):
    """See the module. `emit` receives every command of the body, as the event that would record it."""

    def __init__(self, run_uid: str, codec: Codec, emit: Callable[[Event], None]) -> None:
        self.run_uid = run_uid
        self.codec = codec
        self.run_id = ""  # set by the machine
        self.now_s = 0.0  # time of the input delivered last: the only clock a body has
        self.replaying = False
        self.evicted = False
        self.steps: dict[str, asyncio.Future[Any]] = {}
        self.maps: dict[str, MapInProgress] = {}
        self.timers: dict[str, _Timer] = {}
        self.step_count = 0
        self.run_data: Any = None  # what `current_run()` shows; set by the machine
        self.saga: Any = None  # the run's compensations; set by the machine
        self.blame: Callable[[BaseException, str], None] = lambda error, position: None  # set by the machine
        self.emit = self._emit = emit
        self._ready: deque[asyncio.Handle] = deque()
        self._created = 0
        self._orphans = WorkflowCounter()
        self._tasks: list[WorkflowTask] = []
        self._prune_at = 64  # so many tasks: those that are done are forgotten

    # What the body may ask -----------------------------------------------------------------------------------

    def now(self) -> dt.datetime:
        """The run's time: when the input delivered last was recorded. The same on replay."""
        return dt.datetime.fromtimestamp(self.now_s, dt.UTC)

    def random(self) -> float:
        """A float in [0, 1), decided by the run and the place in the program."""
        return int.from_bytes(self._draw()[:7], "big") % (1 << 53) / (1 << 53)

    def uuid4(self) -> uuid.UUID:
        """A version 4 UUID, decided by the run and the place in the program."""
        return uuid.UUID(bytes=self._draw()[:16], version=4)

    async def sleep(self, seconds: float) -> None:
        """Sleep durably: 0 and less only yield."""
        await asyncio.sleep(seconds)

    async def call_step(self, request: StepRequest) -> Any:
        """Schedule a step at the current place and wait for its outcome."""
        if self.evicted:
            return await self.create_future()
        codec = self.codec.at(self.run_id, self._next_place())
        args, kwargs = encode_arguments(codec, request)
        return await self.schedule_step(request, args, kwargs)

    async def compensate(self, request: StepRequest, args: list[Payload], kwargs: dict[str, Payload]) -> Any:
        """As `call_step`, of arguments that were encoded at no place, for the run as a whole."""
        codec, place = self.codec, self._next_place()
        args = [codec.move(payload, self.run_id, place) for payload in args]
        kwargs = {name: codec.move(payload, self.run_id, place) for name, payload in kwargs.items()}
        return await self.schedule_step(request, args, kwargs, compensates=True)

    async def schedule_step(
        self, request: StepRequest, args: list[Payload], kwargs: dict[str, Payload], *, compensates: bool = False
    ) -> Any:
        """As `call_step`, of arguments that are encoded already."""
        if self.evicted:
            return await self.create_future()
        code = self.codec.store_code(request.code)
        position = self._next_position()
        self.step_count += 1
        future = self.create_future()
        self.steps[position] = future
        self._emit(
            StepScheduled(
                at=self.now_s,
                position=position,
                number=self.step_count,
                step=request.step,
                code=code,
                args=args,
                kwargs=kwargs,
                policy=request.policy,
                executor=request.executor,
                ray_options=request.ray_options,
                breaker=request.breaker,
                compensates=compensates,
            )
        )
        try:
            return await future
        except asyncio.CancelledError:
            if self.steps.pop(position, None) is not None and not self.evicted:
                self._emit(StepCancelled(at=self.now_s, position=position))
            raise

    async def map_items(self, request: MapRequest, items: Iterable[Any], total: int | None) -> MapOutcome:
        """Schedule a map at the current place and wait for its end."""
        if self.evicted:
            outcome: MapOutcome = await self.create_future()
            return outcome
        code = self.codec.store_code(request.code)
        current = MapInProgress(self, request, items, total)
        current.look_ahead()
        position = self._next_position()
        self.step_count += 1
        self.maps[position] = current
        self._emit(map_event(request, code, position, self.step_count, current.total, self.now_s))
        return await current.run(position)

    # What the machine does -----------------------------------------------------------------------------------

    def spin(self) -> None:
        """Run all that is ready, and what becomes ready by it, until the body is quiet."""
        outer = asyncio._get_running_loop()
        outer_task = _leave_task(outer)
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(
            None, None
        )  # an outer loop must not close the body's generators: there it is a plain call
        asyncio._set_running_loop(self)
        try:
            while self._ready:
                handle = self._ready.popleft()
                if not handle.cancelled():
                    try:
                        handle._run()
                    except (KeyboardInterrupt, SystemExit):
                        pass  # the task that raised it holds it: the run fails with it, its process goes on
        finally:
            asyncio._set_running_loop(outer)
            sys.set_asyncgen_hooks(*hooks)
            _enter_task(outer, outer_task)

    def cancel_steps(self) -> None:
        """Cancel all steps and maps that are open; whoever waits for them waits for ever."""
        for position in [*self.steps, *self.maps]:
            self._emit(StepCancelled(at=self.now_s, position=position))
        self.steps.clear()
        self.maps.clear()

    def freeze(self) -> None:
        """Stop everything but the task that calls: its steps and timers are cancelled, and no other task goes on."""
        self.cancel_steps()
        for position in list(self.timers):
            del self.timers[position]
            self._emit(TimerCancelled(at=self.now_s, position=position))
        self._ready.clear()

    def fire(self, position: str) -> None:
        """Make the callback of a timer ready."""
        self._ready.append(self.timers.pop(position))

    def evict(self) -> None:
        """From now on nothing is emitted; drop every coroutine. Their `finally` blocks may run, without effect."""
        self.evicted = True
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            for task in self._tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                coroutine = task.get_coro()
                if not task.done() and coroutine is not None:
                    try:
                        coroutine.close()
                    except BaseException:  # a body may raise whatever it likes while it is dropped
                        pass
                    self.keep_unended(coroutine)
        finally:
            asyncio._set_running_loop(outer)
        self._ready.clear()
        self._tasks.clear()

    def keep_unended(self, coroutine: Any) -> None:
        """Never collect a coroutine that refused to end (a bare `except` in a loop).

        The collector would try again, outside of this loop, where its steps are plain calls.
        """
        if getattr(coroutine, "cr_frame", None) is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(coroutine))

    # The part of asyncio's interface that a body needs -------------------------------------------------------

    def time(self) -> float:
        return self.now_s

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        """Ignored: debug mode measures wall time."""

    def is_running(self) -> bool:
        return asyncio._get_running_loop() is self

    def is_closed(self) -> bool:
        return False

    def create_future(self) -> WorkflowFuture:
        self._created += 1
        return WorkflowFuture(loop=self, number=self._created)

    def create_task(self, coro: Any, **kwargs: Any) -> WorkflowTask:
        _check_ordered(sys._getframe(1))
        kwargs.pop("eager_start", None)
        parent: Any = asyncio.current_task(self) if self.is_running() else None
        owner = parent if isinstance(parent, WorkflowTask) else self._orphans
        owner.children += 1
        first = parent is None and not self._tasks
        path = "" if first else f"{owner.path}t{owner.children}."
        self._created += 1
        task = WorkflowTask(coro, loop=self, path=path, number=self._created, **kwargs)
        if len(self._tasks) >= self._prune_at:
            self._tasks = [t for t in self._tasks if not t.done()]
            self._prune_at = max(64, 2 * len(self._tasks))
        self._tasks.append(task)
        return task

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        if not self.evicted:
            self._ready.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self._start_timer(self.now_s + delay, delay, callback, args, context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self._start_timer(when, when - self.now_s, callback, args, context)

    def _start_timer(self, when: float, delay: float, callback: Any, args: Any, context: Any) -> _Timer:
        if not delay <= _MAX_DELAY_S:
            raise ConfigurationError(f"a wait of {delay} s is longer than a century: no timer can be set for it")
        timer = _Timer(when, callback, args, self, context)
        if not self.evicted:
            timer.position = self._next_position()
            self.timers[timer.position] = timer
            self._emit(TimerStarted(at=self.now_s, position=timer.position, due_at=when, delay_s=max(0.0, delay)))
        return timer

    def _timer_handle_cancelled(self, timer: asyncio.TimerHandle) -> None:
        position = getattr(timer, "position", "")
        if self.timers.pop(position, None) is not None and not self.evicted:
            self._emit(TimerCancelled(at=self.now_s, position=position))

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """Silent: a failure that matters reaches the body through what it awaits."""

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.default_exception_handler(context)

    async def shutdown_asyncgens(self) -> None:
        """Nothing to shut down: the loop sets no hooks."""

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> NoReturn:
        _refuse("another thread can't reach a workflow")

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> NoReturn:
        _refuse("threads and executors are not replayed")

    # Places --------------------------------------------------------------------------------------------------

    def _owner(self) -> WorkflowTask | WorkflowCounter:
        task = asyncio.current_task(self)
        return task if isinstance(task, WorkflowTask) else self._orphans

    def _next_position(self) -> str:
        owner = self._owner()
        owner.commands += 1
        return f"{owner.path}{owner.commands}"

    def _next_place(self) -> str:
        owner = self._owner()
        return f"{owner.path}{owner.commands + 1}"

    def _draw(self) -> bytes:
        owner = self._owner()
        owner.draws += 1
        return hashlib.sha256(f"{self.run_uid}\x1f{owner.path}\x1f{owner.draws}".encode()).digest()


class WorkflowCounter:
    """Counts for what is made outside of any task (in a callback)."""

    def __init__(self) -> None:
        self.path = "c."
        self.commands = 0
        self.children = 0
        self.draws = 0


def current_workflow() -> WorkflowLoop | None:
    """The loop of the workflow whose body is running in this thread, or None."""
    loop = asyncio._get_running_loop()
    return loop if isinstance(loop, WorkflowLoop) else None


# A nested loop runs inside another loop's task. Python 3.12 and later allow one current task a thread, and bring the
# call that takes it away for a while.
_swap = getattr(asyncio.tasks, "_swap_current_task", None)


def _leave_task(loop: Any) -> Any:
    if _swap is None or loop is None or asyncio.current_task(loop) is None:
        return None  # 3.12 has a KeyError for a loop without a current task
    return _swap(loop, None)


def _enter_task(loop: Any, task: Any) -> None:
    if _swap is not None and loop is not None and task is not None:
        _swap(loop, task)


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(self: WorkflowLoop, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(f"{name}: input and output are not replayed")

    return refuse


_IO = ("create_", "sock_", "add_", "remove_", "connect_", "subprocess_", "start_tls", "sendfile", "getaddrinfo")
for _name in dir(asyncio.AbstractEventLoop):
    if _name.startswith(_IO) and _name not in ("create_task", "create_future"):
        setattr(WorkflowLoop, _name, _refusal(_name))


def _refuse(why: str) -> NoReturn:
    raise ConfigurationError(f"not available inside a workflow: {why}. Do it in a step and await the step")


def _check_ordered(frame: Any) -> None:
    """Refuse tasks that asyncio's own as_completed makes from a set of bare coroutines (imported before us by name)."""
    if not frame.f_code.co_name.endswith("ensure_future"):
        return
    for _ in range(4):
        frame = frame.f_back
        if frame is None:
            return
        if frame.f_code in _UNORDERED:
            raise PyWorkflowError(
                "asyncio.as_completed was given coroutines before pyworkflow_ray could order them: "
                "call it as asyncio.as_completed(...), or pass tasks made with asyncio.create_task"
            )


# asyncio.as_completed makes its tasks in the order of a set of coroutines, hashed by address: another order in every
# process. Inside a workflow its bare coroutines are made tasks in the order given, and then it is asyncio's own.
_original_as_completed = asyncio.as_completed
_UNORDERED = frozenset(
    code
    for code in (
        getattr(_original_as_completed, "__code__", None),
        getattr(getattr(_original_as_completed, "__init__", None), "__code__", None),
    )
    if code is not None
)


def _as_completed(fs: Iterable[Any], *, timeout: float | None = None) -> Iterator[Any]:
    loop = current_workflow()
    if loop is None:
        return _original_as_completed(fs, timeout=timeout)
    ordered = [
        loop.create_task(item) if isinstance(item, Coroutine) else asyncio.ensure_future(item, loop=loop)
        for item in dict.fromkeys(fs)
    ]
    return _original_as_completed(ordered, timeout=timeout)


_as_completed.__doc__ = _original_as_completed.__doc__
asyncio.as_completed = _as_completed
asyncio.tasks.as_completed = _as_completed
