"""The manifest: one numbered file that names every checkpoint file with its SHA-256. Data, and its reading and writing.

Called by `checkpoint`, `checkpoint_ids` and the `compact*` modules; calls `checkpoint_files` and `checked`; loads no
pyarrow. Rules:

* `manifests/N.json`: the highest number counts, those below are left of a crash. What it does not name does not count.
* N+1 is published by exclusive creation: of two compactors that go on from N one gets `FileExistsError`.
* Number 0, empty, is there before anything else, so that a store of checkpoints without a manifest is damage.

Faults: a crash between any two calls; another publishes, and removes the number we are about to read (list again).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Final

from pyworkflow_ray.errors import CorruptJournalError, StorageError
from pyworkflow_ray.failpoints import failpoint
from pyworkflow_ray.storage.checked import decode_checked, encode_checked
from pyworkflow_ray.storage.checkpoint_files import Files

FORMAT: Final = 1
MANIFESTS: Final = "manifests"
_TRIES: Final = 100


@dataclass(slots=True, frozen=True)
class Group:
    """One row group of a file of events: its bytes, their SHA-256, its rows, its smallest and largest run id."""

    start: int
    length: int
    sha256: str
    rows: int
    first: str
    last: str


@dataclass(slots=True, frozen=True)
class ParquetFile:
    """One file. `first` and `last` are its smallest and largest run id, `path` is relative to `checkpoints`.

    groups, footer: of events only, so that a run is read without the rest of the file. footer: (start, SHA-256).
    """

    table: str
    path: str
    bytes: int
    sha256: str
    rows: int
    first: str
    last: str
    groups: tuple[Group, ...] = ()
    footer: tuple[int, str] = (0, "")


@dataclass(slots=True, frozen=True)
class Batch:
    """Finished runs of one date of creation, in one file a table.

    raw: bytes of its rows in memory, by which it is merged. oldest, newest: when the first and the last of them ended.
    """

    token: str
    date: str
    runs: int
    events: int
    raw: int
    oldest: float
    newest: float
    files: tuple[ParquetFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(slots=True, frozen=True)
class IdList:
    """A sorted list of ids, see `checkpoint_ids`."""

    path: str
    count: int
    sha256: str


@dataclass(slots=True, frozen=True)
class LivePrefix:
    """Closed epochs, up to `last`, of a run that was not finished; a marker in its directory says whether it counts."""

    run_id: str
    last: int
    file: ParquetFile


@dataclass(slots=True, frozen=True)
class Manifest:
    """number -1: there are no checkpoints."""

    number: int = -1
    batches: tuple[Batch, ...] = ()
    ids: tuple[IdList, ...] = ()
    live: tuple[LivePrefix, ...] = field(default=())

    def names(self) -> set[str]:
        """Every file that counts."""
        files = {file.path for batch in self.batches for file in batch.files}
        return files | {ids.path for ids in self.ids} | {prefix.file.path for prefix in self.live}


def manifest_name(number: int) -> str:
    return f"{MANIFESTS}/{number}.json"


def numbers(files: Files) -> list[int]:
    """Numbers of the manifests that are there, ascending; StorageError where that can't be read."""
    names = [name.removesuffix(".json") for name in _list(files, MANIFESTS) if name.endswith(".json")]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def read_manifest(files: Files, storage_id: str) -> Manifest:
    """The manifest that counts now.

    Raises:
        CorruptJournalError: it is damaged, of another storage, or missing beside files of checkpoints.
        StorageError: it can't be read, or a newer version wrote it.
    """
    for _ in range(_TRIES):
        found = numbers(files)
        if not found:
            _check_empty(files)
            return Manifest()
        name = manifest_name(found[-1])
        try:
            return decode_manifest(found[-1], files.read(name), storage_id, files.path(name))
        except FileNotFoundError:
            continue  # a newer one has taken its place
        except OSError as error:
            raise StorageError(f"{files.path(name)} can't be read: {error}", path=files.path(name)) from error
    raise StorageError(f"{files.path(MANIFESTS)} changed during each of {_TRIES} readings", path=files.path(MANIFESTS))


def _list(files: Files, directory: str) -> list[str]:
    try:
        return files.list(directory)
    except OSError as error:
        raise StorageError(f"{files.path(directory)} can't be read: {error}", path=files.path(directory)) from error


def _check_empty(files: Files) -> None:
    """No manifest: then nothing may be there but what comes before the first."""
    others = any(name not in (MANIFESTS, "lock") for name in _list(files, ""))
    if others and not numbers(files):  # nor one that was made between the two looks
        path = files.path(MANIFESTS)
        raise CorruptJournalError(f"{path} holds no manifest, though there are checkpoints: restore it", path=path)


def publish_manifest(files: Files, storage_id: str, manifest: Manifest) -> None:
    """Make `manifest` the one that counts, durably, and remove those before it.

    Raises:
        StorageError: somebody else published the number first; nothing of ours counts.
        OSError: the store refused; whether it counts is not known before it is read again.
    """
    name = manifest_name(manifest.number)
    failpoint("manifest.before_publish")
    try:
        files.publish(name, encode_manifest(manifest, storage_id))
    except FileExistsError:
        path = files.path(name)
        raise StorageError(f"another compaction published {path} meanwhile: run this one again", path=path) from None
    failpoint("manifest.before_remove")
    for number in numbers(files):
        if number < manifest.number:
            files.remove(manifest_name(number))


def encode_manifest(manifest: Manifest, storage_id: str) -> bytes:
    content = {"format": FORMAT, "storage_id": storage_id, **dataclasses.asdict(manifest)}
    return encode_checked(f"checkpoints/{manifest_name(manifest.number)}", content)


def decode_manifest(number: int, data: bytes, storage_id: str, path: str) -> Manifest:
    content = decode_checked(f"checkpoints/{manifest_name(number)}", data, path)
    if content["format"] != FORMAT:
        raise StorageError(f"{path} has format {content['format']!r}: upgrade pyworkflow-ray", path=path)
    if content["storage_id"] != storage_id:
        raise CorruptJournalError(
            f"{path} belongs to storage {content['storage_id']}, and storage.json says {storage_id}: "
            "one of the two was brought from elsewhere, restore it",
            path=path,
        )
    return Manifest(
        number=content["number"],
        batches=tuple(_batch(raw) for raw in content["batches"]),
        ids=tuple(IdList(**raw) for raw in content["ids"]),
        live=tuple(LivePrefix(raw["run_id"], raw["last"], file_from(raw["file"])) for raw in content["live"]),
    )


def _batch(raw: dict[str, Any]) -> Batch:
    return Batch(**{**raw, "files": tuple(file_from(file) for file in raw["files"])})


def file_from(raw: dict[str, Any]) -> ParquetFile:
    start, sha = raw["footer"]
    return ParquetFile(
        **{**raw, "groups": tuple(Group(**group) for group in raw["groups"]), "footer": (int(start), str(sha))}
    )
