"""An object store's calls, as the slots need them: one seam for faults and for the model check.

Called by `commit`, `journal`, `leases`, `storage`, `probe`; calls obstore, each call in a thread of a small pool.
Faults that may strike at every call: no answer, an answer of failure after the store did what it was asked to, a
request that comes late, an answer ("conflict", "exists") that is wrong. So a `BucketError` of a call that writes proves
nothing; what lies in the store does.

obstore's own retries are off: its repetition of a write that had landed reads as somebody else's, and a caller who
knows the nonces can do better. Its asynchronous calls are not used: a process that ends soon after one may abort (the
runtime's threads hand back Python objects while the interpreter goes; seen with obstore 0.12).
"""

from __future__ import annotations

import asyncio
import functools
import os
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from pyworkflow_ray.errors import ConfigurationError, StorageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")

SCHEMES: Final = ("s3", "gs", "az")
_THREADS: Final = 64  # calls in flight of one process; each is a thread that waits
_TIMEOUT: Final = "10s"
_CONNECT_TIMEOUT: Final = "5s"
_READ_TRIES: Final = 6
_FIRST_PAUSE_S: Final = 0.05


class BucketError(Exception):
    """A call failed, or its answer was lost. `hopeless`: trying again will not help (permissions, configuration)."""

    def __init__(self, message: str, *, hopeless: bool = False) -> None:
        super().__init__(message)
        self.hopeless = hopeless


class ConditionFailed(BucketError):
    """The store says that the object exists (`create`) or has changed (`replace`). It may be our own doing."""


@dataclass(slots=True, frozen=True)
class Entry:
    """An object in a listing. modified_at: by the store's clock, often in whole seconds."""

    key: str
    modified_at: float
    e_tag: str
    size: int = 0


@dataclass(slots=True, frozen=True)
class Found:
    """An object as it was read. modified_at: by the store's clock."""

    data: bytes
    e_tag: str
    modified_at: float = 0.0


class Bucket(Protocol):
    """See the module. Keys are relative to the storage's prefix."""

    @property
    def url(self) -> str: ...

    def token(self) -> str:
        """A name nobody else uses, 32 characters."""

    async def create(self, key: str, data: bytes) -> None:
        """Make an object that must not exist. Any `BucketError` proves nothing."""

    async def replace(self, key: str, data: bytes, e_tag: str) -> str:
        """Replace an object that must still be what `e_tag` says. Its new e-tag."""

    async def put(self, key: str, data: bytes) -> None: ...

    async def get(self, key: str) -> Found | None:
        """None where there is no such object."""

    async def get_many(self, keys: Sequence[str]) -> list[Found | None]: ...

    async def get_part(self, key: str, start: int, length: int) -> bytes | None:
        """`length` bytes of an object from `start` on; None where there is no such object."""

    async def listing(self, prefix: str) -> list[Entry]:
        """All objects below `prefix` (which ends with a slash)."""

    async def names(self, prefix: str) -> list[str]:
        """Names in `prefix`, of objects and of "directories"."""

    async def list_prefixes(self, prefix: str) -> list[str]:
        """Names of the "directories" in `prefix`."""

    async def peek(self, prefix: str) -> list[str]:
        """Keys of some objects below `prefix`, none only where there are none."""

    async def modified_at(self, key: str) -> float | None:
        """When the object was last written, by the store's clock; None where there is no such object."""

    async def delete(self, key: str) -> None:
        """No error where it is gone."""

    async def delete_many(self, keys: Sequence[str]) -> None:
        """No error where some are gone; in any order."""

    async def pause(self, seconds: float) -> None: ...


