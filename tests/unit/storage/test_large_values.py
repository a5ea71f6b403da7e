"""Arrays and tables: stored once and uncopied, passed on by name, back exactly, damage refused."""

from __future__ import annotations

import dataclasses
import gc
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from pyworkflow_ray.engine.events import Payload, StepCompleted
from pyworkflow_ray.errors import CorruptJournalError, PayloadError, StorageError
from pyworkflow_ray.storage import memory
from pyworkflow_ray.storage.codec import StorageCodec
from pyworkflow_ray.storage.disk import Disk
from pyworkflow_ray.storage.storage import Storage
from pyworkflow_ray.storage.verify import refs_of
from pyworkflow_ray.testing.blobs import MemoryBlobs

MIB = 1024 * 1024


class Watched(Disk):
    """Counts the bytes that are written."""

    written = 0

    def write(self, fd: int, data: bytes | memoryview) -> None:
        self.written += len(data)
        super().write(fd, data)


@pytest.fixture
def disk() -> Watched:
    return Watched()


@pytest.fixture
def storage(tmp_path: Path, disk: Watched) -> Storage:
    return Storage.open(tmp_path / "storage", disk=disk)


@dataclasses.dataclass
class Batch:
    name: str
    rows: np.ndarray[Any, Any]
    table: Any = None


def array(mib: float = 1.0, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random(int(mib * MIB) // 8)


def journaled(payload: Payload) -> Payload:
    return Payload.model_validate_json(payload.model_dump_json())


def files(storage: Storage) -> dict[str, int]:
    root = Path(storage.root, "blobs")
    return {path.name: path.stat().st_size for path in root.rglob("*") if path.is_file()}


FRAME = {"n": range(20_000), "x": [i / 7 for i in range(20_000)], "name": [f"row {i}" for i in range(20_000)]}
TABLE = pa.table(FRAME)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))
    return bool(a.equals(b))


@pytest.mark.parametrize(
    "value",
    [
        array(),
        array(1).reshape(128, -1).T,
        np.asfortranarray(array(1).reshape(256, -1)),
        array(2)[::2],
        np.array([1, 2, 3]),
        np.zeros((0, 5)),
        np.zeros(MIB, dtype=[("a", "<i4"), ("b", "S3")]),
        np.full(50_000, np.nan),
        pd.DataFrame(FRAME),
        pd.DataFrame(FRAME, dtype=object),
        pd.DataFrame({"when": pd.date_range("2026-01-01", periods=20_000, tz="Europe/Berlin")}),
        pd.Series(range(20_000), name="n"),
        TABLE,
        TABLE.slice(5, 7),
        TABLE.to_batches()[0].slice(3, 9),
        pa.chunked_array([TABLE["n"].chunk(0), TABLE["n"].chunk(0)]),
        pl.DataFrame(FRAME),
        pl.DataFrame(FRAME)["name"],
        pl.DataFrame({"c": pl.Series(["a", "b"] * 9000, dtype=pl.Categorical), "d": [[1, 2]] * 18_000}),
        pl.DataFrame({"e": pl.Series(["a", "b"], dtype=pl.Enum(["a", "b"]))}),
    ],
    ids=lambda value: f"{type(value).__module__.partition('.')[0]}-{type(value).__name__}",
)
def test_an_array_or_table_comes_back_exactly(value: Any, storage: Storage) -> None:
    for blobs in (MemoryBlobs(), storage):
        codec = StorageCodec(blobs)
        back = codec.decode(journaled(codec.encode(value)))
        assert type(back) is type(value)
        assert equal(value, back)
        if isinstance(value, pl.DataFrame):
            assert back.schema == value.schema


def test_a_frame_of_python_objects_is_refused_by_name(storage: Storage) -> None:
    with pytest.raises(PayloadError, match="Object is not supported"):
        StorageCodec(storage).encode(pl.DataFrame({"o": pl.Series([{1}, {2}], dtype=pl.Object)}))


def test_large_buffers_are_mapped_and_read_only(storage: Storage) -> None:
    payload = StorageCodec(storage).encode(Batch("a", array(4), TABLE))
    assert payload.enc == "buffers"
    assert payload.size > 4 * MIB
    assert len(payload.model_dump_json()) < 4000  # the event stays small
    tracemalloc.start()
    try:
        back = StorageCodec(Storage.open(storage.root)).decode(journaled(payload))
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()
    assert not back.rows.flags.writeable
    assert equal(back.rows, array(4))
    assert back.table.equals(TABLE)


def test_encoding_a_large_array_copies_nothing(storage: Storage) -> None:
    value = array(32)
    StorageCodec(storage).encode(array(1, seed=9))  # what is imported at the first use
    tracemalloc.start()
    try:
        StorageCodec(storage).encode({"rows": value})
        assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    finally:
        tracemalloc.stop()


