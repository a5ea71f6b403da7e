"""What a run looks like to people and to tracing: projections of its events.

`view.explain` (pure) makes the `RunView` that the command line, notebooks and `--json` render; `spans` (the only room
with opentelemetry) makes the trace. Nothing here writes to a run.
"""
