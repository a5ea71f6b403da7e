"""What the actors and the client of one storage tell each other, and the names they go by. Data only.

Made and read by every module of this room; carried by Ray.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pyworkflow_ray.engine.events import CodeEnvironment

NAMESPACE = "pyworkflow_ray"
CONTROLLER = "controller"
ANCHOR = "anchor"

Cursor = tuple[str, int]  # of the news of one controller
Change = tuple[str, str, bytes | None]  # run id, what became of it, and of a completed run a small result (a Payload)
Cause = Literal["start", "recovery", "wake", "resume", "cancel"]


def controller_name(storage_id: str) -> str:
    return f"{CONTROLLER}:{storage_id}"


def anchor_name(storage_id: str, environment_key: str) -> str:
    return f"{ANCHOR}:{storage_id}:{environment_key}"


@dataclass(slots=True, frozen=True)
class RuntimeConfig:
    """What every process of one storage must agree on; travels to each actor as it is made.

    storage: path of the storage. pool_min, pool_max: warm and most run actors of one code environment.
    max_pending: most runs that wait for a run actor; a submission that would make more is refused. lease: id of
    the lease of this Ray cluster; empty until the controller has one. compact_*, retain: see `upkeep`.
    telemetry: `OTEL_*` variables of the process that connected first, where they ask for traces or metrics.
    """

    storage: str
    storage_id: str
    allow_pickle: bool = True
    codec: str | None = None  # "module:object" of what every stored value passes through
    redact: tuple[str, ...] = ()
    max_payload_bytes: int | None = None
    pool_min: int = 1
    pool_max: int | None = None
    max_pending: int | None = None
    worker_wait_max_s: float = 1.0
    log_level: str = "INFO"
    log_format: Literal["text", "json"] = "text"
    embedded: bool = True
    compact_after_s: float = 3600.0
    compact_above_bytes: int = 256 * 2**20
    compact_failed_after_s: float | None = None
    retain: tuple[tuple[str, float], ...] = ()
    telemetry: tuple[tuple[str, str], ...] = ()
    alert_webhook: str | None = None
    alert_struggling_after: int = 3


@dataclass(slots=True)
class Assignment:
    """One run handed to a run actor.

    first: the activation that continues epoch 0's file; handed out once, to one run actor. False opens the next epoch.
    charged: whether the activation that was lost before counts against the run's recoveries.
    resets: failed steps that are tried again. cancel: (reason,) to cancel the run at once, None: not.
    wake: parked retries happen now. pause: it pauses for a person. after: begin exactly the epoch after this one; None:
    whichever is next.
    """

    run_id: str
    first: bool = False
    cause: Cause = "start"
    charged: bool = False
    resets: list[str] = field(default_factory=list)
    cancel: tuple[str | None] | None = None
    wake: bool = False
    pause: bool = False
    after: int | None = None


@dataclass(slots=True)
class RunReport:
    """What became of an assignment.

    finished: `status` is completed, failed or cancelled; `result` is the recorded `Payload` of a completed one
    (JSON), where it is small. parked: until `due_at`. paused: `message` says why.
    fenced: another owner has the run. unstarted: given back untouched. damaged: its journal can't be read.
    broken: the storage or our own code failed; to be tried again, `charged` tells whether it counts.
    commits: seconds that commits took, where metrics are asked for.
    """

    run_id: str
    what: Literal["finished", "parked", "paused", "fenced", "unstarted", "damaged", "broken"]
    status: str = ""
    due_at: float | None = None
    epoch: int = -1
    message: str = ""
    charged: bool = False
    result: bytes | None = None
    commits: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Doing:
    """What a run actor has in hand, for a controller that was restarted."""

    key: str
    pid: int
    run_id: str | None
    epoch: int
    queued: list[Assignment] = field(default_factory=list)
    done: list[RunReport] = field(default_factory=list)
    shutting_down: bool = False


@dataclass(slots=True, frozen=True)
class Submitted:
    """Answer for one submitted run. created: it is durable and ours. exists: an equal run was there before; `run_uid`
    is that run's. refused: `error` says why (RunExistsError for another workflow or arguments)."""

    run_id: str
    what: Literal["created", "exists", "refused"]
    run_uid: str = ""
    error: BaseException | None = None


@dataclass(slots=True)
class News:
    """Answer to a watch: transitions since the cursor. reset: they are not all known any more, look for yourself."""

    cursor: Cursor
    changes: list[Change]
    reset: bool = False


@dataclass(slots=True, frozen=True)
class ActorSpec:
    """What a run actor is made from."""

    key: str
    config: RuntimeConfig
    environment: CodeEnvironment
    lease: str
    options: dict[str, Any] = field(default_factory=dict)
