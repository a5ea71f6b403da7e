"""The current span: the caller's, which a run continues, and the attempt's, which a step's own spans hang from.

Called where a run is started (`caller`), and by worker processes round each attempt (`entering`, `leaving`) and once
(`record_spans`). OpenTelemetry is used where it is loaded already or traces are asked for; otherwise each call costs a
look into a dict.

Spans that users make inside steps are written to the storage's spool when the uppermost of them ends, with all below
it, so before the step's outcome is told; the observer process sends them with the run's own. A worker that is killed
takes with it what had not ended, and leaves no orphans. Fault: the spool can't be written; logged once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import uuid
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

from pyworkflow_ray.engine.chunks import parse_position
from pyworkflow_ray.observability.spandata import attempt_span_id, step_span_id

log = logging.getLogger("pyworkflow_ray.trace")

SPOOL = "observer/spans"
_HELD = 10_000  # spans below one uppermost span; beyond it they are written before it ends
_MOST_BYTES = 256 * 2**20  # of one process, when nobody has sent them for long
_PLACE = "pyworkflow_ray-step"


class Scope(Protocol):
    """What is used of `execution.context.KeyScope`."""

    @property
    def run_uid(self) -> str: ...

    @property
    def inline(self) -> int: ...


class Step(Protocol):
    """What is used of `execution.context.StepContext`."""

    run_id: str | None
    trace_id: str
    traceparent: str
    position: str | None
    fence: tuple[int, ...]
    _scope: Any


def caller() -> str:
    """W3C traceparent of the span that is current here; empty: there is none."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return ""
    context = api.get_current_span().get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags) & 0xFF:02x}"


def span_of(step: Step) -> str:
    """Span id of the attempt; of an item of a map that of the map, for items have none of their own."""
    uid, position = step._scope.run_uid, step.position or ""
    chunk = parse_position(position)
    if chunk is not None:
        return step_span_id(uid, chunk[0])
    epoch, dispatch, attempt = step.fence[:3]
    return attempt_span_id(uid, position, epoch, dispatch, attempt)


