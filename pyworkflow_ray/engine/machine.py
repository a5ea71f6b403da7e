"""One body on its loop: replays a script of inputs and commands, then takes new inputs one by one.

Pure. Called by `driver`. Rules:

* Inputs are delivered in recorded order, and the loop is spun until quiet after each.
* While replaying, every command must be the recorded one, in recorded order. The first that is not raises
  `NonDeterminismError` here, never inside the body: what the body did meanwhile has had no effect.
* Only at the end of the script may the body give commands that are not recorded: they are new (a commit is not atomic,
  its tail may be lost).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from pyworkflow_ray.engine.calls import Codec
from pyworkflow_ray.engine.chunks import digest_of
from pyworkflow_ray.engine.events import (
    COMMANDS,
    BodyAbandoned,
    ChunkCompleted,
    Event,
    MapScheduled,
    Payload,
    RunCancelled,
    RunCancelRequested,
    RunCompleted,
    RunCreated,
    RunFailed,
    StepCancelled,
    StepCompleted,
    StepFailed,
    StepScheduled,
    TimerFired,
    TimerStarted,
)
from pyworkflow_ray.engine.logs import filter_replayed_lines
from pyworkflow_ray.engine.loop import WorkflowLoop
from pyworkflow_ray.engine.saga import Saga
from pyworkflow_ray.errors import UNREADABLE, NonDeterminismError, RunCancelledError, StepTimeoutError
from pyworkflow_ray.resilience.policy import RetryPolicy
from pyworkflow_ray.resilience.taxonomy import Kind, classify

Flow = Callable[..., Coroutine[Any, Any, Any]]


class RunData:
    """What `current_run()` shows in the body: `.run_id .workflow .version .attributes .created_at`."""

    __slots__ = ("attributes", "created_at", "run_id", "trace_id", "version", "workflow")

    def __init__(self, created: RunCreated) -> None:
        self.run_id = created.run_id
        self.workflow = created.workflow
        self.version = created.version
        self.attributes = dict(created.attributes)
        self.created_at = created.at
        self.trace_id = created.trace_id


class Machine:
    """See the module. Commands come out as the events that record them, not yet numbered."""

    def __init__(self, flow: Flow, created: RunCreated, codec: Codec) -> None:
        filter_replayed_lines()
        self._flow = flow
        self._created = created
        self._codec = codec = codec.at(created.run_id)
        self._emitted: list[Event] = []
        self.loop = WorkflowLoop(  # type: ignore[abstract]  # its refusals of I/O are set on the class
            created.run_uid, codec, self._emitted.append
        )
        self.loop.run_id = created.run_id
        self.loop.run_data = RunData(created)
        self.saga = self.loop.saga = Saga(self.loop, created.run_id, lambda: self._cancel is not None)
        self._root: asyncio.Task[Any] | None = None
        self._cancel: RunCancelRequested | None = None
        self.policies: dict[str, RetryPolicy] = {}  # of replayed steps for which the code now gives another one
        self._blame: list[tuple[BaseException, str]] = []  # exceptions of steps and maps, with their position
        self.loop.blame = lambda error, position: self._blame.append((error, position))
        self.ended = False

    def replay(self, script: list[Event], started_at: float) -> list[Event]:
        """Start the body at `started_at`, follow the script, and give the commands that come after it.

        Raises:
            NonDeterminismError: the body gave another command than the recorded one.
        """
        loop = self.loop
        loop.replaying = bool(script)
        loop.now_s = started_at
        args = [self._codec.decode(payload) for payload in self._created.args]
        kwargs = {name: self._codec.decode(payload) for name, payload in self._created.kwargs.items()}
        self._root = loop.create_task(self.saga.guard(self._flow(*args, **kwargs)))
        self._spin()
        given = 0
        for event in script:
            if isinstance(event, COMMANDS):
                if given >= len(self._emitted):
                    raise self._mismatch(event, None)
                attempted = self._emitted[given]
                _compare(event, attempted, self._mismatch)
                if isinstance(attempted, StepScheduled) and attempted.policy != getattr(event, "policy", None):
                    self.policies[attempted.position] = attempted.policy
                given += 1
            else:
                if given < len(self._emitted):
                    raise self._mismatch(event, self._emitted[given])
                del self._emitted[:]
                given = 0
                self._take(event)
        fresh = self._emitted[given:]
        del self._emitted[:]
        loop.replaying = False
        return fresh

    def deliver(self, event: Event) -> list[Event]:
        """Deliver a new input; give the commands that follow from it."""
        self._take(event)
        fresh = self._emitted[:]
        del self._emitted[:]
        return fresh

    def evict(self) -> None:
        """Drop the body. From now on it has no effect."""
        self.loop.evict()
        self._root = None
        self._blame.clear()

    def waits_for_nothing(self) -> bool:
        """Whether no step and no timer can ever wake the body."""
        return not self.ended and not self.loop.steps and not self.loop.timers and not self.loop.maps

    def opened_chunks(self) -> list[tuple[str, int, int]]:
        """(map, first, count) of what was opened since the last call and has not ended."""
        return [(position, *run) for position, current in self.loop.maps.items() for run in current.take_opened()]

    def _take(self, event: Event) -> None:
        loop = self.loop
        loop.now_s = max(loop.now_s, event.at)
        match event:
            case StepCompleted() | StepFailed():
                future = loop.steps.pop(event.position, None)
                if future is None:
                    raise self._mismatch(event, None)
                if future.done():
                    pass
                elif isinstance(event, StepCompleted):
                    self._resolve(future, event)
                else:
                    error = self._at(event.position).decode_error(event.error)
                    self._blame.append((error, event.position))
                    future.set_exception(_carriable(error))
            case ChunkCompleted():
                self._take_chunk(event)
            case TimerFired():
                if event.position not in loop.timers:
                    raise self._mismatch(event, None)
                loop.fire(event.position)
            case RunCancelRequested():
                if not self.saga.running:  # compensations are not interrupted: the run ends as it would have
                    self._cancel = event
                    if self._root is not None:
                        self._root.cancel(event.reason)
            case BodyAbandoned():
                self._root = loop.create_task(self.saga.compensate())
            case _:
                raise AssertionError(f"{event.type} is no input")
        self._spin()

    def _take_chunk(self, event: ChunkCompleted) -> None:
        current = self.loop.maps.get(event.position)
        if current is None or not current.holds(event.first, event.count):
            raise self._mismatch(event, None)
        if self.loop.replaying and event.items is not None:
            drawn = digest_of(self._at(event.position), current.items(event.first, event.count))
            if drawn is not None and drawn != event.items:
                raise self._mismatch(event, None, "other items")
        current.completed(event)

    def _at(self, position: str) -> Codec:
        return self._codec.at(self._created.run_id, position)

    def _resolve(self, future: asyncio.Future[Any], event: StepCompleted) -> None:
        try:
            value = self._at(event.position).decode(event.result)
        except UNREADABLE:
            raise
        except Exception as error:  # the value can't be restored here: the body learns it at this await
            future.set_exception(error)
        else:
            future.set_result(value)

    def _spin(self) -> None:
        self.loop.spin()
        if self._root is not None and self._root.done() and not self.ended:
            self.ended = True
            self.loop.cancel_steps()
            self._emitted.append(self._ending(self._root))

    def _ending(self, root: asyncio.Task[Any]) -> Event:
        error: BaseException | None = None
        if root.cancelled():
            error = asyncio.CancelledError()
        else:
            error = root.exception()
        cancel = self._cancel
        if cancel is not None and cancel.cause == "max_duration":
            late = StepTimeoutError(cancel.reason or "the run reached its max_duration")
            self.saga.note(late)
            return RunFailed(at=self.loop.now_s, error=self._codec.encode_error(late, "timeout"))
        if cancel is not None:
            beside = error if error is not None and not isinstance(error, asyncio.CancelledError) else None
            if beside is None and self.saga.failures:
                beside = ExceptionGroup("compensations failed", [error for _, error in self.saga.failures])
            info = None if beside is None else self._codec.encode_error(beside, self._kind(beside))
            return RunCancelled(at=self.loop.now_s, reason=cancel.reason, error=info)
        if isinstance(error, asyncio.CancelledError):
            return RunCancelled(at=self.loop.now_s, reason="the workflow cancelled itself")
        if error is None:
            try:
                return RunCompleted(at=self.loop.now_s, result=self._codec.encode(root.result()))
            except Exception as failure:  # the result can't be stored: the run fails with the reason
                error = failure
        position = next((p for e, p in reversed(self._blame) if e is error), None)
        info = self._codec.encode_error(error, self._kind(error))
        return RunFailed(at=self.loop.now_s, error=info, position=position)

    def _kind(self, error: BaseException) -> Kind:
        return classify(error, self._created.kinds or None)

    def _mismatch(self, recorded: Event, attempted: Event | None, did: str = "nothing") -> NonDeterminismError:
        position = getattr(recorded, "position", None) or getattr(attempted, "position", None) or "the end"
        has, did = _words(recorded), did if attempted is None else _words(attempted)
        version = self._created.version
        code = f"the code of version {version!r}" if version else "the code that the run was started with"
        remedy = f"Restore {code} and resume: pyworkflow-ray runs resume {self._created.run_id}"
        return NonDeterminismError(
            f"run {self._created.run_id!r} is paused at position {position}: its history has {has}, "
            f"the code has {did}. Nothing was executed. {remedy}",
            run_id=self._created.run_id,
            position=position,
            recorded=has,
            attempted=did,
            remedy=remedy,
        )


def _carriable(error: BaseException) -> BaseException:
    """A future can't hold StopIteration: it comes as the RuntimeError that a coroutine would make of it."""
    if isinstance(error, StopIteration):
        wrapped = RuntimeError("a step raised StopIteration")
        wrapped.__cause__ = error
        return wrapped
    return error


