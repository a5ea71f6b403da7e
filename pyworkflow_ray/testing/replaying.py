"""Replays a recorded history against the code as it is now. Called by `WorkflowEnv.replay`; executes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyworkflow_ray.connection import codec_of
from pyworkflow_ray.engine.events import Event, RunCreated, event_adapter
from pyworkflow_ray.engine.history import History
from pyworkflow_ray.engine.machine import Machine
from pyworkflow_ray.errors import ConfigurationError, NonDeterminismError
from pyworkflow_ray.execution.code import load_workflow
from pyworkflow_ray.handle import RunHandle

if TYPE_CHECKING:
    from pyworkflow_ray.testing.environment import WorkflowEnv


def replay(env: WorkflowEnv, history: Any, flow: Any = None) -> None:
    """See `WorkflowEnv.replay`."""
    codec: Any = env.codec
    if isinstance(history, RunHandle):
        codec = codec_of(history._storage)
    events = _events(history)
    state = History.of(events)
    created = state.created
    assert created is not None
    code = flow.fn if flow is not None else load_workflow(created.code, codec.for_code().get_code).fn
    machine = Machine(code, created, codec)
    try:
        machine.replay(state.script, state.first_activated_at or created.at)
    except (NonDeterminismError, ConfigurationError):
        raise
    except Exception as error:
        raise ConfigurationError(
            f"the history of run {created.run_id!r} can't be followed here: {type(error).__name__}: {error}. A large "
            "value lies beside the events in the storage: give the run's handle, pw.get_run(run_id), not its events"
        ) from error
    finally:
        machine.evict()


def _events(history: Any) -> list[Event]:
    if isinstance(history, RunHandle):
        found = history.events()
    elif isinstance(history, (str, os.PathLike)):
        found = _read(Path(history))
    else:
        found = list(history)
    found = [event if isinstance(event, Event) else event_adapter.validate_python(event) for event in found]
    if not found or not isinstance(found[0], RunCreated):
        first = "it is empty" if not found else f"it begins with {found[0].type}"
        raise ConfigurationError(f"this is no run's history: {first}, not with run_created")
    return found


def _read(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    try:
        loaded = json.loads(text)
    except ValueError:
        try:
            loaded = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise ConfigurationError(f"{path} holds no JSON: {error}") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("events"), list):
        loaded = loaded["events"]
    if not isinstance(loaded, list):
        raise ConfigurationError(f"{path} holds no list of events: write it with `runs events RUN_ID --json`")
    return loaded