class ObstoreBucket:
    """A bucket, or the part of one below a prefix, through obstore. Calls are made on the loop of `loop.Loop`."""

    def __init__(self, url: str, store: ObjectStore) -> None:
        self.url = url
        self._store = store
        self._pool: ThreadPoolExecutor | None = None

    @classmethod
    def open(cls, url: str) -> ObstoreBucket:
        """The bucket that `url` names, with the credentials that obstore finds in the environment.

        Raises:
            ConfigurationError: obstore is missing, or the URL or an environment variable can't be used.
        """
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError:
            raise ConfigurationError(f"storage={url!r} needs obstore: pip install obstore") from None
        try:
            store = from_url(
                url,
                client_options={
                    "timeout": _TIMEOUT,
                    "connect_timeout": _CONNECT_TIMEOUT,
                    "allow_http": _endpoint_is_http(),
                    "pool_max_idle_per_host": str(_THREADS),
                },
                retry_config={"max_retries": 0},
            )
        except (BaseError, ValueError) as error:
            raise ConfigurationError(f"storage={url!r} can't be used: {_first_line(error)}") from None
        return cls(url, store)

    def token(self) -> str:
        return uuid.uuid4().hex

    async def create(self, key: str, data: bytes) -> None:
        import obstore

        await self._call(obstore.put, key, data, mode="create", use_multipart=False)

    async def replace(self, key: str, data: bytes, e_tag: str) -> str:
        import obstore

        result = await self._call(obstore.put, key, data, mode={"e_tag": e_tag}, use_multipart=False)
        return str(result["e_tag"] or "")

    async def put(self, key: str, data: bytes) -> None:
        import obstore

        await self._again(lambda: self._call(obstore.put, key, data))

    async def get(self, key: str) -> Found | None:
        return await self._again(lambda: self._call(_get, key))

    async def get_many(self, keys: Sequence[str]) -> list[Found | None]:
        return list(await gather_all(self.get(key) for key in keys))

    async def get_part(self, key: str, start: int, length: int) -> bytes | None:
        return await self._again(lambda: self._call(_get_part, key, start, length))

    async def listing(self, prefix: str) -> list[Entry]:
        return await self._again(lambda: self._call(_list, prefix))

    async def names(self, prefix: str) -> list[str]:
        return await self._again(lambda: self._call(_names, prefix))

    async def list_prefixes(self, prefix: str) -> list[str]:
        return await self._again(lambda: self._call(_list_prefixes, prefix))

    async def peek(self, prefix: str) -> list[str]:
        return await self._again(lambda: self._call(_peek, prefix))

    async def modified_at(self, key: str) -> float | None:
        return await self._again(lambda: self._call(_modified_at, key))

    async def delete(self, key: str) -> None:
        await self._again(lambda: self._call(_delete, key))

    async def delete_many(self, keys: Sequence[str]) -> None:
        if keys:
            await self._again(lambda: self._call(_delete, list(keys)))

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="object-store")
        work = functools.partial(_translated, function, self._store, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _again(self, make: Callable[[], Awaitable[T]]) -> T:
        """A call that may be made again without harm, until it is answered."""
        for tried in range(1, _READ_TRIES + 1):
            try:
                return await make()
            except BucketError as error:
                if error.hopeless or tried == _READ_TRIES:
                    raise
            await asyncio.sleep(_FIRST_PAUSE_S * 2**tried)
        raise AssertionError("unreachable")


async def gather_all(work: Iterable[Any]) -> Any:
    return await asyncio.gather(*work)


def _translated(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    from obstore import exceptions

    try:
        return function(*args, **kwargs)
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
        raise ConditionFailed(_first_line(error)) from None
    except (
        exceptions.PermissionDeniedError,
        exceptions.UnauthenticatedError,
        exceptions.NotSupportedError,
        exceptions.InvalidPathError,
        exceptions.UnknownConfigurationKeyError,
    ) as error:
        raise BucketError(_first_line(error), hopeless=True) from None
    except FileNotFoundError as error:  # of a write: there is no such bucket
        raise BucketError(_first_line(error), hopeless=True) from None
    except (exceptions.BaseError, OSError, ValueError) as error:
        raise BucketError(_first_line(error)) from None


def _get(store: ObjectStore, key: str) -> Found | None:
    import obstore

    try:
        result = obstore.get(store, key)
        meta = result.meta
        return Found(bytes(result.bytes()), str(meta["e_tag"] or ""), meta["last_modified"].timestamp())
    except FileNotFoundError:
        return None


def _get_part(store: ObjectStore, key: str, start: int, length: int) -> bytes | None:
    import obstore

    try:
        return bytes(obstore.get_range(store, key, start=start, length=length))
    except FileNotFoundError:
        return None


def _list(store: ObjectStore, prefix: str) -> list[Entry]:
    import obstore

    found = obstore.list(store, prefix, chunk_size=1000).collect()
    return [
        Entry(meta["path"], meta["last_modified"].timestamp(), str(meta["e_tag"] or ""), meta["size"]) for meta in found
    ]


def _names(store: ObjectStore, prefix: str) -> list[str]:
    import obstore

    result = obstore.list_with_delimiter(store, prefix)
    paths = [*result["common_prefixes"], *(meta["path"] for meta in result["objects"])]
    return [path.rstrip("/").rpartition("/")[2] for path in paths]


def _list_prefixes(store: ObjectStore, prefix: str) -> list[str]:
    import obstore

    result = obstore.list_with_delimiter(store, prefix)
    return [path.rstrip("/").rpartition("/")[2] for path in result["common_prefixes"]]


def _peek(store: ObjectStore, prefix: str) -> list[str]:
    import obstore

    return [meta["path"] for meta in next(iter(obstore.list(store, prefix or None, chunk_size=1000)), ())]


def _modified_at(store: ObjectStore, key: str) -> float | None:
    import obstore

    try:
        return obstore.head(store, key)["last_modified"].timestamp()
    except FileNotFoundError:
        return None


def _delete(store: ObjectStore, keys: str | list[str]) -> None:
    import obstore

    try:
        obstore.delete(store, keys)
    except FileNotFoundError:  # of many, those that come after it are not deleted
        for key in keys if isinstance(keys, list) else ():
            _delete(store, key)


def _first_line(error: Exception) -> str:
    """obstore's messages go on with a page of its own debugging output."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _endpoint_is_http() -> bool:
    """Whether the environment names an endpoint without TLS: a server of one's own, and a decision of its owner."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
    given = [os.environ.get(name, "") for name in (*names, *(name.lower() for name in names))]
    flags = [os.environ.get(name, "") for name in ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP")]
    return any(value.startswith("http://") for value in given) or "true" in [flag.lower() for flag in flags]


def bucket_failed(what: str, where: str, error: Exception, remedy: str = "") -> StorageError:
    """`error` as ours: what was done, where, why, and the way out."""
    text = f"{what} {where} failed: {error}"
    return StorageError(f"{text}. {remedy}" if remedy else text, path=where)
