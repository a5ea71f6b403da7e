"""The seam for encryption: what a codec hook is, and how payloads and the texts of errors pass through it.

Called by the codec and by what shows texts; calls the user's hook. Every payload is given to it whole, and its result
alone is stored. Of an error kind, type and place stay readable; message and traceback become a token in the text where
they stood, so that whatever quotes them (a later error, a view, a log line) quotes the token.

Faults: a hook may raise anything: no key, a wrong one, data that was tampered with or moved to another place. A
`LookupError` of it means that it has no such key (`CodecKeyError`: nothing is lost), anything else that the data are
damaged (`CorruptJournalError`). A reader of texts gets the word "(encrypted)" in both cases.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Protocol

from pyworkflow_ray.errors import CodecKeyError, ConfigurationError, CorruptJournalError, PayloadError

HIDDEN = "(encrypted)"
TOKEN = re.compile(r"encrypted\[([A-Za-z0-9+/=]*):([A-Za-z0-9+/=]+)\]")
_NO_HOOK = (
    "a stored value is encrypted: it was written through a codec, and none is set here. Set pw.init(codec=...) or "
    "PYWORKFLOW_CODEC"
)


class CodecHook(Protocol):
    """An object that encrypts what is stored.

    Attributes:
        digest_key: Keys the digests (BLAKE2b) by which replay compares arguments and `start` recognises a run; it must
            stay the same while there are runs that it was used for. None stores no digests: a change of arguments is
            then not noticed, and a `run_id` that exists is always another run's.

    `protect` gets the data and its place (run id and position), and returns what is stored; `reveal` undoes it exactly,
    or raises: `LookupError` where the key is not there, anything else where data or place were changed. Equal data at
    an equal place should give an equal result: what is large is then stored once, however often a run is replayed. Both
    are called from any thread.
    """

    @property
    def digest_key(self) -> bytes | None: ...

    def protect(self, data: bytes, place: bytes) -> bytes: ...

    def reveal(self, data: bytes, place: bytes) -> bytes: ...


def protect(hook: CodecHook, data: bytes, place: bytes) -> bytes:
    try:
        return bytes(hook.protect(data, place))
    except ConfigurationError:
        raise
    except Exception as error:
        raise PayloadError(
            f"the codec hook could not protect a value of {len(data):,} bytes ({type(error).__name__}: {error}): "
            "nothing was stored"
        ) from error


def reveal(hook: CodecHook | None, data: bytes, place: bytes, where: str = "", path: str = "") -> bytes:
    """What `protect` was given.

    Args:
        where: Whose value it is and in which file, for the error. path: that file.

    Raises:
        CodecKeyError: there is no hook, or it has no such key.
        CorruptJournalError: the hook refuses it.
    """
    where = where or "a stored value"
    if hook is None:
        raise CodecKeyError(_NO_HOOK)
    try:
        return bytes(hook.reveal(data, place))
    except LookupError as error:
        text = error.args[0] if error.args else error
        raise CodecKeyError(f"{where} can't be decrypted: {text}") from error
    except Exception as error:
        raise CorruptJournalError(
            f"{where} is damaged: the codec refuses it ({type(error).__name__}: {error}). It was changed, or moved to "
            "another place: restore it",
            path=path,
        ) from error


def keyed_digest(hook: CodecHook, digest: str | None) -> str | None:
    """The digest of a value that nobody can compare with digests of guessed values."""
    if digest is None or hook.digest_key is None:
        return None
    return hashlib.blake2b(digest.encode(), key=hook.digest_key[:64], digest_size=16).hexdigest()


# Texts ------------------------------------------------------------------------------------------------------------


def seal_text(hook: CodecHook, text: str, place: bytes) -> str:
    """A text as a token that stands for it. Never raises: what can't be encrypted is not stored."""
    if not text:
        return text
    try:
        data = protect(hook, text.encode("utf-8", "surrogatepass"), place + b"\0text")
    except (PayloadError, ConfigurationError):
        return HIDDEN
    return f"encrypted[{_base64(place)}:{_base64(data)}]"


def reveal_text(hook: CodecHook | None, text: str) -> str:
    """`text` with its tokens revealed, or named where they can't be."""
    if "encrypted[" not in text:
        return text

    def clear(token: re.Match[str]) -> str:
        try:
            place, data = (base64.b64decode(part) for part in token.groups())
            return reveal(hook, data, place + b"\0text").decode("utf-8", "surrogatepass")
        except Exception:
            return HIDDEN

    return TOKEN.sub(clear, text)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
