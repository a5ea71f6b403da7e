"""This process's connection: which storage, which Ray, with which settings. `init` and `shutdown`.

Called by users, `runs` and `handle`; makes the runtime's client where it is needed. Reading a storage needs no Ray.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from pyworkflow_ray.errors import ConfigurationError, StorageError

if TYPE_CHECKING:
    from pyworkflow_ray.engine.events import Event
    from pyworkflow_ray.runtime.client import Client
    from pyworkflow_ray.storage.port import StoragePort
    from pyworkflow_ray.storage.storage import RunHistory

log = logging.getLogger("pyworkflow_ray")

_DRAIN_S = 10.0

_settings: Any = None
_address: str | None = None


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
        storage: Directory of the runs, or the URL of a bucket (s3://bucket/prefix, also gs and az); None:
            `PYWORKFLOW_STORAGE`, else `~/.pyworkflow-ray`.
        address: As in Ray; None: `RAY_ADDRESS`, a running local cluster, else a new local one.
        settings: log_level, log_format, allow_pickle, codec, redact, max_payload_bytes, pool_min, pool_max,
            max_pending, worker_wait_max, compact_after, compact_above, compact_failed_after, retain, alert_webhook,
            alert_struggling_after.

    Raises:
        ConfigurationError: a setting is wrong, the address is no cluster's, or others are in force: `shutdown()` first.
    """
    global _settings, _address
    from pyworkflow_ray.runtime.client import current
    from pyworkflow_ray.settings import load_settings

    ray_options = settings.pop("ray_options", None)
    loaded = load_settings(storage=storage, **settings)
    running = current()
    if running is not None:
        if running.storage.root != str(loaded.storage) or (_settings is not None and loaded != _settings):
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
        codec=_settings.codec,
        redact=_settings.redact,
        max_payload_bytes=_settings.max_payload_bytes,
        pool_min=_settings.pool_min,
        pool_max=_settings.pool_max,
        max_pending=_settings.max_pending,
        worker_wait_max_s=_settings.worker_wait_max,
        log_level=_settings.log_level,
        log_format=_settings.log_format,
        compact_after_s=_settings.compact_after,
        compact_above_bytes=_settings.compact_above,
        compact_failed_after_s=_settings.compact_failed_after,
        retain=_settings.retain,
        alert_webhook=_settings.alert_webhook and _settings.alert_webhook.get_secret_value(),
        alert_struggling_after=_settings.alert_struggling_after,
        ray_options=ray_options,
    )
    atexit.unregister(shutdown)  # before Ray's own: a thread of ours in a Ray that ends is a crash at exit
    atexit.register(shutdown)
    return client


def _report_unfinished(client: Client) -> None:
    living = client.storage.lease_states(declare=False).living
    left = []
    for run_id in client.storage.unfinished():
        with contextlib.suppress(StorageError):
            if client.storage.owner(run_id).lease in living:
                left.append(run_id)
    if left:
        shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        log.warning("unfinished in %s: %d (%s). pw.recover() takes up those that nobody holds",
                    client.storage.root, len(left), shown)  # fmt: skip


def need_client(storage: StoragePort | None) -> Client:
    client = client_of(storage) if storage is not None else None
    client = client or _connect()
    if storage is not None and client.storage.storage_id != storage.storage_id:
        raise ConfigurationError(
            f"the run lies in {storage.root}, this process is connected to {client.storage.root}: pw.shutdown(), then "
            "pw.init with that storage"
        )
    return client


def client_of(storage: StoragePort) -> Client | None:
    """This process's client, where it is one of this storage; connects nothing."""
    module = sys.modules.get("pyworkflow_ray.runtime.client")
    client = module.current() if module is not None else None
    return client if client is not None and client.storage.storage_id == storage.storage_id else None


def current_client() -> Client | None:
    """This process's client, where it has one; connects nothing."""
    module = sys.modules.get("pyworkflow_ray.runtime.client")
    return module.current() if module is not None else None


def address() -> str | None:
    """The address that `init` was given, else RAY_ADDRESS."""
    return _address or os.environ.get("RAY_ADDRESS") or None


def storage_setting(given: str | os.PathLike[str] | None = None) -> str | os.PathLike[str]:
    """Where the storage is, by argument, `init`, environment or default; opens nothing."""
    settings = _settings if given is None else None
    if settings is None:
        from pyworkflow_ray.settings import load_settings

        settings = load_settings(storage=given)
    return cast("str | os.PathLike[str]", settings.storage)


def open_storage() -> StoragePort:
    """The storage of this process, without Ray."""
    from pyworkflow_ray.storage import port

    module = sys.modules.get("pyworkflow_ray.runtime.client")
    client = module.current() if module is not None else None
    if client is not None:
        return cast("StoragePort", client.storage)
    settings = _settings
    if settings is None:
        from pyworkflow_ray.settings import load_settings

        settings = load_settings()
    return port.open_storage(settings.storage)


def codec_of(storage: StoragePort) -> Any:
    """The codec for what lies in `storage`, by this process's settings, for reading at least.

    Raises:
        ConfigurationError: a codec is set, and the storage was not written through it.
    """
    from pyworkflow_ray.storage.codec import StorageCodec
    from pyworkflow_ray.storage.codec_mark import check_mark, load_hook

    client = client_of(storage)
    if client is not None:
        return client.codec
    settings = _settings
    if settings is None:
        from pyworkflow_ray.settings import load_settings

        settings = load_settings()
    hook = load_hook(settings.codec)
    if hook is not None:
        check_mark(storage, hook)
    return StorageCodec(
        storage,
        hook=hook,
        redact=settings.redact,
        allow_pickle=settings.allow_pickle,
        max_payload_bytes=settings.max_payload_bytes,
    )


def readable_events(storage: StoragePort, history: RunHistory) -> list[Event]:
    """The events of a run for people: decrypted where this process can, without what is redacted.

    Raises:
        CorruptJournalError: an encrypted value was changed. ConfigurationError: as `codec_of`.
    """
    from pyworkflow_ray.storage.codec_mark import is_marked
    from pyworkflow_ray.storage.revealing import revealed

    if not is_marked(storage):
        return history.events
    return revealed(history.run_id, history.events, codec_of(storage))


def _shown(settings: Any) -> str:
    if settings is None:
        return "the defaults"
    return ", ".join(f"{name}={value!r}" for name, value in settings.model_dump().items() if name != "storage")
