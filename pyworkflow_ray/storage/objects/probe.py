"""Whether a store keeps the promises that the slots need, and the storage's own object. Called by `storage`.

The fence stands or falls with conditional writes: a store that takes `If-None-Match: *` or an e-tag for a decoration
would let two owners write one history. So `init` tries both, and refuses a store that ignores either.

Faults: those of `bucket`, of which a failed probe must not be one: only a definite answer is a verdict.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from pyworkflow_ray.errors import ConfigurationError, CorruptJournalError, StorageError
from pyworkflow_ray.ids import new_id
from pyworkflow_ray.storage.checked import decode_checked, encode_checked
from pyworkflow_ray.storage.objects.bucket import Bucket, BucketError, ConditionFailed, bucket_failed
from pyworkflow_ray.storage.objects.commit import create_once

STORAGE_KEY: Final = "storage.json"
OBJECT_FORMAT: Final = 1
PROBES: Final = "probe/"
CLOCK: Final = "clock"
_TRIES: Final = 6
_FIRST_PAUSE_S: Final = 0.1


async def probe(bucket: Bucket) -> None:
    """Create an object twice, and replace it with an e-tag that is stale.

    Raises:
        ConfigurationError: the store ignores a condition.
        StorageError: it can't be reached, or refuses to work.
    """
    key = f"{PROBES}{bucket.token()}"
    nonce = bucket.token().encode()
    try:
        if not await create_once(bucket, key, nonce + b"\nfirst"):
            raise _ignores(bucket, "it gave back what nobody had written")
        second = bucket.token().encode() + b"\nsecond"
        if await _is_done(bucket, lambda: bucket.create(key, second)):
            raise _ignores(bucket, "it created an object that existed (If-None-Match)")
        found = await bucket.get(key)
        if found is None or found.data != nonce + b"\nfirst" or not found.e_tag:
            raise _ignores(bucket, "an object that was created twice is not the first one, or has no e-tag")
        stale = found.e_tag
        if not await _is_done(bucket, lambda: bucket.replace(key, second, stale)):
            raise _ignores(bucket, "it refused to replace an object whose e-tag was right (If-Match)")
        if await _is_done(bucket, lambda: bucket.replace(key, b"third", stale)):
            raise _ignores(bucket, "it replaced an object whose e-tag was stale (If-Match)")
        await bucket.delete(key)
    except BucketError as error:
        raise bucket_failed("probing", bucket.url, error, "Check its URL, its credentials and the network") from None


def _ignores(bucket: Bucket, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"storage={bucket.url!r}: this object store does not keep conditional writes: {what}. Two owners could write "
        "one run there. Use one that does (S3, GCS, Azure, recent MinIO or Ceph), or a directory on a local disk"
    )


async def _is_done(bucket: Bucket, write: Callable[[], Awaitable[object]]) -> bool:
    """Whether the store does a write (True) or refuses it for its condition (False).

    A write whose answer was lost and which had landed is refused when it is made again: only where this is the
    expected answer may it be trusted, and everywhere else the probe errs by refusing a store.
    """
    for tried in range(1, _TRIES + 1):
        try:
            await write()
            return True
        except ConditionFailed:
            return False
        except BucketError as error:
            if error.hopeless or tried == _TRIES:
                raise
        await bucket.pause(_FIRST_PAUSE_S * 2 ** (tried - 1))
    raise AssertionError("unreachable")


async def open_storage_object(bucket: Bucket, *, create: bool) -> str:
    """The storage id in the bucket; made where it is missing and `create` is true.

    Raises:
        ConfigurationError: other objects lie there.
        StorageError: there is no storage, or a newer version made it.
        CorruptJournalError: `storage.json` is damaged, or missing beside runs.
    """
    where = f"{bucket.url}/{STORAGE_KEY}"
    try:
        found = await bucket.get(STORAGE_KEY)
        if found is None:
            if not create:
                raise StorageError(f"there is no storage at {bucket.url}", path=bucket.url)
            await _make(bucket)
            found = await bucket.get(STORAGE_KEY)
    except BucketError as error:
        raise bucket_failed("opening storage", bucket.url, error) from error
    if found is None:
        raise StorageError(f"{where} was written and is not there: the store is not consistent", path=where)
    content = decode_checked(STORAGE_KEY, found.data, where)
    if content.get("objects") != OBJECT_FORMAT:
        raise StorageError(
            f"storage {bucket.url} has format {content.get('objects')!r}, this version reads {OBJECT_FORMAT}: "
            "upgrade pyworkflow-ray",
            path=where,
        )
    return str(content["storage_id"])


async def _make(bucket: Bucket) -> None:
    """Make `storage.json`. Of several makers one wins, and all find its id."""
    if await bucket.peek("runs/") or await bucket.peek("checkpoints/manifests/"):
        raise CorruptJournalError(
            f"{bucket.url}/{STORAGE_KEY} is missing from a storage that holds runs: restore it", path=bucket.url
        )
    others = [key for key in await bucket.peek("") if not key.startswith(PROBES) and key not in (CLOCK, STORAGE_KEY)]
    if others:
        raise ConfigurationError(
            f"storage={bucket.url!r} holds other objects ({others[0]!r}): give a prefix that is empty"
        )
    content = {"kind": "pyworkflow-ray storage", "objects": OBJECT_FORMAT, "storage_id": new_id()}
    await create_once(bucket, STORAGE_KEY, encode_checked(STORAGE_KEY, content))
