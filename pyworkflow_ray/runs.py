"""Starting runs, following them, taking them up again. What users call; the work is `runtime.client`'s and the storage's.

Runs that have ended, or that another Ray owns, are read from the storage. Ray is started, or found, by what needs it:
`start`, `run`, `resume`, `recover`, `wake`, `cancel`; reading never starts it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import datetime as dt
import logging
import os
import queue
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast

from pyworkflow_ray.durations import Duration, parse_duration
from pyworkflow_ray.engine.events import Event, RunCancelled, RunCompleted, RunCreated, RunFailed, RunParked, RunPaused
from pyworkflow_ray.errors import (
    ConfigurationError,
    RunCancelledError,
    RunFailedError,
    StepFailedError,
    StorageError,
)
from pyworkflow_ray.ids import check_run_id
from pyworkflow_ray.workflow import Workflow

if TYPE_CHECKING:
    import duckdb

    from pyworkflow_ray.observability.model import RunView, StepView
    from pyworkflow_ray.runtime.client import Client
    from pyworkflow_ray.storage.storage import RunHistory, Storage

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger("pyworkflow_ray")

_POLL_S = 0.2
_DRAIN_S = 10.0


class RunStatus(str, Enum):
    """Where a run stands. *parked*: waits by itself and holds no actor. *paused*: waits for a person."""

    PENDING = "pending"
    RUNNING = "running"
    PARKED = "parked"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    __str__ = str.__str__

    @property
    def ended(self) -> bool:
        return self in (RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELLED)


class RunHandle(Generic[R]):
    """One run, whoever owns it. Awaitable; comparable and hashable by run id.

    Attributes:
        run_id: Its id.
    """

    def __init__(self, run_id: str, storage: Storage) -> None:
        self.run_id = run_id
        self._storage = storage

    # What the storage knows -------------------------------------------------------------------------------------

    def status(self) -> RunStatus:
        """Where the run stands now.

        Raises:
            RunNotFoundError, CorruptJournalError: it can't be read.
        """
        return _status(self._history())

    def done(self) -> bool:
        """Whether it has ended: completed, failed or cancelled."""
        return self._history().finished

    def events(self) -> list[Event]:
        """The run's history so far, oldest first."""
        return list(self._history().events)

    def steps(self) -> list[StepView]:
        """A view of each step, in the order in which they were scheduled."""
        return list(self.explain().steps)

    def explain(self) -> RunView:
        """What happened, why, and what happens next: the model that the command line and notebooks show."""
        from pyworkflow_ray.observability.view import explain

        history = self._history()
        return explain(history.events, time.time(), torn=history.torn and not history.finished)

    @property
    def trace_id(self) -> str:
        """W3C trace id of the run's spans: the same before and after a crash."""
        return _created(self._history()).trace_id

    # Its end ----------------------------------------------------------------------------------------------------

    def result(self, timeout: Duration | None = None) -> R:
        """Wait for the run, return its value.

        Args:
            timeout: How long to wait; None: as long as it takes.

        Raises:
            TimeoutError: it has not ended in time; it goes on.
            RunCancelledError: it was cancelled.
            RunFailedError: it failed with an exception that can't be restored here.
            The workflow's own exception, with run id and step as notes.
        """
        self._wait(timeout)
        return self._value()

    def exception(self, timeout: Duration | None = None) -> BaseException | None:
        """Wait for the run, return what `result` would raise; None where it completed.

        Raises:
            TimeoutError: as `result`.
        """
        self._wait(timeout)
        return self._error(self._history())

    def __await__(self) -> Generator[Any, None, R]:
        return self._value_async().__await__()

    async def _value_async(self) -> R:
        client = _client_of(self._storage)
        if not self.done():
            if client is None:
                while not self.done():
                    await asyncio.sleep(_POLL_S)
            else:
                future = client.ended(self.run_id)
                try:
                    await asyncio.wrap_future(future)
                finally:
                    client.forget(self.run_id, future)
        return self._value()

    def cancel(self, reason: str | None = None) -> None:
        """Ask for the run to end: CancelledError is raised in its body, whose `finally` may await steps for a grace.

        Returns at once; a run that has ended stays as it is. `result()` then raises RunCancelledError.

        Raises:
            RunError: another Ray that is alive owns the run.
        """
        if not self.done():
            _need_client(self._storage).call("cancel", self.run_id, reason)

    def _wait(self, timeout: Duration | None) -> None:
        seconds = None if timeout is None else parse_duration(timeout)
        client = _client_of(self._storage)
        if client is None:
            self._poll(seconds)
            return
        future = client.ended(self.run_id)
        try:
            future.result(seconds)
        except TimeoutError:
            if not self.done():
                raise TimeoutError(f"run {self.run_id!r} has not ended after {seconds} s; it goes on") from None
        finally:
            client.forget(self.run_id, future)

    def _poll(self, seconds: float | None) -> None:
        deadline = None if seconds is None else time.monotonic() + seconds
        while not self.done():
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"run {self.run_id!r} has not ended after {seconds} s; it goes on")
            time.sleep(_POLL_S)

    def _value(self) -> R:
        history = self._history()
        error = self._error(history)
        if error is not None:
            raise error
        end = history.events[-1]
        if not isinstance(end, RunCompleted):
            raise StorageError(f"run {self.run_id!r} has not ended", path=self._storage.root)
        return cast(R, _codec(self._storage).decode(end.result))

    def _error(self, history: RunHistory) -> BaseException | None:
        end = next(
            (e for e in reversed(history.events) if isinstance(e, (RunFailed, RunCancelled, RunCompleted))), None
        )
        if isinstance(end, RunCancelled):
            why = f": {end.reason}" if end.reason else ""
            return RunCancelledError(f"run {self.run_id!r} was cancelled{why}", run_id=self.run_id, reason=end.reason)
        if not isinstance(end, RunFailed):
            return None
        error = _codec(self._storage).decode_error(end.error)
        if isinstance(error, StepFailedError) and end.error.type != "StepFailedError":
            text = f"run {self.run_id!r} failed: {end.error.type}: {end.error.message}"
            error = RunFailedError(
                text,
                run_id=self.run_id,
                type=end.error.type,
                error_message=end.error.message,
                traceback_text=end.error.traceback,
            )
        error.add_note(_where(history, end))
        return cast(BaseException, error)

    def _history(self) -> RunHistory:
        return self._storage.read_run(self.run_id)

    def __repr__(self) -> str:
        return f"<run {self.run_id}>"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RunHandle)
            and self.run_id == other.run_id
            and self._storage.storage_id == other._storage.storage_id
        )

    def __hash__(self) -> int:
        return hash((self._storage.storage_id, self.run_id))


