"""`WorkflowEnv`: workflows run in a test's own process, in virtual time, without Ray and without a disk.

Used by tests (`pyworkflow_ray.testing`); calls the engine's driver through `owner`, the attempt loop, and breakers in
process. The same as in production: driver, replay, attempt loop, retries, timeouts, breakers, codec, code found by its
reference. Not the same: the clock, the journal (in memory), workers (all steps share this process), the cluster.
Faults: those a test asks for (`fail`, `crash_after`, `crash_everywhere`); a run that can't go on says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import random
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from pyworkflow_ray.durations import Duration, parse_duration
from pyworkflow_ray.engine.calls import StepCall
from pyworkflow_ray.engine.commands import Limits
from pyworkflow_ray.engine.events import Event
from pyworkflow_ray.engine.loop import current_workflow
from pyworkflow_ray.errors import ConfigurationError, RunExistsError, RunNotFoundError
from pyworkflow_ray.execution import breakers, budgets
from pyworkflow_ray.execution.breakers import Circuit, CircuitGuard, LocalCircuit, declare, declared
from pyworkflow_ray.execution.code import local_code
from pyworkflow_ray.execution.context import running_step
from pyworkflow_ray.execution.environment import capture_environment
from pyworkflow_ray.execution.resource import close_here
from pyworkflow_ray.execution.submission import difference, make_created
from pyworkflow_ray.execution.timeouts import elapse
from pyworkflow_ray.execution.worker_loop import new_step_task
from pyworkflow_ray.resilience.breaker import BreakerSettings
from pyworkflow_ray.storage.codec import StorageCodec
from pyworkflow_ray.testing import sleeping
from pyworkflow_ray.testing.blobs import MemoryBlobs
from pyworkflow_ray.testing.crashes import crash_everywhere
from pyworkflow_ray.testing.handles import EnvRunHandle
from pyworkflow_ray.testing.injected import Injected
from pyworkflow_ray.testing.owner import Owner
from pyworkflow_ray.testing.problems import DeadlockError
from pyworkflow_ray.testing.replaying import replay
from pyworkflow_ray.testing.virtual_loop import NothingDueError, VirtualLoop
from pyworkflow_ray.testing.waiting import what_waits
from pyworkflow_ray.workflow import Workflow

P = ParamSpec("P")
R = TypeVar("R")

_STORAGE_ID = "0" * 32


class WorkflowEnv:
    """`async with WorkflowEnv() as env: result = await env.run(flow, ...)`; also `with`, and in sync tests `run_sync`.

    Time is virtual: it stands still while code runs and jumps to what is due next when nothing does, so a day's sleep
    takes milliseconds. Virtual, in workflows and in steps, are `asyncio.sleep`, `asyncio.timeout`, `pw.sleep`,
    `pw.now`, waits between attempts, timeouts, deadlines, a breaker's recovery timeout, and in steps `time.sleep` by
    that name. Real are `from time import sleep`, `time.time()`, `datetime.now()`, the network, threads, and code that
    computes (a step's timeout ends that too, in real time). While a thread works the clock stands still; while a
    socket is open it jumps only after `io_wait` of quiet.

    All steps run in this process, one `await` at a time. A `def` step runs in one go when it begins; the time that it
    slept passes afterwards, so that steps side by side take as long as the longest, as on a cluster. Nothing but its
    own timeout interrupts it. Breakers and retry budgets are the environment's own: they begin closed and full,
    whatever other tests did. What async steps get from a `pw.resource` is made once an environment, and closed at its
    end.

    Args:
        seed: Decides jitter, run ids and `pw.random()`: the same seed, the same run.
        start: The instant at which time begins, aware; None: now.
        io_wait: Real quiet after which the clock may jump though a socket is open (default 0.2 s).
        real_wait: A thread or socket that a step waits for longer than this is an error (default 10 s).
        max_events: A run of more events is paused (default 20,000): it loops.
        before_run: Called before each run, those of `crash_everywhere` included: sets the test's doubles back.

    Raises:
        ConfigurationError: a value is not allowed.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        start: dt.datetime | None = None,
        io_wait: Duration = 0.2,
        real_wait: Duration = 10,
        max_events: int = 20_000,
        before_run: Callable[[], Any] | None = None,
    ) -> None:
        if start is not None and start.tzinfo is None:
            raise ConfigurationError(f"WorkflowEnv(start={start!r}) is naive: give an aware datetime, in UTC say")
        self.limits = Limits(max_events=max_events)
        self.injected = Injected()
        self.rng = random.Random(seed)
        self._options: dict[str, Any] = {
            "seed": seed,
            "io_wait": io_wait,
            "real_wait": real_wait,
            "max_events": max_events,
            "before_run": before_run,
        }
        self._start_s = float(int(time.time())) if start is None else start.timestamp()
        self._ids = random.Random(f"ids of {seed}")
        self._before_run = before_run
        self._waits_s = (parse_duration(io_wait), parse_duration(real_wait))
        self._loop: VirtualLoop | None = None
        self._ahead_s = 0.0  # of the loop's time: what the sync step that runs now has slept
        self._owners: dict[str, Owner] = {}
        self._last: Owner | None = None
        self._crash_after: int | None = None
        self._circuits: dict[str, LocalCircuit] = {}
        self._budgets: dict[str, budgets.LocalBudget] = {}
        self._stack = contextlib.ExitStack()
        self._thread = 0

    # Entering and leaving ----------------------------------------------------------------------------------------

    def __enter__(self) -> WorkflowEnv:
        if self._loop is not None:
            raise ConfigurationError("this WorkflowEnv is entered already: make another one")
        self._loop = loop = VirtualLoop(io_wait_s=self._waits_s[0], real_wait_s=self._waits_s[1])
        loop.set_task_factory(new_step_task)
        self._thread = threading.get_ident()
        self.blobs = MemoryBlobs()
        self.codec = StorageCodec(self.blobs)
        self.step_sleep = _StepSleep(self)
        self._environment = capture_environment()
        self._stack.enter_context(local_code())
        self._stack.callback(loop.finish)
        self._stack.callback(self._close_resources)
        sleeping.install()
        self._stack.callback(sleeping.remove)
        for module, mine in ((breakers, self._circuit), (budgets, self._budget)):
            module.keep_apart(mine)
            self._stack.callback(module.end_apart, mine)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for owner in self._owners.values():
            owner.abandon()
        self._stack.close()

    async def __aenter__(self) -> WorkflowEnv:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    def _close_resources(self) -> None:
        with contextlib.suppress(NothingDueError):
            self.loop.drive(self.loop.create_task(close_here()), not_after=self.loop.time() + 10.0)

    # Running -----------------------------------------------------------------------------------------------------

    async def run(self, flow: Workflow[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it to its end, return its result, as `pw.run` does.

        Raises:
            The workflow's own exception; TypeError, pydantic.ValidationError, RunExistsError as `pw.start`.
            RunPausedError, NonDeterminismError: it is paused.
            DeadlockError: nothing is due and nothing runs.
            RealWaitError: a step really waits, longer than `real_wait`.
            AssertionError: it had fewer events than `crash_after` asked for.
        """
        handle: EnvRunHandle[R] = self._started(flow, args, kwargs)
        return await handle._value_async()

    def run_sync(self, flow: Workflow[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """As `run`, from a test that is no coroutine."""
        return self._started(flow, args, kwargs).result()

    def start(self, flow: Workflow[P, R], *args: P.args, **kwargs: P.kwargs) -> EnvRunHandle[R]:
        """Start a run; it goes on while somebody waits: for its handle, for another run, or in `advance`."""
        return self._started(flow, args, kwargs)

    async def advance(self, duration: Duration) -> None:
        """Let so much virtual time pass; the runs that were started go on meanwhile."""
        until = self.loop.time() + parse_duration(duration)
        self._check_outside()
        try:
            await self.loop.drive_async(self.loop.create_future(), not_after=until)
        finally:
            self._check_broken()

    def now(self) -> dt.datetime:
        """The virtual time, aware, in UTC."""
        return dt.datetime.fromtimestamp(self.clock(), dt.UTC)

    def _started(self, flow: Workflow[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> EnvRunHandle[R]:
        if not isinstance(flow, Workflow):
            raise TypeError(f"a WorkflowEnv runs workflows, made by @workflow, not {flow!r}")
        self._check_outside()
        created = make_created(
            flow.definition,
            args,
            kwargs,
            run_id=flow.run_id or f"run-{len(self._owners) + 1}",
            attributes=flow.attributes,
            storage_id=_STORAGE_ID,
            environment=self._environment,
            codec=self.codec,
            at=self.clock(),
            uid=f"{self._ids.getrandbits(128):032x}",
        )
        found = self._owners.get(created.run_id)
        if found is not None:
            why = difference(found.created, created)
            if why is not None:
                raise RunExistsError(f"run {created.run_id!r} exists: {why}", run_id=created.run_id)
            return EnvRunHandle(self, found)
        if self._before_run is not None:
            self._before_run()
        owner = self._owners[created.run_id] = self._last = Owner(self, created)
        owner.crash_at, self._crash_after = self._crash_after, None
        owner.begin()
        return EnvRunHandle(self, owner)

    # Faults ------------------------------------------------------------------------------------------------------

    def fail(self, step: Any, times: int | None = 1, error: BaseException | type[BaseException] | None = None) -> None:
        """The next `times` attempts of a step fail, of whatever call of it, before its function begins.

        A step that is called inside another one is part of that and can't be failed apart.

        Args:
            step: The step, or its name.
            times: None: every attempt from now on.
            error: What they raise, an exception or a class of them; None: a ConnectionError, which is transient.

        Raises:
            ConfigurationError: no such step is known, or a value is not allowed.
        """
        self.injected.add(step, times, error)

    def crash_after(self, n: int) -> None:
        """The run that is started next loses its owner once its n-th event is durable, and is recovered.

        All that its owner and its running steps had in memory is lost, as by SIGKILL; but the `finally` of a step that
        was running is executed, for it shares the test's process. With fewer than `n` events `run` is an
        AssertionError.

        Raises:
            ConfigurationError: n is below 1.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ConfigurationError(
                f"crash_after({n!r}): allowed is a whole number ≥ 1, the event after which it dies"
            )
        self._crash_after = n

    async def crash_everywhere(self, flow: Workflow[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it once undisturbed, then once for each of its events with a crash after that one, and compare.

        Each run has an environment of its own that begins at the same instant with the same ids, failures (`fail`),
        closed breakers and `before_run`. Returns the result, or raises the run's own exception, as `run` does;
        `events()` then shows the undisturbed run.

        Raises:
            AssertionError: after a crash the run came to another end, or a step was completed twice or not at all. The
                message names the event.
        """
        self._check_outside()
        owner, handle = await crash_everywhere(self, flow, args, kwargs)
        self._last = owner
        return handle._value()  # type: ignore[no-any-return]

    def replay(self, history: Any, flow: Workflow[..., Any] | None = None) -> None:
        """Follow a recorded history with the code as it is now, executing nothing.

        Args:
            history: The handle of a run, its events, or a file of them as `runs events --json` prints it.
            flow: The workflow; None: the one that the history names.

        Raises:
            NonDeterminismError: the code no longer does what the history says.
            ConfigurationError: the history, or its code, can't be read here.
        """
        replay(self, history, flow)

    def copy(self) -> WorkflowEnv:
        """Another one, not entered, that begins as this one is now: same seed and time, same failures to come."""
        start = dt.datetime.fromtimestamp(self.clock(), dt.UTC)
        other = WorkflowEnv(start=start, **self._options)
        other.injected = self.injected.copy()
        return other

    # Looking -----------------------------------------------------------------------------------------------------

    def get_run(self, run_id: str | None = None) -> EnvRunHandle[Any]:
        """The handle of a run; None: of the one that was started last.

        Raises:
            RunNotFoundError: there is none.
        """
        owner = self._last if run_id is None else self._owners.get(run_id)
        if owner is None:
            known = ", ".join(self._owners) or "none"
            raise RunNotFoundError(f"no run {run_id or ''!r} in this environment; runs: {known}", run_id=run_id or "")
        return EnvRunHandle(self, owner)

    def list_runs(self) -> list[EnvRunHandle[Any]]:
        """Every run of this environment, newest first."""
        return [EnvRunHandle(self, owner) for owner in reversed(self._owners.values())]

    def events(self, run_id: str | None = None) -> list[Event]:
        """The events of a run; None: of the one that was started last."""
        return self.get_run(run_id).events()

    def steps(self, run_id: str | None = None) -> list[Any]:
        """A view of each step of a run, as `handle.steps()`."""
        return self.get_run(run_id).steps()

    def explain(self, run_id: str | None = None) -> Any:
        """What happened in a run and why, as `handle.explain()`."""
        return self.get_run(run_id).explain()

    # For the rest of this package --------------------------------------------------------------------------------

    @property
    def loop(self) -> VirtualLoop:
        if self._loop is None:
            raise ConfigurationError("this WorkflowEnv is not entered: async with WorkflowEnv() as env: ...")
        if self._loop.is_closed():
            raise ConfigurationError("this WorkflowEnv has ended")
        return self._loop

    def clock(self) -> float:
        """UNIX time, virtual."""
        return self._start_s + (0.0 if self._loop is None else self._loop.time()) + self._ahead_s

    def loop_time(self, at: float) -> float:
        """A UNIX time on the loop's clock."""
        return max(at - self._start_s, self.loop.time())

    async def settle(self) -> None:
        """What a sync step has slept passes."""
        slept_s, self._ahead_s = self._ahead_s, 0.0
        if slept_s > 0:
            await asyncio.sleep(slept_s)

    def guard(self, call: StepCall) -> CircuitGuard | None:
        """The breaker of a step call."""
        if call.breaker is None:
            return None
        found = declared(call.breaker)
        if found is None:
            if call.breaker_settings is None:
                raise ConfigurationError(
                    f"step {call.step!r} has breaker={call.breaker!r}, and no CircuitBreaker of that name is declared: "
                    "import the module that makes it, or make one"
                )
            found = declare(call.breaker, BreakerSettings.from_options(call.breaker_settings))
        return CircuitGuard(self._circuit(found), call.breaker_generation, f"{call.run_uid}:{call.position}")

    def _circuit(self, found: breakers.Declared) -> Circuit:
        circuit = self._circuits.get(found.name)
        if circuit is None:
            circuit = LocalCircuit(found.name, found.settings, clock=self.clock, counts=found.counts)
            self._circuits[found.name] = circuit
        return circuit

    def _budget(self, found: budgets.Declared) -> budgets.Budget:
        return self._budgets.setdefault(found.name, budgets.LocalBudget(found.name, found.settings))

    async def settle_run(self, owner: Owner) -> None:
        """Drive the loop until the run has ended, is paused, or can't go on."""
        if owner.settled.done():
            return
        self._check_outside()
        try:
            await self.loop.drive_async(owner.settled)
        except NothingDueError:
            raise self._deadlock(owner) from None
        self._check_crashed(owner)

    def settle_run_blocking(self, owner: Owner, seconds: float | None) -> None:
        if owner.settled.done():
            return
        self._check_outside()
        try:
            self.loop.drive(owner.settled, not_after=None if seconds is None else self.loop.time() + seconds)
        except NothingDueError:
            raise self._deadlock(owner) from None
        if owner.settled.done():
            self._check_crashed(owner)

    def _deadlock(self, owner: Owner) -> DeadlockError:
        return DeadlockError(
            f"run {owner.run_id!r} ({owner.created.workflow}) can't go on: nothing is due and nothing runs. "
            + what_waits(self.loop, owner)
        )

    def _check_crashed(self, owner: Owner) -> None:
        if owner.crash_at is not None and owner.broken is None:
            asked, owner.crash_at = owner.crash_at, None
            raise AssertionError(
                f"crash_after({asked}) did not strike: run {owner.run_id!r} has {len(owner.store.durable)} events"
            )

    def _check_broken(self) -> None:
        for owner in self._owners.values():
            if owner.broken is not None:
                raise owner.broken

    def _check_outside(self) -> None:
        if current_workflow() is not None or asyncio._get_running_loop() is self.loop:
            raise ConfigurationError("a WorkflowEnv is used by tests, not inside a workflow or a step that it runs")


class _StepSleep:
    """`pw.sleep` in a sync step, and `time.sleep` in any: the environment's time passes, nothing waits."""

    def __init__(self, env: WorkflowEnv) -> None:
        self._env = env

    def __call__(self, seconds: float) -> None:
        self.virtual(seconds)

    def virtual(self, seconds: float) -> None:
        env, step = self._env, running_step()
        if threading.get_ident() != env._thread:  # a thread of the step's own: its time is real
            sleeping.really(seconds)
        elif step is not None and step._is_async:
            env.loop.pass_time(seconds)  # it blocks its worker
        else:
            elapse(seconds, self._spend)

    def _spend(self, seconds: float) -> None:
        self._env._ahead_s += seconds
