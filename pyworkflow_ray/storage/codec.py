"""The codec of the storage: values and errors to what the journal holds, and back. Implements `engine.calls.Codec`.

Called by the driver, by `execution` in the workers, and by handles; calls payload, pickling, exceptions, and the blob
store for what is too large for the journal. Loads neither duckdb nor pyarrow, and cloudpickle only at the first pickle.

Every value comes back exactly as it was, or encoding it raises `PayloadError`. Decoding makes a new object each time:
nobody can change what the history holds. The encoding is a field of the record and never a tag inside user data, so no
code runs because of what a dict contains.
"""

from __future__ import annotations

import base64
import copy
import functools
import hashlib
import logging
from collections.abc import Iterable
from typing import Any, Protocol

from pydantic_core import from_json, to_json

from pyworkflow_ray.engine.events import CodeRef, ErrorInfo, Kind, Payload
from pyworkflow_ray.errors import (
    UNREADABLE,
    ConfigurationError,
    CorruptJournalError,
    PayloadError,
    StepFailedError,
)
from pyworkflow_ray.storage import exceptions, failure_text, pickling
from pyworkflow_ray.storage.large import LargeBuffers, Sharing, frame, unframe, whole_frame
from pyworkflow_ray.storage.payload import (
    PYTHON,
    Encoded,
    NotJson,
    TooLarge,
    canonical,
    clean_text,
    copy_json,
    decode_model,
    digest_of,
    encode_json,
    encode_model,
    is_model,
    preview,
)
from pyworkflow_ray.storage.protection import CodecHook, keyed_digest, protect, reveal, reveal_text, seal_text
from pyworkflow_ray.storage.redaction import Redaction

log = logging.getLogger("pyworkflow_ray.storage")

SPILL_BYTES = 64 * 1024  # larger values go to files of their own: a commit of the journal stays small
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024  # of what is copied to be stored: JSON, pickles
MAX_BUFFERS_BYTES = 8 * 1024 * 1024 * 1024  # of the buffers of arrays and tables, which are not
MAX_PROTECTED_BYTES = 1024 * 1024 * 1024  # of all of a value that a hook encrypts, for it is copied
_SHORT_TEXT = 4096
_CODE = b"\0code"  # the place of code by value: of no run, so that one snapshot serves all of them


class BlobStore(Protocol):
    """Content-addressed bytes. Implemented by Storage, and by testing's MemoryBlobs.

    One that has `put_blob_parts`, `open_blob` and `keep_blob` as well, as Storage has, stores large arrays uncopied.
    """

    def put_blob(self, data: bytes) -> str: ...

    def get_blob(self, sha: str) -> bytes: ...


