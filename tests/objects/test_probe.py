"""`init` refuses a store that ignores conditions: against real servers that do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.object_server import BUCKET, Fault, Proxy, TinyS3, environment
from pyworkflow_ray.errors import ConfigurationError, CorruptJournalError, StorageError
from pyworkflow_ray.storage.objects.storage import ObjectStorage
from tests.journals import created


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyS3]:
    server = TinyS3()
    for name, value in environment(server.url).items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


@pytest.mark.parametrize(
    ("ignored", "what"), [("if-none-match", "created an object that existed"), ("if-match", "e-tag was stale")]
)
def test_a_server_that_ignores_a_condition_is_refused(tiny: TinyS3, ignored: str, what: str) -> None:
    tiny.ignores = frozenset({ignored})
    with pytest.raises(ConfigurationError, match=what):
        ObjectStorage.open(f"s3://{BUCKET}/refused-{ignored}-{tiny.port}")
    assert not [key for key in tiny.objects if key.endswith("storage.json")]


def test_a_server_that_keeps_conditions_is_taken_and_nothing_is_left(tiny: TinyS3) -> None:
    store = ObjectStorage.open(f"s3://{BUCKET}/{tiny.port}")
    assert [key.rpartition("/")[2] for key in tiny.objects] == ["storage.json"]
    assert ObjectStorage.open(f"s3://{BUCKET}/{tiny.port}").storage_id == store.storage_id


@pytest.mark.parametrize("what", ["stored-503", "stored-drop", "409", "503", "late"])
def test_a_fault_while_probing_is_no_verdict_of_goodness(proxy: Proxy, what: str) -> None:
    """It may be refused for a fault, with an error; it is never taken for what it did not show."""
    proxy.faults = [Fault(what, "/probe/", after_s=0.01)]
    store = ObjectStorage.open(f"s3://{BUCKET}/probed-{what}")
    assert proxy.struck.count[what] == 1
    assert len(store.storage_id) == 32


def test_of_two_makers_one_wins(proxy: Proxy) -> None:
    proxy.faults = [Fault("stored-503", "storage.json")]
    first = ObjectStorage.open(f"s3://{BUCKET}/made-twice")
    assert ObjectStorage.open(f"s3://{BUCKET}/made-twice").storage_id == first.storage_id


def test_other_objects_and_lost_storage_files_are_refused(tiny: TinyS3) -> None:
    tiny.objects["mine/notes.txt"] = b"x", 0.0
    with pytest.raises(ConfigurationError, match=r"notes\.txt"):
        ObjectStorage.open(f"s3://{BUCKET}/mine")
    store = ObjectStorage.open(f"s3://{BUCKET}/lost")
    store.create_run(created("run", store.storage_id))
    del tiny.objects["lost/storage.json"]
    with pytest.raises(CorruptJournalError, match="restore"):
        ObjectStorage.open(f"s3://{BUCKET}/lost")
    with pytest.raises(StorageError, match="no storage"):
        ObjectStorage.open(f"s3://{BUCKET}/nothing", create=False)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://host/x", "s3://bucket/prefix"),
        ("s3:///x", "s3://bucket/prefix"),
        ("s3://key:secret@bucket/x", "environment"),
        ("s3://bucket/x?endpoint=y", "environment"),
    ],
)
def test_urls_that_name_no_storage_are_refused(url: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why) as raised:
        ObjectStorage.open(url)
    assert "secret" not in str(raised.value)
