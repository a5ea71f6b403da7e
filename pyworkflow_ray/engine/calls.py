"""What travels between a run's owner and whoever executes its steps: a `StepCall` out, attempts and an `Outcome` back.

Plain data, cheap to pickle. Made by the driver and by `execution`; carried by the runtime, the simulator and tests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pyworkflow_ray.engine.events import (
    AttemptRecord,
    CodeRef,
    ErrorInfo,
    ItemFailure,
    ItemWaiting,
    Kind,
    Payload,
)
from pyworkflow_ray.resilience.policy import RetryPolicy


@dataclass(slots=True, frozen=True)
class PreviousFailure:
    """An earlier failed attempt, as `current_step().previous` shows it."""

    attempt: int
    kind: str
    type: str
    message: str
    delay: float | None


@dataclass(slots=True, frozen=True)
class ChunkCall:
    """The items of a map's chunk.

    items: one payload of them all (`packed`), or one an item, of which an error is that of an item that can't be sent.
    digest: of all items, None where their encoding is not canonical. stop_after: end the chunk once more of its items
    have failed; None: never.
    """

    first: int
    count: int
    items: list[Payload] | list[Payload | ErrorInfo]
    packed: bool
    digest: str | None = None
    stop_after: int | None = None


@dataclass(slots=True)
class ChunkResult:
    """What came of a chunk; the fields are those of `ChunkCompleted`."""

    done: int
    results: Payload | None
    single: bool
    failures: list[ItemFailure]
    errors: list[ErrorInfo]
    retried: dict[str, int]
    items: str | None
    waiting: list[ItemWaiting] = field(default_factory=list)


@dataclass(slots=True)
class StepCall:
    """One dispatch of one step.

    first_attempt: number of the first attempt that this dispatch makes (from 1).
    retries_used: failed attempts of this step that count against `max_retries` (lost ones do not).
    not_before: UNIX time before which no attempt may begin; None: at once.
    began_at: UNIX time at which the step's first attempt began; None: it has not.
    deadline: UNIX time at which the run ends; None: never.
    """

    run_id: str
    run_uid: str
    storage_id: str
    generation: int
    workflow: str
    position: str
    number: int
    epoch: int
    dispatch: int
    step: str
    code: CodeRef
    args: list[Payload]
    kwargs: dict[str, Payload]
    policy: RetryPolicy
    executor: Literal["task", "local"] = "task"
    ray_options: dict[str, Any] = field(default_factory=dict)
    breaker: str | None = None
    breaker_settings: dict[str, Any] | None = None
    breaker_generation: int = 0
    first_attempt: int = 1
    retries_used: int = 0
    previous: list[PreviousFailure] = field(default_factory=list)
    not_before: float | None = None
    began_at: float | None = None
    deadline: float | None = None
    trace_id: str = ""
    chunk: ChunkCall | None = None  # of a map; `position` is then the chunk's
    budget_settings: dict[str, Any] | None = None
    kinds: dict[str, Kind] = field(default_factory=dict)  # of exception types that the run's starter registered
    hooks: dict[str, list[CodeRef]] = field(default_factory=dict)
    traceparent: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """How one dispatch ended.

    completed: `result` holds the value. failed: `error` and `why`. handed_back: the next attempt is due at `retry_at`
    and the worker is free. cancelled: it was told to stop and did.
    attempts: attempt records that the owner has not confirmed yet, in order; they are committed with the outcome.
    """

    position: str
    dispatch: int
    status: Literal["completed", "failed", "handed_back", "cancelled"]
    attempt: int
    attempts: list[AttemptRecord] = field(default_factory=list)
    result: Payload | None = None
    error: ErrorInfo | None = None
    why: str = ""
    started_at: float = 0.0
    ended_at: float = 0.0
    retry_at: float | None = None
    breaker: str | None = None
    breaker_generation: int = 0
    worker: str = ""
    node: str = ""
    chunk: ChunkResult | None = None


class Codec(Protocol):
    """Encodes values for the log and decodes them: exact round trip, or `PayloadError`. Implemented by storage."""

    def encode(self, value: Any, name: str | None = None) -> Payload:
        """name: of the parameter that the value is given to: what has a marked name is not shown to people."""
        ...

    def marks(self, name: str | None) -> bool:
        """Whether the user marked this name as that of something secret."""
        ...

    def pack(self, value: Any) -> Payload:
        """As `encode`, for a value that travels and is not stored: whole, whatever its size."""
        ...

    def decode(self, payload: Payload) -> Any: ...

    def encode_error(self, error: BaseException, kind: Kind) -> ErrorInfo: ...

    def decode_error(self, info: ErrorInfo) -> BaseException:
        """The exception itself, or a `StepFailedError` where it can't be restored."""
        ...

    def readable(self, text: str) -> str:
        """A text of the log with what is encrypted in it revealed."""
        ...

    def hide(self, text: str) -> str:
        """A text as the log holds it: `readable` gives it back."""
        ...

    def at(self, run_id: str, position: str = "") -> Codec:
        """The codec for what lies at this place: of a step or map, or of the run as a whole ("")."""
        ...

    def move(self, payload: Payload, run_id: str, position: str = "") -> Payload:
        """A payload that lies at this codec's place, for another place."""
        ...

    def for_code(self) -> Codec:
        """The codec for code by value, which lies at no place of a run."""
        ...

    @property
    def allow_pickle(self) -> bool: ...

    def put_code(self, data: bytes) -> str:
        """Store a snapshot of code durably; its reference."""
        ...

    def get_code(self, ref: str) -> bytes:
        """The snapshot of code that was stored under `ref`."""
        ...

    def store_code(self, code: CodeRef) -> CodeRef:
        """A reference to code as it is stored. Raises ConfigurationError for code by value where pickles are off."""
        ...


@dataclass(slots=True)
class StepRequest:
    """What the body asks for when it calls a step: values, not yet encoded. Made by the public `Step`."""

    step: str
    code: CodeRef
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    policy: RetryPolicy
    executor: Literal["task", "local"] = "task"
    ray_options: dict[str, Any] = field(default_factory=dict)
    breaker: str | None = None
    names: tuple[str, ...] = ()  # of the parameters that `args` are given to


@dataclass(slots=True)
class MapRequest:
    """What the body asks for when it maps a step; the items come beside it. See `MapScheduled`."""

    step: str
    code: CodeRef
    policy: RetryPolicy
    executor: Literal["task", "local"]
    ray_options: dict[str, Any]
    breaker: str | None
    chunk_size: int
    concurrency: int
    max_failures: int | None = None
    max_ratio: float | None = None


def encode_arguments(codec: Codec, request: StepRequest) -> tuple[list[Payload], dict[str, Payload]]:
    """The arguments of a step call in stored form; raises PayloadError as `encode`."""
    names = request.names
    args = [codec.encode(value, names[n] if n < len(names) else None) for n, value in enumerate(request.args)]
    return args, {name: codec.encode(value, name) for name, value in request.kwargs.items()}