def entering(step: Step) -> Any:
    """Make the attempt's span the current one. Returns what `leaving` takes."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None or not step.run_id or not step.trace_id or step._scope.inline:
        return None  # an inline call belongs to its caller's attempt
    context = sys.modules["opentelemetry.context"]
    sampled = is_sampled(step.trace_id, step.traceparent)
    own = api.SpanContext(
        int(step.trace_id, 16), int(span_of(step), 16), is_remote=True, trace_flags=api.TraceFlags(int(sampled))
    )
    inside = api.set_span_in_context(api.NonRecordingSpan(own))
    return context.attach(context.set_value(_PLACE, step, inside))


def leaving(token: Any) -> None:
    if token is not None:
        sys.modules["opentelemetry.context"].detach(token)


def is_sampled(trace_id: str, traceparent: str) -> bool:
    """Whether the run's trace is recorded: as its caller's is, else as `OTEL_TRACES_SAMPLER` says."""
    name = os.environ.get("OTEL_TRACES_SAMPLER", "").strip().lower() or "parentbased_always_on"
    if name.startswith("parentbased_"):
        if traceparent:
            return bool(int(traceparent.rpartition("-")[2], 16) & 1)
        name = name.removeprefix("parentbased_")
    if name == "always_off":
        return False
    if name == "traceidratio":
        try:
            ratio = float(os.environ.get("OTEL_TRACES_SAMPLER_ARG", "") or 1.0)
        except ValueError:
            ratio = 1.0  # as the SDK does
        return int(trace_id, 16) & (2**64 - 1) < round(ratio * 2**64)  # as the SDK's TraceIdRatioBased
    return True


# Users' spans -----------------------------------------------------------------------------------------------------


class Spool:
    """A file of this process in the storage, a line a group of spans: checksum, then JSON. `_lock` guards the file."""

    def __init__(self, root: str) -> None:
        self._directory = os.path.join(root, SPOOL)
        self._lock = threading.Lock()
        self._pid = 0
        self._file = -1
        self._written = 0
        self._broken = False

    def write(self, group: Mapping[str, Any]) -> None:
        line = spool_line(group)
        with self._lock:
            try:
                if self._pid != os.getpid():  # the first, or in a forked child
                    self._open()
                self._written += len(line)
                if self._written <= _MOST_BYTES:
                    os.write(self._file, line)
                elif not self._broken:
                    self._broken = True
                    log.warning("spans of steps are dropped: nobody has sent %d MiB of them", _MOST_BYTES // 2**20)
            except OSError as error:
                if not self._broken:
                    self._broken = True
                    log.warning("spans of steps can't be written to %s and are dropped: %s", self._directory, error)

    def _open(self) -> None:
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        self._pid = os.getpid()
        name = f"{socket.gethostname()}-{self._pid}-{uuid.uuid4().hex[:8]}.spool"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(os.path.join(self._directory, name), flags, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)  # told by it: the process lives and may write more


def spool_line(group: Mapping[str, Any]) -> bytes:
    body = json.dumps(group, separators=(",", ":"), default=str).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def read_spool(path: str, offset: int) -> tuple[list[dict[str, Any]], int, bool]:
    """Groups from `offset` on, the offset behind them, and whether the writer has ended."""
    with open(path, "rb") as file:
        ended = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            ended = False
        file.seek(offset)
        data = file.read()
    whole = data.rfind(b"\n") + 1  # behind it: a line that is being written, or was when its writer was killed
    groups = []
    for line in data[:whole].splitlines():
        body = line[9:]
        if b"%08x" % zlib.crc32(body) != line[:8]:
            log.error("%s: a damaged group of spans is left out", path)
            continue
        groups.append(json.loads(body))
    return groups, offset + whole, ended


def record_spans(root: str) -> None:
    """Let spans that users make inside steps be recorded, where the process has no tracer provider of its own.

    Called once a worker process, after the step's code was loaded: a provider that the user's module sets is left
    alone, and then sending spans is its business.
    """
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor(Spool(root)))
    with contextlib.suppress(Exception):
        trace.set_tracer_provider(provider)


def processor(spool: Spool) -> Any:
    """A span processor that writes to `spool`; made here, for its base class is loaded where traces are asked for."""
    from opentelemetry.context import get_value
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

    from pyworkflow_ray.observability.spans import span_data

    class Groups(SpanProcessor):
        """Spans below one uppermost span of a step are written together when that has ended."""

        def __init__(self) -> None:
            self._lock = threading.Lock()
            self._top: dict[int, int] = {}  # of spans that have not ended, the uppermost above each
            self._ended: dict[int, list[ReadableSpan]] = {}
            self._place: dict[int, list[Any]] = {}

        def on_start(self, span: Any, parent_context: Any = None) -> None:
            step: Any = get_value(_PLACE, parent_context)
            own = span.context.span_id
            with self._lock:
                above = 0 if span.parent is None or span.parent.is_remote else span.parent.span_id
                top = self._top[own] = self._top.get(above, own)
                self._ended.setdefault(top, [])
                if step is not None and top == own:
                    self._place[own] = [step.run_id, step.position, *step.fence[:3]]
            if step is not None:
                span.set_attributes(
                    {
                        "pyworkflow.run_id": step.run_id,
                        "pyworkflow.position": step.position,
                        "pyworkflow.attempt": step.fence[2],
                    }
                )

        def on_end(self, span: ReadableSpan) -> None:
            context = span.get_span_context()
            assert context is not None
            own = context.span_id
            with self._lock:
                top = self._top.pop(own, own)
                group = self._ended.setdefault(top, [])
                group.append(span)
                place = self._place.get(top)
                if own != top and top in self._top and len(group) < _HELD:
                    return
                self._ended[top] = []
                if own == top or top not in self._top:
                    del self._ended[top]
                    self._place.pop(top, None)
            spool.write({"place": place, "spans": [span_data(one).as_dict() for one in group]})

        def shutdown(self) -> None:
            return

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return True

    return Groups()
