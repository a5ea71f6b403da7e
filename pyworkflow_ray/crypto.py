"""AES-GCM as a codec: all that is stored is encrypted, with keys that can be changed. Extra `crypto`.

Named by the setting `codec`: "pyworkflow_ray.crypto:aes_gcm"; made anew in each process from its environment, so keys
are in no record and in no message. Called by the codec through `storage.protection`; calls `cryptography`.

What is stored: a version, the id of the key, a nonce, and the data encrypted by AES-256-GCM, with the place (run id and
position) and all before the nonce as associated data: data that were changed, or moved to another place, are refused.
The nonce is an HMAC of place and data, by a key of its own: the same data at the same place are the same bytes, which
a replay relies on, and no nonce meets two data. Whoever reads the storage sees sizes, times, names of workflows, steps
and exception classes, attributes, and which values of one place are equal; not what is in them.

Faults: no keys in the environment, or badly written ones (ConfigurationError, which never shows a key); a value whose
key is not among them (LookupError: nothing is lost); changed data (ValueError).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pyworkflow_ray.errors import ConfigurationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["AesGcm", "aes_gcm", "new_key"]

KEYS = "PYWORKFLOW_CRYPTO_KEYS"
KEYS_FILE = "PYWORKFLOW_CRYPTO_KEYS_FILE"
_MAGIC = b"pwa1"
_NONCE_BYTES = 12
_KEY_BYTES = 32
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def new_key(key_id: str) -> str:
    """A new random key as a line for `PYWORKFLOW_CRYPTO_KEYS`: "ID:BASE64".

    Raises:
        ConfigurationError: the id is not 1-64 of `A-Z a-z 0-9 . _ -`.
    """
    return f"{_checked_id(key_id)}:{base64.b64encode(os.urandom(_KEY_BYTES)).decode()}"


def aes_gcm() -> AesGcm:
    """The codec of the keys in this process's environment.

    `PYWORKFLOW_CRYPTO_KEYS` holds them, separated by commas or spaces, or `PYWORKFLOW_CRYPTO_KEYS_FILE` names a file
    with one a line. The last one encrypts; all decrypt; the first keys the digests (see `AesGcm`).

    Raises:
        ConfigurationError: there are none, one is badly written, or `cryptography` is not installed.
    """
    text, path = os.environ.get(KEYS, ""), os.environ.get(KEYS_FILE, "")
    if bool(text.strip()) == bool(path):
        raise ConfigurationError(
            f"codec pyworkflow_ray.crypto:aes_gcm needs keys in this process (pid {os.getpid()}): set either {KEYS}, "
            f"'ID:BASE64' of 32 bytes, several separated by commas and the newest last, or {KEYS_FILE} to a file of "
            "such lines. A new key: python -c 'import pyworkflow_ray.crypto as c; print(c.new_key(\"2026-01\"))'"
        )
    if path:
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeError) as error:
            raise ConfigurationError(f"{KEYS_FILE}={path!r} can't be read: {error}") from None
    return AesGcm(_parse(text, KEYS_FILE if path else KEYS))


class AesGcm:
    """A codec hook that encrypts by AES-256-GCM.

    Args:
        keys: 32 bytes each, by id, oldest first: the last one encrypts, all decrypt. To change keys add one at the end
            everywhere, readers and workers first; to be rid of an old one wait until retention has taken its runs.
        digest_key: Keys the digests by which arguments are compared. None: made from the first key, which then must
            stay, or stay first, as long as the storage is used. Give one of its own to be free of that.

    Raises:
        ConfigurationError: a key or id is no good, or `cryptography` is not installed.
    """

    def __init__(self, keys: Mapping[str, bytes], *, digest_key: bytes | None = None) -> None:
        if not keys:
            raise ConfigurationError("AesGcm needs at least one key")
        self._ciphers: dict[str, AESGCM] = {}
        self._nonce_keys: dict[str, bytes] = {}
        for key_id, key in keys.items():
            _checked_id(key_id)
            if not isinstance(key, bytes) or len(key) != _KEY_BYTES:
                raise ConfigurationError(f"key {key_id!r} is not allowed: {_KEY_BYTES} bytes are needed")
            self._ciphers[key_id] = _cipher(_derived(key, b"encrypt"))
            self._nonce_keys[key_id] = _derived(key, b"nonce")
        self._newest = list(keys)[-1]
        self._digest_key = digest_key or _derived(keys[next(iter(keys))], b"digest")

    @property
    def digest_key(self) -> bytes:
        return self._digest_key

    def protect(self, data: bytes, place: bytes) -> bytes:
        head = _MAGIC + bytes([len(self._newest)]) + self._newest.encode()
        mac = hmac.new(self._nonce_keys[self._newest], len(place).to_bytes(4, "big") + place, hashlib.sha256)
        mac.update(data)
        nonce = mac.digest()[:_NONCE_BYTES]
        return head + nonce + self._ciphers[self._newest].encrypt(nonce, data, head + place)

    def reveal(self, data: bytes, place: bytes) -> bytes:
        if data[: len(_MAGIC)] != _MAGIC or len(data) < len(_MAGIC) + 1:
            raise ValueError("it was not written by pyworkflow_ray.crypto")
        end = len(_MAGIC) + 1 + data[len(_MAGIC)]
        key_id = data[len(_MAGIC) + 1 : end].decode("ascii", "replace")
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise LookupError(f"its key {key_id!r} is not among those given ({', '.join(self._ciphers)})")
        try:
            return cipher.decrypt(data[end : end + _NONCE_BYTES], data[end + _NONCE_BYTES :], data[:end] + place)
        except Exception:
            raise ValueError(f"it does not have the tag of key {key_id!r}") from None

    def __repr__(self) -> str:
        return f"<AesGcm, keys {', '.join(self._ciphers)}>"


def _derived(key: bytes, purpose: bytes) -> bytes:
    """A key of its own for each purpose: HKDF (RFC 5869) of SHA-256, for one block."""
    pseudorandom = hmac.digest(b"pyworkflow-ray aes-gcm 1", key, "sha256")
    return hmac.digest(pseudorandom, purpose + b"\x01", "sha256")


def _cipher(key: bytes) -> AESGCM:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise ConfigurationError(
            "pyworkflow_ray.crypto needs cryptography: pip install 'pyworkflow-ray[crypto]'"
        ) from None
    return AESGCM(key)


def _parse(text: str, source: str) -> dict[str, bytes]:
    keys: dict[str, bytes] = {}
    for number, part in enumerate(re.split(r"[,\s]+", text.strip()), 1):
        key_id, colon, encoded = part.partition(":")
        try:
            key = base64.b64decode(encoded, validate=True)
        except ValueError:
            key = b""
        # the text itself is never shown: a key badly written is a key still
        if not colon or not _ID.fullmatch(key_id) or len(key) != _KEY_BYTES:
            raise ConfigurationError(f"{source}: key number {number} is not 'ID:BASE64' of {_KEY_BYTES} bytes")
        if key_id in keys:
            raise ConfigurationError(f"{source}: there are two keys of the id {key_id!r}")
        keys[key_id] = key
    return keys


def _checked_id(key_id: str) -> str:
    if not _ID.fullmatch(key_id):
        raise ConfigurationError(f"key id {key_id!r} is not allowed: 1-64 of A-Z a-z 0-9 . _ -")
    return key_id
