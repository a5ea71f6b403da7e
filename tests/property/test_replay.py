"""A random program, replayed from any prefix of its log, gives the same commands and the same result."""

from __future__ import annotations

import json
import random
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from pyworkflow_ray.engine.events import COMMANDS, INPUTS, Event, RunActivated, RunCompleted, event_adapter
from pyworkflow_ray.engine.history import History
from pyworkflow_ray.engine.machine import Machine
from pyworkflow_ray.storage.codec import StorageCodec
from pyworkflow_ray.testing.blobs import MemoryBlobs
from pyworkflow_ray.testing.programs import World, expected, generate, interpret
from pyworkflow_ray.testing.simulator import Faults, Simulator


def _recorded(seed: int, faults: Faults | None = None) -> tuple[list[Event], int]:
    program = ["seq", [generate(random.Random(seed), depth=3)]]
    simulation = Simulator(interpret, World().steps(), args=(program,), seed=seed, faults=faults).run()
    assert isinstance(simulation.ended, RunCompleted), f"seed {seed}: {simulation.ended}"
    assert simulation.ended.result.data == expected(program), f"seed {seed}"
    return simulation.events, expected(program)


def _brief(event: Event) -> str:
    return f"{event.type}@{getattr(event, 'position', '')}"


def commands_after(events: list[Event], cut: int) -> list[str]:
    """Replay the first `cut` events of the script, deliver the rest, and give the commands that came out."""
    history = History.of(events)
    script = history.script
    machine = Machine(interpret, history.created, StorageCodec(MemoryBlobs()))
    fresh = machine.replay(script[:cut], history.first_activated_at)
    for event in script[cut:]:
        if isinstance(event, INPUTS):
            fresh += machine.deliver(event)
    machine.evict()
    return [_brief(e) for e in fresh]


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_replay_from_any_prefix_gives_the_recorded_commands(seed):
    events, _ = _recorded(seed)
    script = History.of(events).script
    cuts = range(len(script)) if len(script) < 25 else random.Random(seed).sample(range(len(script)), 25)
    for cut in cuts:
        recorded = [_brief(e) for e in script[cut:] if isinstance(e, COMMANDS)]
        assert commands_after(events, cut) == recorded, f"seed {seed}, cut {cut}"


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_a_run_that_crashed_all_the_time_ends_with_the_crash_free_result(seed):
    _, result = _recorded(seed)
    events, crashed = _recorded(seed, Faults(crash=0.15, lost=0.1, duplicate=0.3))
    assert crashed == result
    assert sum(isinstance(e, RunActivated) for e in events) >= 1


IN_ANOTHER_PROCESS = """
import sys, json
import decimal, fractions, xml.dom.minidom, http.server, sqlite3, email.mime.text  # other imports, other addresses
ballast = [object() for _ in range(int(sys.argv[1]))]
sys.path.insert(0, sys.argv[2])
from test_replay import commands_after
from pyworkflow_ray.engine.events import event_adapter
for line in sys.stdin:
    events = [event_adapter.validate_json(json.dumps(e)) for e in json.loads(line)]
    print(json.dumps(commands_after(events, 0)))
"""


def test_replay_in_fresh_processes_with_other_imports_gives_the_same_commands(tmp_path):
    histories = [_recorded(seed)[0] for seed in range(60)]
    lines = "\n".join(json.dumps([json.loads(e.model_dump_json()) for e in events]) for events in histories)
    here = str(__import__("pathlib").Path(__file__).parent)
    for ballast in ("0", "12345"):
        done = subprocess.run(
            [sys.executable, "-c", IN_ANOTHER_PROCESS, ballast, here],
            input=lines,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        for seed, (events, answer) in enumerate(zip(histories, answers, strict=True)):
            recorded = [_brief(e) for e in History.of(events).script if isinstance(e, COMMANDS)]
            assert answer == recorded, f"seed {seed}"


def test_events_survive_their_json_form():
    for event in _recorded(11)[0]:
        assert event_adapter.validate_json(event.model_dump_json()) == event
