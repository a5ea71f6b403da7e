"""A real S3 server for this directory's tests, and a proxy in front of it that each test may tell to misbehave."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.object_server import BUCKET, Proxy, environment, moto_server
from pyworkflow_ray.ids import new_id
from pyworkflow_ray.storage.objects.storage import ObjectStorage


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    with moto_server() as port:
        yield port


@pytest.fixture
def proxy(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(s3_port)
    for name, value in environment(proxy.url).items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.close()


@pytest.fixture
def store(proxy: Proxy) -> ObjectStorage:
    """An empty storage behind the proxy."""
    return ObjectStorage.open(f"s3://{BUCKET}/{new_id()}")
