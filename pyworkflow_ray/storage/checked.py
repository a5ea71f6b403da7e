"""Small files that are written once: `storage.json`, leases, dead marks, tombstones. Pure.

Called by `storage` and `lease`. The line is `sha256 {json}`; the hash covers the file's kind and place (its name within
the storage) as well, so that a file in another's place is refused, as is any flipped bit.
"""

from __future__ import annotations

import hashlib
from typing import Any

from pydantic_core import from_json, to_json

from pyworkflow_ray.errors import CorruptJournalError


def _digest(place: str, body: bytes) -> bytes:
    return hashlib.sha256(b"pyworkflow-ray\x1f" + place.encode() + b"\x1f" + body).hexdigest().encode()


def encode_checked(place: str, content: dict[str, Any]) -> bytes:
    body = to_json(content)
    return _digest(place, body) + b" " + body + b"\n"


def decode_checked(place: str, data: bytes, path: str) -> dict[str, Any]:
    """The content of the file `path` that was written for `place`.

    Raises:
        CorruptJournalError: one bit of it is not as it was written, or it was written for another place.
    """
    body = data[65:-1]
    if data[:64] != _digest(place, body) or data[64:65] != b" " or data[-1:] != b"\n":
        raise CorruptJournalError(f"{path} is damaged or was written for another place: restore it", path=path)
    content = from_json(body)
    assert isinstance(content, dict)  # its hash says that we wrote it
    return content