class StorageCodec:
    """Encodes values for the log and decodes them.

    Args:
        blobs: Where payloads above 64 KiB go: a Storage, or any `BlobStore`.
        allow_pickle: False refuses pickles on write and on read. Default True. Who can write the storage can then run
            code as whoever reads it.
        max_payload_bytes: Largest encoded value. None: 64 MiB, beside up to 8 GiB of buffers of arrays and tables
            (through a hook 1 GiB in all). Larger ones raise `PayloadError` without being built.
        hook: Encrypts; default none. See `protection`.
        sharing: Where other processes find large buffers without reading them; default nowhere.
        redact: Names of what is not shown to people; see `redaction`.
    """

    def __init__(
        self,
        blobs: BlobStore,
        *,
        allow_pickle: bool = True,
        max_payload_bytes: int | None = None,
        hook: CodecHook | None = None,
        sharing: Sharing | None = None,
        redact: Iterable[str] = (),
    ) -> None:
        self._blobs = blobs
        self._redaction = Redaction(redact)
        self._hook = hook
        self._large = LargeBuffers(blobs, sharing)
        self._run_id, self._position, self._place = "", "", b""
        self.allow_pickle = allow_pickle
        self.max_payload_bytes = max_payload_bytes or MAX_PAYLOAD_BYTES
        most = MAX_BUFFERS_BYTES if hook is None else MAX_PROTECTED_BYTES
        self.max_buffers_bytes = max_payload_bytes or most

    @property
    def hooked(self) -> bool:
        """Whether all goes through a hook."""
        return self._hook is not None

    def at(self, run_id: str, position: str = "") -> StorageCodec:
        """The codec for what lies at this place: what a hook has protected is readable at its own place only.

        Args:
            position: Of the step or map; "" for what belongs to the run as a whole.
        """
        if self._hook is None:
            return self
        bound = copy.copy(self)
        bound._run_id, bound._position = run_id, position
        bound._place = f"{run_id}\0{position}".encode()
        return bound

    def for_code(self) -> StorageCodec:
        """The codec for code by value, which lies at no place of a run."""
        bound = self.at("")
        if bound is not self:
            bound._place = _CODE
        return bound

    # Values ---------------------------------------------------------------------------------------------------

    def encode(self, value: Any, name: str | None = None) -> Payload:
        """The stored form of `value`; exceptions are values too.

        Args:
            name: Of the parameter that it is given to.

        Raises:
            PayloadError: no encoding keeps it exactly, it is too large, or it needs a pickle and those are off.
        """
        cls = type(value)
        if (self._hook is None and not self._redaction.marks(name)) and (
            value is None
            or cls is bool
            or (cls is int and -(2**63) <= value < 2**63)
            or (cls is str and len(value) <= _SHORT_TEXT and value.isascii())
        ):
            text = canonical(value)
            return Payload(enc="json", data=value, size=len(text), digest=digest_of(text))
        return self._store(self._encode_checked(value), value, name)

    def marks(self, name: str | None) -> bool:
        """Whether the user marked this name as that of something secret."""
        return self._redaction.marks(name)

    def _hidden(self, encoded: Encoded, value: Any, name: str | None) -> str | None:
        """What people are shown of a value that holds something secret; None: it holds nothing."""
        if encoded.enc == "exception" or (encoded.enc == "json" and not self._redaction.names):
            return None
        text = self._redaction.text(value, name, encoded.secret)
        if text is not None and self._hook is None:
            _warn_of_clear_text(str(getattr(self._blobs, "root", "")))
        return text

    def _encode_checked(self, value: Any) -> Encoded:
        try:
            return self._encode(value)
        except TooLarge:
            raise PayloadError(
                f"a {pickling.type_name(value)}{_measure(value)} is too large to be stored: {self._limits()} "
                "(max_payload_bytes). Store it elsewhere and pass its name, or allow more: "
                "pw.init(max_payload_bytes=...) or PYWORKFLOW_MAX_PAYLOAD_BYTES"
            ) from None

    def _limits(self) -> str:
        text = f"the limit of one value is {self.max_payload_bytes:,} bytes"
        if self.max_buffers_bytes != self.max_payload_bytes:
            text += f", and {self.max_buffers_bytes:,} of the buffers of arrays and tables in it"
        return text

    def pack(self, value: Any) -> Payload:
        """As `encode`, for a value that travels to a worker and is not stored: it is never spilled to a file, but for
        the large buffers of arrays and tables, which are not copied from process to process.

        Raises:
            PayloadError: as `encode`.
        """
        encoded = self._encode_checked(value)
        enc, text, data, cls, digest, buffers, _ = encoded
        if self._hook is not None or buffers:
            return self._store(encoded, value)
        py = PYTHON if enc == "pickle" or (enc == "exception" and exceptions.holds_pickle(data)) else None
        if enc == "pickle":
            data = base64.b64encode(text).decode()
        return Payload(enc=enc, data=data, size=len(text), digest=digest, cls=cls, py=py)

    def _encode(self, value: Any) -> Encoded:
        limit = self.max_payload_bytes
        if isinstance(value, (str, bytes, bytearray)) and len(value) > limit:
            raise TooLarge
        try:
            return encode_json(value, limit)
        except NotJson as not_json:
            reason = str(not_json)
        if isinstance(value, BaseException):
            recipe = exceptions.take_apart(value, self.allow_pickle)
            if recipe is not None:
                return self._encode_recipe(recipe)
        elif is_model(value):
            encoded = encode_model(value, limit)
            if encoded is not None:
                return encoded
        if not self.allow_pickle:
            raise PayloadError(
                f"a {pickling.type_name(value)} can't be stored: it has no exact JSON form ({reason}), and pickles are "
                "switched off (allow_pickle=False). Pass JSON types, an importable pydantic model or a dataclass"
            )
        secrets: list[str] = []
        text, buffers = pickling.dump_checked(value, limit, self.max_buffers_bytes, secrets)
        enc = "buffers" if buffers else "pickle"
        return Encoded(enc, text, None, pickling.type_name(value), None, buffers, bool(secrets))

    def _encode_recipe(self, recipe: exceptions.Recipe) -> Encoded:
        text = to_json(recipe)
        if len(text) > self.max_payload_bytes:
            raise TooLarge
        return Encoded("exception", text, recipe, None, None)

    def _store(self, encoded: Encoded, value: Any, name: str | None = None) -> Payload:
        enc, text, data, cls, digest, buffers, _ = encoded
        hidden = self._hidden(encoded, value, name)
        pickled = enc in ("pickle", "buffers") or (enc == "exception" and exceptions.holds_pickle(data))
        py = PYTHON if pickled else None
        if self._hook is not None:
            return self._protect(self._hook, encoded, py, hidden)
        ref, size = None, len(text)
        blobs: tuple[str, ...] = ()
        shown = preview(value) if enc in ("pickle", "buffers") else None
        if buffers:
            places = self._large.put(buffers)
            blobs = tuple(dict.fromkeys(place.digest for place in places))
            size += sum(place.length for place in places)
            text = frame(text, places)
        if len(text) > SPILL_BYTES:
            ref, data = self._blobs.put_blob(text), None
            shown = preview(value) if enc != "exception" else None
        elif enc in ("pickle", "buffers"):
            data = base64.b64encode(text).decode()
        return Payload(
            enc=enc,
            data=data,
            ref=ref,
            size=size,
            digest=digest,
            cls=cls,
            py=py,
            preview=shown if hidden is None else hidden,
            blobs=blobs,
            redacted=hidden is not None,
        )

    def _protect(self, hook: CodecHook, encoded: Encoded, py: str | None, hidden: str | None) -> Payload:
        text = whole_frame(encoded.text, encoded.buffers) if encoded.buffers else encoded.text
        return self._seal(
            hook, _with_head(encoded.enc, encoded.cls, py, text, hidden), keyed_digest(hook, encoded.digest)
        )

    def _seal(self, hook: CodecHook, inner: bytes, digest: str | None) -> Payload:
        text = protect(hook, inner, self._place)
        if len(text) > SPILL_BYTES:
            return Payload(enc="custom", ref=self._blobs.put_blob(text), size=len(text), digest=digest)
        return Payload(enc="custom", data=base64.b64encode(text).decode(), size=len(text), digest=digest)

    def decode(self, payload: Payload) -> Any:
        """The value of `payload`, made anew.

        Raises:
            PayloadError: it is damaged, its class or Python are not here, it is a pickle and those are off, or it is
                encrypted and there is no key.
            StorageError: its bytes can't be read.
        """
        enc, data = payload.enc, payload.data
        if self._hook is not None or enc == "custom":
            return self._decode_text(*_parted(self._opened(payload))[:4])
        if payload.ref is None:
            if enc == "json":
                return copy_json(data)
            if enc == "model" and payload.cls is not None:
                return decode_model(to_json(data), payload.cls)
            if enc == "exception":
                return self._rebuild(data, payload.py)
            text = _from_base64(data)
        else:
            text = self._fetch(payload)
        return self._decode_text(enc, text, payload.cls, payload.py)

    def _decode_text(self, enc: str, text: bytes, cls: str | None, py: str | None) -> Any:
        if enc == "json":
            return from_json(text, allow_inf_nan=False)
        if enc == "model" and cls is not None:
            return decode_model(text, cls)
        if enc == "exception":
            return self._rebuild(from_json(text), py)
        if enc in ("pickle", "buffers"):
            self._check_pickle(cls or "value", py)
            return pickling.load(text) if enc == "pickle" else pickling.load(*unframe(text, self._large))
        raise PayloadError(f"a stored value has the encoding {enc!r}, which this version does not know: upgrade")

    def _rebuild(self, recipe: exceptions.Recipe, py: str | None) -> BaseException:
        if exceptions.holds_pickle(recipe):
            self._check_pickle("exception", py)
        return exceptions.rebuild(recipe, self.allow_pickle)

    def _check_pickle(self, what: str, py: str | None) -> None:
        if not self.allow_pickle:
            raise PayloadError(
                f"a stored {what} is a pickle, and pickles are switched off (allow_pickle=False): nothing was loaded"
            )
        if py != PYTHON:
            raise PayloadError(
                f"a stored {what} was pickled by Python {py}, and this is Python {PYTHON}: pickles are only read by "
                f"the minor version that wrote them. Go on with Python {py}, or pass JSON types, models or dataclasses"
            )

    def _fetch(self, payload: Payload) -> bytes:
        ref = payload.ref or ""
        text = self._blobs.get_blob(ref)
        sized = payload.enc == "buffers" or len(text) == payload.size
        if not sized or hashlib.sha256(text).hexdigest() != ref:
            raise PayloadError(f"the payload file {ref} is damaged: its content does not have the SHA-256 of its name")
        return text

    # What a hook protects ---------------------------------------------------------------------------------------

    def _opened(self, payload: Payload) -> bytes:
        """What the hook was given, head and all."""
        path, where = self._where(payload.ref)
        if payload.enc != "custom":
            raise CorruptJournalError(
                f"{where} is not encrypted, and this storage is written through a codec: nothing was loaded", path=path
            )
        try:
            data = _from_base64(payload.data) if payload.ref is None else self._blobs.get_blob(payload.ref)
        except PayloadError as error:
            raise CorruptJournalError(f"{where} is damaged: {error}", path=path) from error
        return reveal(self._hook, data, self._place, where, path)

    def _where(self, ref: str | None) -> tuple[str, str]:
        """The file of what lies at this place, and words for it."""
        store: Any = self._blobs
        try:
            path = store.blobs.path(ref) if ref else store.directory(self._run_id) if self._run_id else store.root
            if not ref and self._run_id and store.is_retired(self._run_id):
                path = f"{store.root}/checkpoints"
        except AttributeError:  # no directory
            path = ""
        what = (
            f"run {self._run_id!r}: a value" if self._run_id else "stored code" if self._place == _CODE else "a value"
        )
        if self._position:
            what += f" of position {self._position}"
        return path, f"{what} in {path}" if path else what

    def move(self, payload: Payload, run_id: str, position: str = "") -> Payload:
        """A payload that lies at this codec's place, for another place.

        Raises:
            CodecKeyError, CorruptJournalError: as `decode`.
        """
        if self._hook is None or payload.enc != "custom":
            return payload
        return self.at(run_id, position)._seal(self._hook, self._opened(payload), payload.digest)

    def check(self, payload: Payload) -> None:
        """Raise what `decode` would because of the hook, and make nothing."""
        self._opened(payload)

    def opened(self, payload: Payload) -> Payload:
        """For people: what a view can show of a payload as if no hook had been there. Never to be stored."""
        if payload.redacted:
            return payload.model_copy(update={"data": None})
        if payload.enc != "custom":
            return payload
        enc, text, cls, py, hidden = _parted(self._opened(payload))
        if hidden is not None:
            return Payload(enc=enc, size=len(text), cls=cls, py=py, preview=hidden, redacted=True)
        data = from_json(text) if enc in ("json", "model") else None
        shown = None if data is not None or enc == "json" else f"<{(cls or enc).rpartition('.')[2]}>"
        return Payload(enc=enc, data=data, size=len(text), cls=cls, py=py, preview=shown)

    def put_code(self, data: bytes) -> str:
        """Store a snapshot of code durably; its reference."""
        return self._blobs.put_blob(data if self._hook is None else protect(self._hook, data, _CODE))

    def get_code(self, ref: str) -> bytes:
        """The snapshot of code under `ref`; raises as `decode`, and StorageError where it is not there."""
        data = self._blobs.get_blob(ref)
        if self._hook is None:
            return data
        path, where = self.for_code()._where(ref)
        return reveal(self._hook, data, _CODE, where, path)

    def store_code(self, code: CodeRef) -> CodeRef:
        """A reference to code as it is stored: code by value through the hook.

        Raises:
            ConfigurationError: it is code by value, a pickle, and those are switched off.
        """
        payload = code.payload
        if payload is None or payload.enc == "custom":
            return code
        if not self.allow_pickle:
            raise ConfigurationError(
                f"{code.name!r} can only travel by value, as a pickle, and allow_pickle is off. Define it at the top "
                "of a module that workers can import"
            )
        if self._hook is None:
            return code
        inner = _with_head(payload.enc, payload.cls, payload.py, _from_base64(payload.data))
        return code.model_copy(update={"payload": self.for_code()._seal(self._hook, inner, None)})

    # Errors ---------------------------------------------------------------------------------------------------

    def encode_error(self, error: BaseException, kind: Kind) -> ErrorInfo:
        """`error` as the log holds it: texts for people, and the recipe to rebuild it, None where there is none.

        Never raises because of what `error` is or holds.
        """
        message, trace = failure_text.message_of(error), failure_text.traceback_of(error)
        masked = self._redaction.message(error)
        if masked is not None:
            message, trace = masked, trace.replace(message, masked)
        exception: Payload | None = None
        try:
            recipe = exceptions.take_apart(error, self.allow_pickle)
            if recipe is not None:
                exception = self._store(self._encode_recipe(recipe), error)
        except (PayloadError, TooLarge):
            pass
        if self._hook is not None:
            message, trace = (seal_text(self._hook, text, self._place) for text in (message, trace))
        cls = type(error)
        return ErrorInfo(
            kind=kind,
            type=clean_text(cls.__name__, 200),
            module=clean_text(str(cls.__module__), 200),
            message=message,
            traceback=trace,
            where=failure_text.where_of(error),
            exception=exception,
        )

    def decode_error(self, info: ErrorInfo) -> BaseException:
        """The exception itself, or where it can't be restored a `StepFailedError` that has its texts.

        Raises:
            CodecKeyError, CorruptJournalError: as `decode`.
        """
        reason = "it has no storable form"
        if info.exception is not None:
            try:
                found = self.decode(info.exception)
                if isinstance(found, BaseException):
                    return found
            except UNREADABLE:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        name = info.type if info.module in ("", "builtins") else f"{info.module}.{info.type}"
        message, trace = self.readable(info.message), self.readable(info.traceback)
        failed = StepFailedError(message, type=name, traceback_text=trace)
        failed.add_note(f"pyworkflow-ray: the original exception could not be restored: {reason}")
        return failed

    def readable(self, text: str) -> str:
        """A text of the log with what is encrypted in it revealed, or where that can't be done named."""
        return reveal_text(self._hook, text)

    def hide(self, text: str) -> str:
        """A text as the log holds it: `readable` gives it back."""
        return text if self._hook is None else seal_text(self._hook, text, self._place)


