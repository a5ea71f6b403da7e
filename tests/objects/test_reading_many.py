"""Listings and SQL of a bucket read every run: many at a time, for a request is mostly waiting."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from pyworkflow_ray.storage.catalogue import Query
from pyworkflow_ray.storage.listing import page
from pyworkflow_ray.storage.objects.storage import ObjectStorage
from pyworkflow_ray.storage.port import StoragePort
from pyworkflow_ray.storage.sql import rows
from tests.journals import created


def test_runs_of_a_bucket_are_read_many_at_a_time(store: StoragePort, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"run-{number:02d}" for number in range(12)]
    assert all(store.create_runs([created(one, store.storage_id, at=float(n)) for n, one in enumerate(ids)]))
    met, together = threading.Barrier(12), []
    read_run = ObjectStorage.read_run

    def meeting(self: ObjectStorage, run_id: str) -> Any:
        together.append(met.wait(30.0))  # goes on only when all twelve are here
        return read_run(self, run_id)

    monkeypatch.setattr(ObjectStorage, "read_run", meeting)
    assert [row.run_id for row in page(store, Query(), 5).rows] == ids[:6:-1]
    assert rows(store, "select run_id from runs order by 1")[1] == [(one,) for one in ids]
    assert len(together) == 24
