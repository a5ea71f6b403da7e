"""Health of a bucket: its probe is a real one, and a store that does not answer is told of within its limit."""

from __future__ import annotations

import pytest

from benchmarks.object_server import environment
from pyworkflow_ray.health import examine
from pyworkflow_ray.ids import new_id
from pyworkflow_ray.storage.objects.storage import ObjectStorage


def test_a_bucket_is_asked_whether_it_keeps_conditional_writes(store: ObjectStorage) -> None:
    report = examine(store.root, "local", None)
    assert report.status == "ok"
    assert "the bucket keeps conditional writes" in report["storage"].why


def test_a_bucket_that_does_not_answer_is_failing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment("http://127.0.0.1:1").items():
        monkeypatch.setenv(name, value)
    report = examine(f"s3://nobody/{new_id()}", "local", 2.0)
    assert report.status == "failing"
    assert report["storage"].status == "failing"
    assert report["runs"].status == "failing"
