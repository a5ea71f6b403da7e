"""`runs list|show|events|timeline` over a real storage, with no Ray: what is printed, where, and the exit codes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability.model import RunView

FIXED = "schema run_id workflow version status state created_at steps result error next".split()
Invoke = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]


def rows(text: str) -> list[str]:
    return text.splitlines()


def test_list_shows_every_run_newest_first(invoke: Invoke, shop: Any) -> None:
    result = invoke("runs", "list", "--storage", shop.root)
    assert result.exit_code == 0
    head, *body, total = rows(result.stdout)
    assert head.split() == ["RUN", "WORKFLOW", "STATE", "STEP", "WHY", "NEXT", "AGE"]
    assert [row.split()[0] for row in body] == ["order-42", "order-41", "order-39", "order-40"]
    assert "⟳ retrying 4/6  charge  ConnectionError: 503 from payments  attempt 5 in 3m 1" in body[0]
    assert "✗ failed        charge  CardDeclined: insufficient funds" in body[1]
    assert "✓ completed" in body[2]
    assert "⏸ parked        –       sleeps" in body[3]
    assert "wakes in 1d 2" in body[3]
    assert total.startswith("4 runs: 1 retrying, 1 failed, 1 completed, 1 parked")
    assert "runs show order-42 · runs list --retrying" in total


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["--retrying"], ["order-42"]),
        (["--failed"], ["order-41"]),
        (["--failed", "--parked"], ["order-41", "order-40"]),
        (["--status", "completed"], ["order-39"]),
        (["--status", "running"], ["order-42"]),
        (["--stuck"], []),
        (["--since", "10m"], ["order-42", "order-41"]),
        (["--workflow", "checkout"], ["order-42", "order-41", "order-39", "order-40"]),
        (["--workflow", "shop.flows:checkout", "--limit", "1"], ["order-42"]),
        (["--workflow", "other"], []),
        (["--filter", "customer=acme"], ["order-41"]),
        (["--filter", "state=retrying"], ["order-42"]),
        (["--filter", "customer=other"], []),
    ],
)
def test_list_filters(invoke: Invoke, shop: Any, filters: list[str], expected: list[str]) -> None:
    result = invoke("runs", "list", *filters, "--json", "--storage", shop.root)
    assert [view["run_id"] for view in json.loads(result.stdout)] == expected


def test_pages_follow_each_other(invoke: Invoke, shop: Any) -> None:
    """Each page says how the next one is asked for; together they are the whole list."""
    whole = json.loads(invoke("runs", "list", "--json", "--storage", shop.root).stdout)
    pages: list[str] = []
    for _ in whole:
        after = ["--before", pages[-1]] if pages else []
        result = invoke("runs", "list", "--limit", 1, *after, "--json", "--storage", shop.root)
        pages += [view["run_id"] for view in json.loads(result.stdout)]
        people = invoke("runs", "list", "--limit", 1, *after, "--storage", shop.root).stdout
        assert (f"(older ones: --before {pages[-1]})" in people) == (len(pages) < len(whole))
    assert pages == [view["run_id"] for view in whole]
    assert invoke("runs", "list", "--before", "nobody", "--storage", shop.root).exit_code == 1


@pytest.mark.parametrize("bad", [["--filter", "x"], ["--filter", "state=odd"], ["--since", "5M"], ["--limit", "0"]])
def test_wrong_filters_are_usage(invoke: Invoke, shop: Any, bad: list[str]) -> None:
    result = invoke("runs", "list", *bad, "--storage", shop.root)
    assert (result.exit_code, result.stdout, len(rows(result.stderr))) == (2, "", 1)


def test_show_answers_verdict_why_next(invoke: Invoke, shop: Any) -> None:
    result = invoke("runs", "show", "order-42", "--utc", "--storage", shop.root)
    assert result.exit_code == 0
    title, verdict, why, next_, given, head, *steps, do = rows(result.stdout)
    assert title.startswith("order-42  checkout v3")
    assert "UTC, 7m 1" in title
    assert verdict.startswith("⟳ retrying  charge, attempt 4 of 6 failed 1")
    assert why == "  why   transient · ConnectionError: 503 from payments   (same error 4×)   shop/pay.py:31 in charge"
    assert next_.startswith("  next  attempt 5 in 3m 1")
    assert given == '  in    order_id="order-42"'
    assert head.split() == ["STEP", "STATE", "TRIES", "LOST", "TOOK", "OUTCOME"]
    assert len(steps) == 2
    assert do == "do     runs timeline order-42 · runs events order-42 --step 2 · runs cancel order-42"


def test_show_of_one_step_gives_every_attempt_with_its_delay(invoke: Invoke, shop: Any) -> None:
    text = invoke("runs", "show", "order-42", "--step", 2, "--storage", shop.root).stdout
    for delay in ("30s backoff", "1m backoff", "2m backoff", "3m 26s backoff"):
        assert delay in text
    assert "retries 5, delay 30s × 2" in text


def test_show_of_a_missing_step_names_those_there_are(invoke: Invoke, shop: Any) -> None:
    result = invoke("runs", "show", "order-42", "--step", 9, "--storage", shop.root)
    assert (result.exit_code, result.stderr) == (1, "error: run order-42 has no step 9: it has steps 1 to 2\n")


def test_events_lists_the_log(invoke: Invoke, shop: Any) -> None:
    lines = rows(invoke("runs", "events", "order-41", "--storage", shop.root).stdout)
    kinds = [line.split()[2] for line in lines[1:-1]]
    assert kinds == ["run_created", "run_activated", "step_scheduled", "attempt_failed", "step_failed", "run_failed"]
    only = rows(invoke("runs", "events", "order-41", "--step", 1, "--storage", shop.root).stdout)
    assert len(only) == len(lines) - 2
    events = json.loads(invoke("runs", "events", "order-41", "--json", "--storage", shop.root).stdout)
    assert [event["seq"] for event in events] == list(range(6))


def test_timeline_draws_a_row_a_step(invoke: Invoke, shop: Any) -> None:
    lines = rows(invoke("runs", "timeline", "order-42", "--storage", shop.root).stdout)
    charge = next(line for line in lines if line.startswith("2 charge"))
    assert charge.count("▓") == 4
    assert "- -> 5" in charge


def test_json_is_one_view_with_the_fixed_fields(invoke: Invoke, shop: Any) -> None:
    for run_id in ("order-39", "order-40", "order-41", "order-42"):
        view = json.loads(invoke("runs", "show", run_id, "--json", "--storage", shop.root).stdout)
        assert set(FIXED) <= set(view)
        assert view["schema"] == 1
        assert view["run_id"] == run_id
        assert RunView.model_validate(view).model_dump(mode="json") == view
    done = json.loads(invoke("runs", "show", "order-39", "--json", "--storage", shop.root).stdout)
    assert (done["result"], done["error"], done["status"]) == ({"total": 1999}, None, "completed")


def test_json_is_valid_against_its_own_schema(invoke: Invoke, shop: Any) -> None:
    import jsonschema

    schema = RunView.model_json_schema(by_alias=True)
    for view in json.loads(invoke("runs", "list", "--json", "--storage", shop.root).stdout):
        jsonschema.validate(view, schema)


@pytest.mark.parametrize("command", ["show", "events", "timeline", "cancel", "resume"])
def test_unknown_run_is_one_line_and_exit_1(invoke: Invoke, shop: Any, command: str) -> None:
    result = invoke("runs", command, "order-99", "--storage", shop.root)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: no run 'order-99' in {shop.root}\n"


def test_impossible_run_id_is_usage(invoke: Invoke, shop: Any) -> None:
    result = invoke("runs", "show", "../../etc", "--storage", shop.root)
    assert (result.exit_code, result.stdout, len(rows(result.stderr))) == (2, "", 1)


def test_missing_storage_is_named(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "nowhere"
    result = invoke("runs", "list", "--storage", missing)
    assert result.exit_code == 1
    assert str(missing) in result.stderr
    assert not missing.exists()
    monkeypatch.setenv("PYWORKFLOW_STORAGE", str(missing))
    result = invoke("runs", "list")
    assert (result.exit_code, result.stdout) == (0, "no runs\n")
    assert json.loads(invoke("runs", "list", "--json").stdout) == []
    assert invoke("runs", "show", "order-1").exit_code == 1
    assert not missing.exists()


def test_storage_from_the_environment(invoke: Invoke, shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYWORKFLOW_STORAGE", str(shop.root))
    assert invoke("runs", "show", "order-42").exit_code == 0


# Damage ------------------------------------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_damaged_run_is_named_and_hides_no_other(invoke: Invoke, shop: Any) -> None:
    path = shop.journal_of("order-41")
    flip(path, 200)
    result = invoke("runs", "list", "--storage", shop.root)
    assert result.exit_code == 1
    assert [row.split()[0] for row in rows(result.stdout)[1:-1]] == ["order-42", "order-39", "order-40"]
    assert "order-41" in result.stderr
    assert str(path.parent) in result.stderr
    result = invoke("runs", "list", "--json", "--storage", shop.root)
    assert (result.exit_code, len(json.loads(result.stdout))) == (1, 3)
    for command in ("show", "events", "timeline"):
        result = invoke("runs", command, "order-41", "--storage", shop.root)
        assert (result.exit_code, result.stdout, len(rows(result.stderr))) == (1, "", 1)
        assert "order-41" in result.stderr


def test_empty_journal_is_damage(invoke: Invoke, shop: Any) -> None:
    shop.journal_of("order-42").write_bytes(b"")
    result = invoke("runs", "show", "order-42", "--storage", shop.root)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "order-42" in result.stderr


def test_torn_tail_shows_the_prefix_and_says_so(invoke: Invoke, shop: Any) -> None:
    path = shop.journal_of("order-42")
    path.write_bytes(path.read_bytes()[:-30])
    result = invoke("runs", "show", "order-42", "--storage", shop.root)
    assert result.exit_code == 0
    assert "torn" in result.stdout
    view = json.loads(invoke("runs", "show", "order-42", "--json", "--storage", shop.root).stdout)
    assert view["notes"]
    assert [a["attempt"] for a in view["steps"][1]["attempts"]] == [1, 2, 3]


def test_run_whose_owner_died_is_stuck_and_recover_is_named(invoke: Invoke, shop: Any) -> None:
    assert "retrying" in invoke("runs", "show", "order-42", "--storage", shop.root).stdout
    shop.lease.close()
    text = invoke("runs", "show", "order-42", "--storage", shop.root).stdout
    assert "! stuck, its owner is gone" in text
    assert "pyworkflow-ray recover" in text
    assert [
        v["run_id"] for v in json.loads(invoke("runs", "list", "--stuck", "--json", "--storage", shop.root).stdout)
    ] == ["order-42"]
    assert not list(shop.root.glob("leases/*.dead")), "reading marks nothing"


# The stream --------------------------------------------------------------------------------------------------------


def test_off_a_terminal_nothing_is_cut_or_coloured(command: Invoke, empty: Any) -> None:
    run_id = "a" * 128
    empty.run(run_id, (5, ev.RunActivated(epoch=0)), (4, ev.RunCancelled(reason="because " * 40)), finish=True)
    for arguments in (["runs", "list"], ["runs", "show", run_id]):
        out = command(*arguments, "--storage", empty.root, COLUMNS="40").stdout.decode()
        assert run_id in out
        assert ("because " * 40).strip() in out
        assert "\x1b" not in out


def test_ascii_stream_gets_ascii_twins(command: Invoke, shop: Any) -> None:
    for arguments in (["list"], ["show", "order-42"], ["timeline", "order-42"], ["show", "order-42", "--step", "2"]):
        done = command("runs", *arguments, "--storage", shop.root, PYTHONIOENCODING="ascii:strict")
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.isascii()
    assert b"~ retrying" in command("runs", "show", "order-42", "--storage", shop.root, PYTHONIOENCODING="ascii").stdout


def test_forced_colour_and_no_colour(command: Invoke, shop: Any) -> None:
    forced = command("runs", "list", "--storage", shop.root, FORCE_COLOR="1").stdout.decode()
    assert "\x1b[" in forced
    assert "ConnectionError: 503 from payments" in forced, "coloured, yet still not cut"
    both = command("runs", "list", "--storage", shop.root, FORCE_COLOR="1", NO_COLOR="1").stdout
    assert b"\x1b" not in both


def test_json_is_ascii_whatever_the_stream(command: Invoke, empty: Any) -> None:
    empty.run("r", (5, ev.RunActivated(epoch=0)), (4, ev.RunCancelled(reason="é✓")), finish=True)
    done = command("runs", "show", "r", "--json", "--storage", empty.root, PYTHONIOENCODING="ascii:strict")
    assert done.stdout.isascii()
    assert json.loads(done.stdout)["why"] == "é✓"


def test_control_characters_of_others_do_not_reach_the_terminal(command: Invoke, empty: Any) -> None:
    empty.run("r", (5, ev.RunActivated(epoch=0)), (4, ev.RunCancelled(reason="\x1b[2Jgone\x07")), finish=True)
    for arguments in (["list"], ["show", "r"], ["events", "r"]):
        done = command("runs", *arguments, "--storage", empty.root)
        assert b"\x1b[2J" not in done.stdout
        assert b"\x07" not in done.stdout
        assert done.returncode == 0


def test_reader_that_has_enough_ends_us_quietly(shop: Any) -> None:
    script = f"{sys.executable} -m pyworkflow_ray runs events order-42 --storage {shop.root} | true"
    done = subprocess.run(
        ["bash", "-c", script + '; echo "${PIPESTATUS[0]}"'],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == b""
    assert done.stdout.strip() == b"0"


def on_terminal(arguments: list[str], columns: int, **environment: str) -> str:
    """The output of a command whose stdout is a terminal of so many columns."""
    parent, child = pty.openpty()
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "pyworkflow_ray", *arguments],
        stdout=child,
        stderr=subprocess.PIPE,
        env={**kept, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": str(columns), **environment},
    )
    os.close(child)
    chunks = []
    while True:
        try:
            chunk = os.read(parent, 65536)
        except OSError:  # the terminal is closed when the command ends
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(parent)
    assert process.wait(timeout=60) == 0
    return b"".join(chunks).decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [80, 120])
def test_terminal_gets_a_table_that_fits_and_ids_that_are_whole(shop: Any, columns: int) -> None:
    import re

    coloured = on_terminal(["runs", "list", "--storage", str(shop.root)], columns)
    assert "\x1b[" in coloured
    lines = re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["order-42", "order-41", "order-39", "order-40"]
    assert all(len(line.rstrip()) <= columns for line in lines[:5])
    assert ("ConnectionError: 503 from payments" in lines[1]) is (columns == 120)
    plain = on_terminal(["runs", "list", "--storage", str(shop.root)], columns, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3\dm", plain), "no colours"


def test_watched_run_that_has_ended_is_drawn_once(invoke: Invoke, shop: Any) -> None:
    result = invoke("runs", "show", "order-41", "--watch", "--storage", shop.root)
    assert (result.exit_code, result.stdout.count("failed in charge")) == (0, 1)