def _compare(recorded: Event, attempted: Event, mismatch: Callable[[Event, Event | None], NonDeterminismError]) -> None:
    same = type(recorded) is type(attempted) and getattr(recorded, "position", "") == getattr(attempted, "position", "")
    if same and isinstance(recorded, StepScheduled) and isinstance(attempted, StepScheduled):
        same = (
            recorded.step == attempted.step
            and len(recorded.args) == len(attempted.args)
            and recorded.kwargs.keys() == attempted.kwargs.keys()
            and all(map(_same_value, recorded.args, attempted.args))
            and all(_same_value(value, attempted.kwargs[name]) for name, value in recorded.kwargs.items())
        )
    elif same and isinstance(recorded, MapScheduled) and isinstance(attempted, MapScheduled):
        same = all(getattr(recorded, n) == getattr(attempted, n) for n in ("step", "chunk_size", "concurrency"))
    elif same and isinstance(recorded, TimerStarted) and isinstance(attempted, TimerStarted):
        same = abs(recorded.delay_s - attempted.delay_s) <= 1e-6 * max(1.0, recorded.delay_s)
    if not same:
        raise mismatch(recorded, attempted)


def _same_value(recorded: Payload, attempted: Payload) -> bool:
    """By hash where the encoding is canonical; of pickles (they differ between processes) only the class."""
    if recorded.digest is not None and attempted.digest is not None:
        return recorded.digest == attempted.digest
    return (_kind(recorded), recorded.cls) == (_kind(attempted), attempted.cls)