# Starting ---------------------------------------------------------------------------------------------------------


def start(flow: Workflow[P, R], *args: P.args, **kwargs: P.kwargs) -> RunHandle[R]:
    """Start a run; returns once it is durable.

    With `flow.options(run_id=...)` a run that exists is not started again: its handle is returned where workflow and
    arguments are the same.

    Raises:
        TypeError, pydantic.ValidationError: the arguments do not fit the workflow.
        RunExistsError: the run id is taken by another workflow or other arguments.
        ConfigurationError: the code, or an option, can't be used.
        StorageError: the run could not be made durable.
    """
    _check_flow(flow, "start")
    _refuse_inside_workflow("pw.start")
    return _start([(flow, args, kwargs)])[0]


async def start_async(flow: Workflow[P, R], *args: P.args, **kwargs: P.kwargs) -> RunHandle[R]:
    """As `start`, without blocking the running event loop."""
    _check_flow(flow, "start_async")
    _refuse_inside_workflow("pw.start_async")
    given: list[tuple[Workflow[..., R], tuple[Any, ...], Mapping[str, Any]]] = [(flow, args, kwargs)]
    return (await asyncio.to_thread(_start, given))[0]


def run(flow: Workflow[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Start a run and wait for its result. Ctrl-C cancels it on an embedded Ray, and leaves it running on a cluster.

    Raises:
        As `start` and `RunHandle.result`.
    """
    handle = start(flow, *args, **kwargs)
    try:
        return handle.result()
    except KeyboardInterrupt:
        client = _client_of(handle._storage)
        if client is not None and client.owns_ray:
            with contextlib.suppress(Exception):
                handle.cancel("interrupted (Ctrl-C)")
                handle._wait(5.0)
        else:
            log.warning("run %s goes on; follow it with pw.get_run(%r)", handle.run_id, handle.run_id)
        raise


def start_many(flow: Workflow[..., R], calls: Iterable[Sequence[Any] | Mapping[str, Any]]) -> list[RunHandle[R]]:
    """Start many runs in one submission.

    Args:
        calls: The arguments of each run: a tuple or list of positionals, or a dict of keywords.

    Returns:
        A handle a run, in order. All are durable.

    Raises:
        As `start`; nothing is started where an argument does not fit.
    """
    _check_flow(flow, "start_many")
    _refuse_inside_workflow("pw.start_many")
    given: list[tuple[Workflow[..., R], tuple[Any, ...], Mapping[str, Any]]] = []
    for number, call in enumerate(calls):
        if isinstance(call, Mapping):
            given.append((flow, (), call))
        elif isinstance(call, (tuple, list)):
            given.append((flow, tuple(call), {}))
        else:
            raise TypeError(
                f"start_many: item {number} is a {type(call).__name__}: give a tuple of positionals or a dict of keywords"
            )
    if flow.run_id is not None and len(given) > 1:
        raise ConfigurationError(f"start_many: {len(given)} runs can't share run_id={flow.run_id!r}")
    return _start(given)


def _start(given: list[tuple[Workflow[..., R], tuple[Any, ...], Mapping[str, Any]]]) -> list[RunHandle[R]]:
    from pyworkflow_ray.runtime.submission import make_created

    client = _need_client(None)
    events = [
        make_created(
            flow.definition,
            args,
            kwargs,
            run_id=flow.run_id,
            attributes=flow.attributes,
            storage_id=client.storage.storage_id,
            environment=client.environment,
            codec=client.codec,
            put_blob=client.storage.put_blob,
        )
        for flow, args, kwargs in given
    ]
    handles: list[RunHandle[R]] = []
    for answer in client.submit(events):
        if answer.error is not None:
            raise answer.error
        handles.append(RunHandle(answer.run_id, client.storage))
    return handles


# Finding ----------------------------------------------------------------------------------------------------------


def get_run(run_id: str) -> RunHandle[Any]:
    """The handle of a run, whoever owns it. Starts no Ray.

    Raises:
        RunNotFoundError: the storage has no such run.
    """
    storage = _storage()
    storage.owner(check_run_id(run_id))
    return RunHandle(run_id, storage)


def list_runs(
    status: str | Iterable[str] | None = None,
    workflow: str | Workflow[..., Any] | None = None,
    attributes: Mapping[str, Any] | None = None,
    since: dt.datetime | Duration | None = None,
    limit: int | None = None,
) -> list[RunHandle[Any]]:
    """Handles of runs, newest first. Starts no Ray; a damaged run is left out, with a log line.

    Args:
        status: A status, or several. workflow: Its name (short or whole) or the workflow itself.
        attributes: All of these, with equal values.
        since: Created since this aware datetime, or within this span before now.
        limit: At most so many.
    """
    storage = _storage()
    wanted = None if status is None else {RunStatus(s) for s in ([status] if isinstance(status, str) else status)}
    named = workflow.definition.name if isinstance(workflow, Workflow) else workflow
    earliest = _instant(since)
    found: list[tuple[float, str]] = []
    unfinished_only = wanted is not None and not any(s.ended for s in wanted)
    for run_id in storage.list_run_ids(False if unfinished_only else None):
        try:
            history = storage.read_run(run_id)
        except StorageError as error:
            log.warning("run %s is left out of the list: %s", run_id, error)
            continue
        created = _created(history)
        if (
            (wanted is None or _status(history) in wanted)
            and (named is None or named in (created.workflow, created.workflow.rpartition(":")[2]))
            and (earliest is None or created.at >= earliest)
            and all(created.attributes.get(key) == value for key, value in (attributes or {}).items())
        ):
            found.append((created.at, run_id))
    found.sort(reverse=True)
    return [RunHandle(run_id, storage) for _, run_id in found[:limit]]


def as_completed(handles: Iterable[RunHandle[R]], timeout: Duration | None = None) -> Iterator[RunHandle[R]]:
    """The handles as their runs end, each once; as in `concurrent.futures`.

    Raises:
        TimeoutError: not all have ended in time.
    """
    waiting = list(dict.fromkeys(handles))
    seconds = None if timeout is None else parse_duration(timeout)
    deadline = None if seconds is None else time.monotonic() + seconds
    client = _client_of(waiting[0]._storage) if waiting else None
    if client is None:
        yield from _as_completed_by_polling(waiting, deadline)
        return
    ended: queue.SimpleQueue[RunHandle[R]] = queue.SimpleQueue()
    futures: list[tuple[RunHandle[R], Future[None]]] = []
    try:
        for handle in waiting:
            future = client.ended(handle.run_id)
            futures.append((handle, future))
            future.add_done_callback(lambda _, handle=handle: ended.put(handle))  # type: ignore[misc]
        for left in range(len(waiting), 0, -1):
            try:
                yield ended.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"{left} of {len(waiting)} runs have not ended in time; they go on") from None
    finally:
        for handle, future in futures:
            client.forget(handle.run_id, future)


def _as_completed_by_polling(waiting: list[RunHandle[R]], deadline: float | None) -> Iterator[RunHandle[R]]:
    total = len(waiting)
    while waiting:
        ended = [handle for handle in waiting if handle.done()]
        waiting = [handle for handle in waiting if handle not in ended]
        yield from ended
        if waiting and deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError(f"{len(waiting)} of {total} runs have not ended in time; they go on")
        if waiting and not ended:
            time.sleep(_POLL_S)


# Changing ---------------------------------------------------------------------------------------------------------


def resume(run_id: str) -> RunHandle[Any]:
    """A paused run goes on, a failed one from its failed step with fresh attempts; any other is left alone.

    Raises:
        RunNotFoundError: no such run. RunError: it can't be resumed; the message says why.
    """
    handle = get_run(run_id)
    _need_client(handle._storage).call("resume", run_id)
    return handle


def wake(run_id: str) -> RunHandle[Any]:
    """Retries that the run waits for happen now; its own sleeps stay as they are."""
    handle = get_run(run_id)
    _need_client(handle._storage).call("wake", run_id)
    return handle


def recover(steal: bool = False) -> list[RunHandle[Any]]:
    """Take up the unfinished runs that no living owner holds; returns their handles and does not wait for them.

    Args:
        steal: Take runs from a living owner too; not available in this version.
    """
    if steal:
        raise ConfigurationError("recover(steal=True) is not available in this version")
    client = _need_client(None)
    return [RunHandle(run_id, client.storage) for run_id in client.call("recover", False)]


def sql(query: str) -> duckdb.DuckDBPyRelation:
    """Ask the views `runs`, `events`, `steps` and `attempts`, over live journals and checkpoints together."""
    from pyworkflow_ray.storage.sql import query as query_storage

    return query_storage(_storage(), query)


# The process ------------------------------------------------------------------------------------------------------

_settings: Any = None
_address: str | None = None
_opened: dict[str, Any] = {}


class _Connection:
    """What `init` returns: `with pw.init(...):` shuts down at its end."""

    def __enter__(self) -> _Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutdown()


def init(storage: str | os.PathLike[str] | None = None, address: str | None = None, **settings: Any) -> _Connection:
    """Connect this process: the storage, and Ray. Optional: the first use does it from the environment.

    Args:
        storage: Directory of the runs; None: `PYWORKFLOW_STORAGE`, else `~/.pyworkflow-ray`.
        address: As in Ray; None: `RAY_ADDRESS`, a running local cluster, else a new local one.
        settings: log_level, allow_pickle, pool_min, pool_max, worker_wait_max.

    Raises:
        ConfigurationError: a setting is wrong, the address is no cluster's, or other settings are in force: `shutdown()`
            first.
    """
    global _settings, _address
    from pyworkflow_ray.runtime.client import current
    from pyworkflow_ray.settings import load_settings

    ray_options = settings.pop("ray_options", None)
    loaded = load_settings(storage=None if storage is None else Path(storage), **settings)
    running = current()
    if running is not None:
        if Path(running.storage.root) != loaded.storage or (_settings is not None and loaded != _settings):
            raise ConfigurationError(
                f"this process is connected already, with storage={running.storage.root!r} and "
                f"{_shown(_settings)}: call pw.shutdown() before pw.init with other settings"
            )
        return _Connection()
    _settings, _address = loaded, address
    client = _connect(ray_options)
    if client.owns_ray:
        _report_unfinished(client)
    return _Connection()


def shutdown() -> None:
    """Disconnect. An embedded Ray is drained (no new starts, running steps get 10 s; the rest stays durable for
    `recover`) and ended; a cluster goes on with its runs."""
    global _settings, _address
    import sys

    client = sys.modules.get("pyworkflow_ray.runtime.client")
    if client is not None:
        client.disconnect(_DRAIN_S)
    _settings, _address = None, None


def _connect(ray_options: dict[str, Any] | None = None) -> Client:
    from pyworkflow_ray.runtime.client import connect

    global _settings
    if _settings is None:
        from pyworkflow_ray.settings import load_settings

        _settings = load_settings()
    client = connect(
        _settings.storage,
        address=_address,
        allow_pickle=_settings.allow_pickle,
        pool_min=_settings.pool_min,
        pool_max=_settings.pool_max,
        worker_wait_max_s=_settings.worker_wait_max,
        log_level=_settings.log_level,
        ray_options=ray_options,
    )
    if client.owns_ray:
        atexit.unregister(shutdown)
        atexit.register(shutdown)
    return client


def _report_unfinished(client: Client) -> None:
    from pyworkflow_ray.storage.lease import lease_states

    living = lease_states(client.storage, declare=False).living
    left = []
    for run_id in client.storage.unfinished():
        with contextlib.suppress(StorageError):
            if client.storage.owner(run_id).lease in living:
                left.append(run_id)
    if left:
        shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        log.warning("%d unfinished runs are in %s (%s): pw.recover() takes up those that nobody holds",
                    len(left), client.storage.root, shown)  # fmt: skip


def _need_client(storage: Storage | None) -> Client:
    client = _client_of(storage) if storage is not None else None
    client = client or _connect()
    if storage is not None and client.storage.storage_id != storage.storage_id:
        raise ConfigurationError(
            f"the run lies in {storage.root}, this process is connected to {client.storage.root}: pw.shutdown(), then "
            "pw.init with that storage"
        )
    return client


def _client_of(storage: Storage) -> Client | None:
    """This process's client, where it is one of this storage; connects nothing."""
    import sys

    module = sys.modules.get("pyworkflow_ray.runtime.client")
    client = module.current() if module is not None else None
    return client if client is not None and client.storage.storage_id == storage.storage_id else None


def _storage() -> Storage:
    """The storage of this process, without Ray."""
    import sys

    from pyworkflow_ray.storage.storage import Storage

    module = sys.modules.get("pyworkflow_ray.runtime.client")
    client = module.current() if module is not None else None
    if client is not None:
        return cast(Storage, client.storage)
    settings = _settings
    if settings is None:
        from pyworkflow_ray.settings import load_settings

        settings = load_settings()
    return Storage.open(settings.storage)


def _codec(storage: Storage) -> Any:
    from pyworkflow_ray.storage.codec import StorageCodec

    client = _client_of(storage)
    if client is not None:
        return client.codec
    return StorageCodec(storage, allow_pickle=True if _settings is None else _settings.allow_pickle)


# Reading events ---------------------------------------------------------------------------------------------------


def _created(history: RunHistory) -> RunCreated:
    first = history.events[0]
    assert isinstance(first, RunCreated)
    return first


def _status(history: RunHistory) -> RunStatus:
    for event in reversed(history.events):
        if isinstance(event, RunCompleted):
            return RunStatus.COMPLETED
        if isinstance(event, RunFailed):
            return RunStatus.FAILED
        if isinstance(event, RunCancelled):
            return RunStatus.CANCELLED
        if isinstance(event, RunParked):
            return RunStatus.PARKED
        if isinstance(event, RunPaused):
            return RunStatus.PAUSED
        if event.type == "run_activated":
            return RunStatus.RUNNING
    return RunStatus.PENDING


def _where(history: RunHistory, end: RunFailed) -> str:
    if end.position is None:
        return f"run {history.run_id}"
    for event in history.events:
        if event.type == "step_scheduled" and getattr(event, "position", None) == end.position:
            return f"run {history.run_id}, step {event.step} (position {end.position})"  # type: ignore[attr-defined]
    return f"run {history.run_id}, position {end.position}"


def _instant(since: dt.datetime | Duration | None) -> float | None:
    if since is None:
        return None
    if isinstance(since, dt.datetime):
        if since.tzinfo is None:
            raise ConfigurationError(f"since={since!r} is a naive datetime: give an aware one, or a span such as '1h'")
        return since.timestamp()
    return time.time() - parse_duration(since)


def _check_flow(flow: Any, what: str) -> None:
    if not isinstance(flow, Workflow):
        kind = "a step" if hasattr(flow, "definition") else f"a {type(flow).__name__}"
        raise TypeError(f"pw.{what} takes a workflow (an async def under @workflow), not {kind}")


def _refuse_inside_workflow(what: str) -> None:
    from pyworkflow_ray.engine.loop import current_workflow

    if current_workflow() is not None:
        raise ConfigurationError(
            f"{what} inside a workflow would not be durable: child runs are not available in this version"
        )


def _shown(settings: Any) -> str:
    if settings is None:
        return "the defaults"
    return ", ".join(f"{name}={value!r}" for name, value in settings.model_dump().items() if name != "storage")


_Start = Callable[..., Coroutine[Any, Any, Any]]
