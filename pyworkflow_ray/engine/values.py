"""What events are made of: encoded values, references to code, failures. Pure; used by all rooms through `events`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["transient", "permanent", "cascade", "timeout"]


class Payload(BaseModel):
    """One encoded value. The encoding is this field, set by us, and never a tag inside user data.

    enc: "json" (`data` is the value itself), "model" (a pydantic model or dataclass of class `cls`, `data` its JSON
        form), "pickle" (`data` is base64 of a pickle made by Python `py`), "buffers" (a pickle whose large buffers lie
        in the blobs `blobs`; `data` is base64 of a frame of both), "custom" (made by a codec hook).
    ref: SHA-256 of the spilled bytes where the value is too large for the journal; `data` is then None.
    size: encoded size in bytes, buffers included.
    digest: hash of the canonical encoding, None where the encoding is not canonical (pickles).
    cls: the class of the value, "module:qualname", for "model" and "pickle".
    preview: a short text of the value for people, None where `data` shows it already or it is redacted.
    blobs: SHA-256 of each further blob that the value needs.
    redacted: whether nobody is to be shown the value: `preview` alone, in which what is secret is masked.
    """

    model_config = ConfigDict(frozen=True)

    enc: str
    data: Any = None
    ref: str | None = None
    size: int = 0
    digest: str | None = None
    cls: str | None = None
    py: str | None = None
    preview: str | None = None
    blobs: tuple[str, ...] = Field(default=(), exclude_if=lambda blobs: not blobs)
    redacted: bool = Field(default=False, exclude_if=lambda redacted: not redacted)


class CodeRef(BaseModel):
    """Where the code of a flow or step is found.

    how: "import" (`module`, `qualname` lead back to the same object), "registered" (import `module`, then look `name`
        up among what it registered), "snapshot" (by value: the snapshot `ref` of the storage holds it under `name`),
        "value" (by value, in `payload`: a step made while the workflow ran).
    """

    model_config = ConfigDict(frozen=True)

    how: Literal["import", "registered", "snapshot", "value"]
    name: str
    module: str | None = None
    qualname: str | None = None
    ref: str | None = None
    payload: Payload | None = None


class CodeEnvironment(BaseModel):
    """What a process needs to run the code of a run. Anchors, warm pools, wake-ups and recovery are keyed by `key`."""

    model_config = ConfigDict(frozen=True)

    key: str
    python: str  # "3.11"
    import_roots: tuple[str, ...] = ()
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    code_version: str | None = None
    preload: tuple[str, ...] = Field(default=(), exclude_if=lambda modules: not modules)  # imported before any code
    # runtime_env's packages, which a cluster loses with its head: URI to the blob that holds them
    packages: dict[str, str] = Field(default_factory=dict, exclude_if=lambda packages: not packages)


class Frame(BaseModel):
    model_config = ConfigDict(frozen=True)

    file: str
    line: int
    function: str


class ErrorInfo(BaseModel):
    """A failure, readable without the code that raised it.

    type: class name; module: its module; message: its text (a text of ours where `__str__` raises).
    where: the user's innermost frame. exception: recipe to rebuild the exception itself, None where it can't be.
    """

    model_config = ConfigDict(frozen=True)

    kind: Kind
    type: str
    module: str = ""
    message: str = ""
    traceback: str = ""
    where: Frame | None = None
    exception: Payload | None = None
