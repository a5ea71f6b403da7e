"""`runs trace`: a run's trace from its log alone, shown or exported. No Ray, no collector that was up at the time.

Faults: as all commands that read; an exporter that is not asked for, not installed or refuses (1, and which).
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import click

from pyworkflow_ray.cli import options as opt
from pyworkflow_ray.cli.reading import open_reader
from pyworkflow_ray.cli.screen import Screen, error_line, note_line, to_json
from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.engine.events import RunCreated
from pyworkflow_ray.observability.spandata import SpanData
from pyworkflow_ray.observability.trace import parent_of, trace_spans


@click.command()
@click.argument("run_id")
@click.option(
    "--export", is_flag=True, help="Send it to where OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_TRACES_EXPORTER) says."
)
@opt.json_option
@opt.storage_option
def trace(run_id: str, export: bool, as_json: bool, storage_path: Path | None) -> int:
    """Rebuild a run's trace from its log: the same spans, with the same ids, that are exported as it goes on.

    Only spans that have ended are in it. Spans that a step's own code made are not: they are no part of the log.
    """
    reader, screen = open_reader(storage_path, opt.zone(False)), Screen()
    view, events = reader.read(run_id)
    spans = trace_spans(events)
    if export:
        return _export(run_id, spans)
    if as_json:
        screen.raw(to_json([asdict(span) for span in spans]))
        screen.flush()
        for note in view.notes:
            error_line(note)
        return 0
    created = events[0]
    assert isinstance(created, RunCreated)
    screen.line(f"trace {view.trace_id}  {len(spans)} spans" + ("" if view.ended_at else ", and it goes on"))
    _draw(screen, spans, parent_of(created), created.at)
    screen.flush()
    return 0


def _draw(screen: Screen, spans: list[SpanData], caller: str | None, began_at: float) -> None:
    known = {span.span_id for span in spans}
    below: dict[str | None, list[SpanData]] = defaultdict(list)
    for span in spans:
        below[span.parent_id if span.parent_id in known else None].append(span)

    def draw(parent: str | None, depth: int) -> None:
        for span in sorted(below[parent], key=lambda one: (one.start, one.end)):
            start, took = span.start / 1e9 - began_at, (span.end - span.start) / 1e9
            mark = {"ok": "✓", "error": "✗", "unset": " "}[span.status]
            text = f"{'  ' * depth}{span.name}"
            line = (
                f"{span.span_id}  +{format_duration(round(max(0.0, start), 3)):<9} {format_duration(round(took, 3)):>9}"
            )
            screen.line(f"{line} {mark} {text}" + (f"  {span.description}" if span.description else ""))
            draw(span.span_id, depth + 1)

    draw(None, 0)
    if caller is not None:
        note_line(f"the run's own span hangs from the caller's, {caller}")


def _export(run_id: str, spans: list[SpanData]) -> int:
    from pyworkflow_ray.observability.otel_settings import signals
    from pyworkflow_ray.observability.spans import default_resource, make_exporters, readable, send

    asked = signals(os.environ).traces
    if not asked:
        raise click.UsageError("--export: nothing says whither: set OTEL_EXPORTER_OTLP_ENDPOINT=http://HOST:4318")
    resource = default_resource()
    for name, exporter in zip(asked, make_exporters(asked, os.environ), strict=True):
        try:
            send([readable(span, resource) for span in spans], exporter)
        except RuntimeError as error:
            raise click.ClickException(f"run {run_id}: {error}") from None
        finally:
            exporter.shutdown()
        note_line(f"run {run_id}: {len(spans)} spans exported ({name})")
    return 0