def test_a_value_passed_on_is_written_once(storage: Storage, disk: Watched) -> None:
    codec = StorageCodec(storage)
    first = codec.encode({"a": array(4), "b": array(1, seed=2), "c": array(1, seed=3)})
    back = codec.decode(journaled(first))
    before, disk.written = files(storage), 0
    again = codec.encode({"new name": back["a"], "half": back["b"][: MIB // 16], "c": [back["c"], back["c"]]})
    assert disk.written < 10_000
    assert files(storage) == before
    assert set(again.blobs) <= set(first.blobs)
    assert equal(codec.decode(again)["half"], array(1, seed=2)[: MIB // 16])


def test_equal_arrays_share_a_blob_across_processes(storage: Storage) -> None:
    one = StorageCodec(storage).encode(array(5))
    before = files(storage)
    other = StorageCodec(Storage.open(storage.root)).encode(array(5))
    assert other.blobs == one.blobs
    assert files(storage) == before
    assert list(Path(storage.root, "tmp").iterdir()) == []


def test_what_is_written_into_after_it_was_stored_is_stored_anew(storage: Storage) -> None:
    codec = StorageCodec(storage)
    value = array(1)
    first = codec.encode(value)
    value[0] = 7.0
    second = codec.encode(value)
    copy = codec.decode(first).copy()  # writable, and at a new address
    copy[1] = 9.0
    third = codec.encode(copy)
    assert codec.decode(second)[0] == 7.0
    assert codec.decode(third)[1] == 9.0
    assert codec.decode(first)[0] == array(1)[0]


def test_memory_that_was_freed_is_forgotten(storage: Storage) -> None:
    codec = StorageCodec(storage)
    payload = codec.encode(array(1))
    back = codec.decode(payload)
    view = memoryview(back).cast("B")
    assert memory.find(view) is not None
    place = memory.find(view)
    assert place is not None
    del back, view
    gc.collect()
    assert memory.recall(place) is None
    other = array(1, seed=5)
    other.setflags(write=False)
    assert memory.find(memoryview(other).cast("B")) is None


@pytest.mark.parametrize("at", [0, MIB, 4 * MIB - 1])
def test_a_flipped_bit_of_a_mapped_blob_is_refused(at: int, storage: Storage) -> None:
    payload = StorageCodec(storage).encode(array(4))
    path = next(Path(storage.root, "blobs").rglob(payload.blobs[0]))
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    codec = StorageCodec(Storage.open(storage.root))
    with pytest.raises(CorruptJournalError, match="another hash than its name"):
        codec.decode(payload)
    assert codec.encode(array(4)).blobs == payload.blobs  # whoever has the value mends it
    assert equal(codec.decode(payload), array(4))


def test_verify_misses_a_blob_that_only_a_buffer_names(storage: Storage) -> None:
    payload = StorageCodec(storage).encode(array(4))
    event = StepCompleted(position="1", dispatch=1, attempt=1, started_at=0.0, ended_at=0.0, result=payload)
    assert refs_of([event]) == set(payload.blobs)


def test_a_missing_blob_is_a_clear_error(storage: Storage) -> None:
    payload = StorageCodec(storage).encode(array(4))
    next(Path(storage.root, "blobs").rglob(payload.blobs[0])).unlink()
    with pytest.raises(StorageError, match=payload.blobs[0]):
        StorageCodec(Storage.open(storage.root)).decode(payload)


def test_a_failed_sync_stores_nothing(tmp_path: Path) -> None:
    class Failing(Disk):
        def fsync(self, fd: int) -> None:
            raise OSError(5, "Input/output error")

    storage = Storage.open(tmp_path / "storage")
    broken = Storage(storage.root, storage.storage_id, Failing())
    with pytest.raises(StorageError, match="Input/output error"):
        StorageCodec(broken).encode(array(4))
    assert files(storage) == {}
    assert list(Path(storage.root, "tmp").iterdir()) == []


def test_buffers_beyond_the_limit_are_refused_by_name_value_and_remedy(storage: Storage) -> None:
    codec = StorageCodec(storage, max_payload_bytes=MIB)
    with pytest.raises(PayloadError) as refused:
        codec.encode(array(2))
    text = str(refused.value)
    assert "numpy.ndarray of 2,097,152 bytes" in text
    assert "1,048,576 bytes" in text
    assert "PYWORKFLOW_MAX_PAYLOAD_BYTES" in text
    assert codec.encode(array(1)).size > MIB
    assert list(files(storage).values()) == [MIB]


@pytest.mark.parametrize("value", [array(1), TABLE, pl.DataFrame(FRAME), {"a": [array(1)]}])
def test_arrays_are_refused_without_pickles_on_write_and_read(value: Any, storage: Storage) -> None:
    strict = StorageCodec(storage, allow_pickle=False)
    with pytest.raises(PayloadError, match="allow_pickle=False"):
        strict.encode(value)
    with pytest.raises(PayloadError, match="allow_pickle=False"):
        strict.pack(value)
    with pytest.raises(PayloadError, match="allow_pickle=False"):
        strict.decode(StorageCodec(storage).encode(value))


def test_packed_items_travel_without_their_buffers(storage: Storage) -> None:
    codec = StorageCodec(storage)
    packed = codec.pack([array(2), array(2, seed=1)])
    assert len(packed.model_dump_json()) < 4000
    assert equal(codec.decode(packed)[1], array(2, seed=1))


def test_a_slice_of_a_table_stores_what_it_holds(storage: Storage) -> None:
    payload = StorageCodec(storage).encode(pa.table({"x": array(8)}).slice(10, 100))
    assert payload.size < 10_000


def test_a_damaged_frame_is_a_payload_error(storage: Storage) -> None:
    payload = StorageCodec(storage).encode(array(1))
    with pytest.raises(PayloadError, match="damaged"):
        StorageCodec(storage).decode(payload.model_copy(update={"data": "AAAAEHsi"}))