def _kind(payload: Payload) -> str:
    """ "pickle" for one with its buffers apart, too: where they lie depends on their size and on the version."""
    return "pickle" if payload.enc == "buffers" else payload.enc


def _words(event: Event) -> str:
    match event:
        case StepScheduled():
            given = [*event.args, *event.kwargs.values()]
            shown = ", ".join(p.preview or (str(p.data)[:40] if p.enc == "json" else p.cls or p.enc) for p in given)
            return f"step {event.step!r} ({shown})"
        case StepCompleted() | StepFailed():
            return f"the outcome of a step at {event.position}"
        case MapScheduled():
            return f"a map of step {event.step!r} (chunks of {event.chunk_size}, {event.concurrency} at a time)"
        case ChunkCompleted():
            return f"the outcome of items {event.first} to {event.first + event.count - 1} of a map"
        case StepCancelled():
            return f"the cancellation of the step at {event.position}"
        case TimerStarted():
            return f"a timer of {event.delay_s:g} s"
        case TimerFired():
            return f"a timer that fired at {event.position}"
        case RunCompleted():
            return "the end of the workflow"
        case RunFailed():
            return f"the failure of the workflow ({event.error.type})"
        case RunCancelled() | RunCancelRequested():
            return "a cancellation of the run"
        case BodyAbandoned():
            return "the end of a cancelled workflow's grace"
        case _:
            return event.type.replace("_", " ")


def as_cancelled(reason: str | None, run_id: str) -> RunCancelledError:
    """What `result()` of a cancelled run raises."""
    return RunCancelledError(
        f"run {run_id!r} was cancelled" + (f": {reason}" if reason else ""), run_id=run_id, reason=reason
    )
