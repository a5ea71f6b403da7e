"""`runs trace`: the trace from the log alone, shown and sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.otlp import otlp_receiver

Invoke = Callable[..., Any]


def test_trace_is_drawn_as_a_tree_from_the_log(invoke: Invoke, shop: Any) -> None:
    result = invoke("runs", "trace", "order-41", "--storage", shop.root)
    assert result.exit_code == 0, result.stderr
    head, *spans = result.stdout.splitlines()
    assert head.startswith("trace ")
    root = next(line for line in spans if "CardDeclined" in line)
    assert "✗ checkout" in root
    assert any("✗   charge" in line for line in spans)


def test_json_has_the_ids_that_are_exported(invoke: Invoke, shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("runs", "trace", "order-41", "--json", "--storage", shop.root)
    told = {span["span_id"] for span in json.loads(result.stdout)}
    with otlp_receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{receiver.endpoint}/v1/traces")
        done = invoke("runs", "trace", "order-41", "--export", "--storage", shop.root)
        assert done.exit_code == 0, done.stderr
        assert {span.span_id for span in receiver.spans} == told
        assert len(receiver.spans) == len(told) > 3


def test_refusing_collector_is_an_error(invoke: Invoke, shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with otlp_receiver() as receiver:
        receiver.refusing = True
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        result = invoke("runs", "trace", "order-41", "--export", "--storage", shop.root)
    assert result.exit_code == 1
    assert "run order-41: OTLPSpanExporter did not take" in result.stderr


def test_export_without_a_destination_is_usage(invoke: Invoke, shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)
    result = invoke("runs", "trace", "order-41", "--export", "--storage", shop.root)
    assert result.exit_code == 2
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in result.stderr
