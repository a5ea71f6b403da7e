"""What a worker process of ours holds once: its storage, its codec, who it is, and the breakers it knows.

Called by run actors and step hosts. Faults: the storage's directory is not here (another node without the shared disk);
the error names it.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from typing import Any

from pyworkflow_ray.engine.calls import StepCall
from pyworkflow_ray.engine.events import CodeRef, ErrorInfo, Kind
from pyworkflow_ray.engine.logs import filter_replayed_lines
from pyworkflow_ray.errors import ConfigurationError, StorageError
from pyworkflow_ray.execution.code import load_step, load_workflow
from pyworkflow_ray.execution.definitions import StepDefinition, WorkflowDefinition
from pyworkflow_ray.execution.log_records import enrich
from pyworkflow_ray.observability.log_format import LogFormat, make_formatter
from pyworkflow_ray.runtime import budget_actor  # noqa: F401  brings the cluster's retry budgets into this process
from pyworkflow_ray.runtime.breaker_actor import guard_for, keep_in
from pyworkflow_ray.runtime.messages import RuntimeConfig
from pyworkflow_ray.runtime.shared_objects import SharedObjects
from pyworkflow_ray.runtime.telemetry import enter_telemetry
from pyworkflow_ray.storage.codec import StorageCodec
from pyworkflow_ray.storage.codec_mark import check_mark, load_hook
from pyworkflow_ray.storage.port import StoragePort, open_storage


class BlindNodeError(StorageError):
    """This node has come since the storage was checked (`nodes`), and does not reach it. node: its whole id."""

    def __init__(self, message: str, *, node: str = "") -> None:
        super().__init__(message)
        self.node = node


class Process:
    """Storage, codec and names of this process, for one runtime configuration."""

    def __init__(self, config: RuntimeConfig) -> None:
        self.config = config
        try:
            self.storage = open_storage(config.storage, create=False)
        except (ConfigurationError, StorageError) as error:
            raise BlindNodeError(f"node {node_name()} does not see the storage: {error}", node=node_id()) from error
        self.shared = SharedObjects()
        self._codec: StorageCodec | None = None
        keep_in(self.storage.root)
        self.worker = f"{os.getpid()}"
        self.node = node_name()

    @property
    def codec(self) -> StorageCodec:
        """The codec of this process.

        Raises:
            ConfigurationError: there is none here as the runs of the storage need it.
        """
        if self._codec is None:
            self._codec = make_codec(self.storage, self.config, self.shared)
        return self._codec

    def load_workflow(self, code: CodeRef) -> WorkflowDefinition:
        """The workflow of this code; raises ConfigurationError where it can't be had here."""
        codec = self.codec.for_code()
        return load_workflow(code, codec.get_code, allow_pickle=codec.allow_pickle)

    def load_step(self, code: CodeRef) -> StepDefinition:
        """The step of this code; raises ConfigurationError where it can't be had here."""
        codec = self.codec.for_code()
        return load_step(code, codec.get_code, codec.decode, allow_pickle=codec.allow_pickle)

    def failure(self, error: BaseException, kind: Kind) -> ErrorInfo:
        """An error of ours as a record, without a codec too: it holds nothing of the user's."""
        try:
            return self.codec.encode_error(error, kind)
        except Exception:
            return StorageCodec(self.storage).encode_error(error, kind)

    def guard(self, call: StepCall) -> Any:
        """The breaker of this call, as this process sees it; None where it has none."""
        return guard_for(call)


def make_codec(storage: StoragePort, config: RuntimeConfig, shared: SharedObjects | None = None) -> StorageCodec:
    """The codec that this configuration asks for.

    Raises:
        ConfigurationError: its hook can't be had here, or is not the one that the storage was written through.
    """
    hook = load_hook(config.codec)
    check_mark(storage, hook)
    return StorageCodec(
        storage,
        hook=hook,
        redact=config.redact,
        allow_pickle=config.allow_pickle,
        max_payload_bytes=config.max_payload_bytes,
        sharing=shared,
    )


_lock = threading.Lock()
_processes: dict[RuntimeConfig, Process] = {}


def enter_process(config: RuntimeConfig) -> Process:
    """The process state of `config`, made at its first use here."""
    with _lock:
        found = _processes.get(config)
        if found is None:
            enter_telemetry(config)
            set_log_level(config.log_level, config.log_format)
            if in_worker():
                filter_replayed_lines(enrich)
            found = _processes[config] = Process(config)
        return found


def set_log_level(level: str, log_format: LogFormat = "text") -> None:
    """Our loggers' level; in an actor or worker of ours also a handler for all loggers, where there is none: its lines
    tell run and step, and the driver lets ours through."""
    logger = logging.getLogger("pyworkflow_ray")
    logger.setLevel(level)
    if in_worker() and not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(make_formatter(log_format))
        handler.addFilter(_is_no_exit)
        logging.getLogger().addHandler(handler)


def _is_no_exit(record: logging.LogRecord) -> bool:
    """Ray ends a step's worker, once its run actor is dead, by SystemExit in the step: nothing that a user did."""
    return not (record.name == "pyworkflow_ray.step" and "SystemExit" in record.getMessage())


def in_worker() -> bool:
    """Whether this is a process that Ray started."""
    import ray

    # asked for its context, a Ray that is not initialised would start a cluster
    return bool(ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE)


def node_id() -> str:
    """The node's id, whole; "" outside of Ray."""
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


def node_name() -> str:
    """The node, as Ray calls it; the host's name outside of Ray."""
    import ray

    return str(ray.get_runtime_context().get_node_id())[:12] if ray.is_initialized() else socket.gethostname()
