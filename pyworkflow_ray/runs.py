"""Starting runs, finding them, taking them up again. What users call; `runtime.client` and the storage do the work.

Ray is started, or found, by what needs it (`start`, `run`, `resume`, `recover`, `wake`); finding runs never starts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import queue
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from pyworkflow_ray.connection import client_of, init, need_client, open_storage, shutdown
from pyworkflow_ray.durations import Duration, parse_duration
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.handle import POLL_S, RunHandle, RunStatus, created_of
from pyworkflow_ray.ids import check_run_id
from pyworkflow_ray.watching import RunList
from pyworkflow_ray.workflow import Workflow

if TYPE_CHECKING:
    import duckdb

    from pyworkflow_ray.storage.port import StoragePort

__all__ = [
    "RunHandle",
    "RunStatus",
    "as_completed",
    "get_run",
    "init",
    "list_runs",
    "recover",
    "rerun",
    "resume",
    "run",
    "shutdown",
    "sql",
    "start",
    "start_async",
    "start_many",
    "wake",
]

P = ParamSpec("P")
R = TypeVar("R")

_RESUMED_S = 30.0
_RESUMED_LOOK_S = 0.01

log = logging.getLogger("pyworkflow_ray")


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
        client = client_of(handle._storage)
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
                f"start_many: item {number} is a {type(call).__name__}: give a tuple of positionals or a dict"
            )
    if flow.run_id is not None and len(given) > 1:
        raise ConfigurationError(f"start_many: {len(given)} runs can't share run_id={flow.run_id!r}")
    return _start(given)


def _start(given: list[tuple[Workflow[..., R], tuple[Any, ...], Mapping[str, Any]]]) -> list[RunHandle[R]]:

    from pyworkflow_ray.observability.current import caller
    from pyworkflow_ray.runtime.submission import make_created

    client = need_client(None)
    events = [
        make_created(
            flow.definition,
            args,
            kwargs,
            run_id=flow.run_id,
            attributes={**client.attributes, **flow.attributes},
            storage_id=client.storage.storage_id,
            environment=client.environment,
            codec=client.codec,
            traceparent=caller(),
        )
        for flow, args, kwargs in given
    ]
    handles: RunList[R] = RunList()
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
    storage = open_storage()
    storage.owner(check_run_id(run_id))
    return RunHandle(run_id, storage)


def list_runs(
    status: str | Iterable[str] | None = None,
    workflow: str | Workflow[..., Any] | None = None,
    attributes: Mapping[str, Any] | None = None,
    since: dt.datetime | Duration | None = None,
    limit: int | None = None,
    before: str | RunHandle[Any] | None = None,
) -> list[RunHandle[Any]]:
    """Handles of runs, newest first. Starts no Ray; a damaged run is left out, with a log line.

    Looks finished runs up, however many there are, and reads unfinished ones. For pages give `limit`, and the last
    handle of one page as `before` of the next.

    Args:
        status: A status, or several. workflow: Its name (short or whole) or the workflow itself.
        attributes: All of these, with equal values, as JSON has them: 1 equals 1.0 and not True. None: null or absent.
        since: Created since this aware datetime, or within this span before now.
        limit: At most so many.
        before: Only runs that come after this one in the list: its handle or id, or a cursor of `runs list`.
    """
    from pyworkflow_ray.storage.catalogue import ABSENT, Query, canonical
    from pyworkflow_ray.storage.listing import page

    storage = open_storage()
    wanted = None if status is None else {RunStatus(s) for s in ([status] if isinstance(status, str) else status)}
    earliest = instant(since)
    query = Query(
        statuses=None if wanted is None else frozenset(s.value for s in wanted),
        workflow=workflow.definition.name if isinstance(workflow, Workflow) else workflow,
        attributes=tuple(
            (name, frozenset({canonical(value)} | ({ABSENT} if value is None else set())))
            for name, value in (attributes or {}).items()
        ),
        since=None if earliest is None else round(earliest * 1_000_000),
        before=_before(storage, before),
    )
    if limit is not None and limit < 1:
        return []
    found = page(storage, query, limit)
    for run_id, message in found.damaged.items():
        log.warning("run %s is left out of the list: %s", run_id, message)
    return RunList(RunHandle(row.run_id, storage) for row in found.rows)


def _before(storage: StoragePort, before: str | RunHandle[Any] | None) -> tuple[int, str] | None:
    """The place in the list that `before` means; text is `microseconds/run id` or a run id."""
    from pyworkflow_ray.reading import place_in_list

    if before is None:
        return None
    return place_in_list(storage, before.run_id if isinstance(before, RunHandle) else before)


def as_completed(handles: Iterable[RunHandle[R]], timeout: Duration | None = None) -> Iterator[RunHandle[R]]:
    """The handles as their runs end, each once; as in `concurrent.futures`.

    Raises:
        TimeoutError: not all have ended in time.
    """
    waiting = list(dict.fromkeys(handles))
    seconds = None if timeout is None else parse_duration(timeout)
    deadline = None if seconds is None else time.monotonic() + seconds
    client = client_of(waiting[0]._storage) if waiting else None
    if client is None:
        yield from _as_completed_by_polling(waiting, deadline)
        return
    ended: queue.SimpleQueue[RunHandle[R]] = queue.SimpleQueue()
    futures: list[tuple[RunHandle[R], Future[None]]] = []
    try:
        for handle in waiting:
            future = client.follower.ended(handle.run_id)
            futures.append((handle, future))
            if client.follower.certain(handle.run_id) or not handle.done():
                future.add_done_callback(lambda _, handle=handle: ended.put(handle))  # type: ignore[misc]
            else:
                ended.put(handle)
        for left in range(len(waiting), 0, -1):
            try:
                yield ended.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"{left} of {len(waiting)} runs have not ended in time; they go on") from None
    finally:
        for handle, future in futures:
            client.follower.forget(handle.run_id, future)


def _as_completed_by_polling(waiting: list[RunHandle[R]], deadline: float | None) -> Iterator[RunHandle[R]]:
    total = len(waiting)
    while waiting:
        ended = [handle for handle in waiting if handle.done()]
        waiting = [handle for handle in waiting if handle not in ended]
        yield from ended
        if waiting and deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError(f"{len(waiting)} of {total} runs have not ended in time; they go on")
        if waiting and not ended:
            time.sleep(POLL_S)


# Changing ---------------------------------------------------------------------------------------------------------


def resume(run_id: str) -> RunHandle[Any]:
    """A paused run goes on, a failed one from its failed step with fresh attempts; any other is left alone.

    Returns once that is durable: `status` and `result` then speak of the resumed run, in every process. Where all run
    actors are busy it returns after 30 s, and the run is resumed when its turn comes.

    Raises:
        RunNotFoundError: no such run. RunError: it can't be resumed; the message says why.
    """
    handle = get_run(run_id)
    before = len(handle.events())
    if need_client(handle._storage).call("resume", run_id) == "asked":
        give_up_at = time.monotonic() + _RESUMED_S
        while len(handle.events()) == before and time.monotonic() < give_up_at:
            time.sleep(_RESUMED_LOOK_S)
    return handle


def rerun(run_id: str) -> RunHandle[Any]:
    """Start a new run of the same workflow with the same arguments and attributes, whatever became of the old one.

    It has an id and idempotency keys of its own, executes every step anew, and names the old run (`rerun_of`). Code
    that can be imported is what it is now; code that travelled by value is what it was. Each call makes another run.

    Raises:
        RunNotFoundError: no such run. StorageError: it can't be read, or the new one could not be made durable.
    """
    from pyworkflow_ray.execution.submission import make_rerun

    handle = get_run(run_id)
    _refuse_inside_workflow("pw.rerun")
    client = need_client(handle._storage)
    (answer,) = client.submit([make_rerun(created_of(handle._history()), client.codec)])
    if answer.error is not None:
        raise answer.error
    return RunHandle(answer.run_id, client.storage)


def wake(run_id: str) -> RunHandle[Any]:
    """Retries that the run waits for happen now; its own sleeps stay as they are."""
    handle = get_run(run_id)
    need_client(handle._storage).call("wake", run_id)
    return handle


def pause(run_id: str) -> RunHandle[Any]:
    """Pause a run for a person: it begins nothing more, and pauses once the steps that run now have ended.

    `resume` has it go on. A run that is parked pauses at once; one that has ended or is paused is left alone.

    Raises:
        RunNotFoundError: no such run. RunError: another Ray, which lives, owns it.
    """
    handle = get_run(run_id)
    need_client(handle._storage).call("pause", run_id)
    return handle


def recover(steal: bool = False) -> list[RunHandle[Any]]:
    """Take up the unfinished runs that no living owner holds; returns their handles and does not wait for them.

    Args:
        steal: Take runs from other owners too, though they may live (a cluster that nobody can reach, a notebook that
            hangs). They are refused at their next event, stop, and never take back. A step that such an owner executes
            goes on beside its re-execution: see `current_step().fence`.
    """
    client = need_client(None)
    return RunList(RunHandle(run_id, client.storage) for run_id in client.call("recover", steal))


def sql(query: str) -> duckdb.DuckDBPyRelation:
    """Ask the views `runs`, `events`, `steps` and `attempts`, over live journals and checkpoints together."""
    from pyworkflow_ray.storage.sql import query as query_storage

    return query_storage(open_storage(), query)


def instant(since: dt.datetime | Duration | None) -> float | None:
    """UNIX time of an aware datetime, or of a span before now."""
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