def _with_head(enc: str, cls: str | None, py: str | None, text: bytes, hidden: str | None = None) -> bytes:
    head = to_json([enc, cls, py, hidden])
    return b"".join([len(head).to_bytes(4, "big"), head, text])


def _parted(inner: bytes) -> tuple[str, bytes, str | None, str | None, str | None]:
    """What `_with_head` was made of."""
    try:
        size = int.from_bytes(inner[:4], "big")
        enc, cls, py, hidden = from_json(inner[4 : 4 + size])
    except ValueError as error:
        raise PayloadError(f"a stored value is damaged: what the codec hook revealed is none ({error})") from error
    return enc, inner[4 + size :], cls, py, hidden


@functools.cache
def _warn_of_clear_text(root: str) -> None:
    """Once a process and storage."""
    log.warning(
        "a secret is stored in clear text in %s, for a step may need it again; it is shown to nobody. A codec encrypts "
        "it: pw.init(codec=...)",
        root or "memory",
    )


def _measure(value: Any) -> str:
    size = len(value) if isinstance(value, (str, bytes, bytearray)) else getattr(value, "nbytes", None)
    return f" of {size:,} bytes" if isinstance(size, int) else ""


def _from_base64(data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except Exception as error:
        raise PayloadError(f"a stored value is damaged: its pickle is no base64 text ({error})") from error
