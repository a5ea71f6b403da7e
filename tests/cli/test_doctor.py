"""`doctor`: the mistakes it finds, each beside its correct form, where settings come from, and what is advised."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.cli.doctor import misspelled, open_to_others
from pyworkflow_ray.cli.mistakes import find_mistakes
from pyworkflow_ray.cli.source import Source

Invoke = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import asyncio, random, subprocess, time, uuid, datetime as dt
import backoff, boto3, httpx, openai, requests, smtplib, stamina, tenacity
import numpy as np
from datetime import datetime
from requests.adapters import HTTPAdapter
import pyworkflow_ray as pw
from pyworkflow_ray import step, workflow
"""
LINES = HEAD.count("\n")


def mistakes(code: str) -> list[tuple[str, int]]:
    return [(one.rule, one.line - LINES) for one in find_mistakes(Source(Path("shop.py"), HEAD + code.lstrip("\n")))]


# Steps: the mistake with its line, and its correct forms --------------------------------------------------------------

NO_TIMEOUT = [
    "@step\ndef f(): return requests.get('u')",
    "@pw.step()\nasync def f():\n async with httpx.AsyncClient() as c: await c.get('u')",
    "@step(timeout=None)\ndef f(): return requests.get('u', timeout=None)",
    "@step\nasync def f(): await http().get('u')\nhttp = pw.resource(httpx.AsyncClient)",
    "@step\nasync def f(): await http().get('u')\nhttp = pw.resource(lambda: httpx.AsyncClient())",
    "@step\ndef f(): return ask('u')\ndef ask(u): return requests.get(u)",
    "@step\ndef f(): return client.chat()\nclient = openai.OpenAI(max_retries=0)",
    "@step(max_retries=1)\ndef f():\n with smtplib.SMTP('h') as s: s.noop()",
]
BOUNDED = [
    "@step(timeout='5s')\ndef f(): return requests.get('u')",
    "@step(total_timeout=9)\ndef f(): return requests.get('u')",
    "@step(**COMMON)\ndef f(): return requests.get('u')",
    "@step\ndef f(): return requests.get('u', timeout=3)",
    "@step\nasync def f():\n async with asyncio.timeout(3): await h().get('u')\nh = pw.resource(httpx.AsyncClient)",
    "@step\nasync def f(): await http().get('u')\nhttp = pw.resource(lambda: httpx.AsyncClient(timeout=5))",
    "@step\ndef f(x): return x + 1",
    "@step\ndef f(): raise httpx.ReadTimeout('as if')",
    "def f(): return requests.get('u')",  # no step
    "def get(u): ...\n@step\ndef f(): return get('u')",
    "@step  # doctor: ignore[no-timeout]\ndef f(): return requests.get('u')  # doctor: ignore",
]


@pytest.mark.parametrize("code", NO_TIMEOUT)
def test_a_call_over_the_network_that_nothing_bounds(code: str) -> None:
    assert [rule for rule, _ in mistakes(code)] == ["no-timeout"]


@pytest.mark.parametrize("code", BOUNDED[:-1])
def test_what_is_bounded_or_does_not_go_over_the_network(code: str) -> None:
    assert mistakes(code) == []


def test_a_comment_silences_one_rule() -> None:
    code = "@step\ndef f(): return requests.get('u')"
    assert mistakes(code) == [("no-timeout", 2)]
    assert mistakes(code + "  # doctor: ignore[no-timeout]") == []
    assert mistakes(code + "  # doctor: ignore") == []
    assert mistakes(code + "  # doctor: ignore[retry-in-retry]") == [("no-timeout", 2)]


TWICE = [
    "return requests.post('u', timeout=1)",
    "return CLIENT.post('u')",
    "db.execute('INSERT INTO t VALUES (1)')",
    "with open('ledger', 'a') as f: f.write('x')",
    "mailer.send_message('hello')",
]
ONCE = [
    "return requests.post('u', headers={'Idempotency-Key': pw.current_step().idempotency_key}, timeout=1)",
    "key = pw.current_step().fence; db.execute('INSERT INTO t VALUES (1)')",
    "db.execute('INSERT INTO t VALUES (1) ON CONFLICT DO NOTHING')",
    "db.execute('SELECT 1')",
    "with open('out', 'w') as f: f.write('x')",
    "return requests.get('u', timeout=1)",
]


@pytest.mark.parametrize("body", TWICE)
def test_retries_of_what_must_not_be_done_twice(body: str) -> None:
    assert mistakes(f"@step(max_retries=3, timeout=9)\ndef f(db, mailer):\n {body}") == [("retries-not-idempotent", 3)]
    assert mistakes(f"@step(max_retries=0, timeout=9)\ndef f(db, mailer):\n {body}") == []


@pytest.mark.parametrize("body", ONCE)
def test_what_may_be_done_twice(body: str) -> None:
    assert mistakes(f"@step(max_retries=3, timeout=9)\ndef f(db, mailer):\n {body}") == []


def test_a_step_that_says_it_is_not_idempotent_and_is_retried() -> None:
    assert mistakes("@step(max_retries=3, idempotent=False)\ndef f(): ...") == [("retries-not-idempotent", 2)]
    assert mistakes("@step(max_retries=None, idempotent=False)\ndef f(): ...") == [("retries-not-idempotent", 2)]
    assert mistakes("@step(max_retries=3, idempotent=False, retry_on=KeyError)\ndef f(): ...") == []
    assert mistakes("@step(idempotent=False)\ndef f(): ...") == []


INNER = [
    ("@step(max_retries=2)\n@tenacity.retry\ndef f(): ...", 2),
    ("@step(max_retries=2)\n@stamina.retry(on=OSError)\ndef f(): ...", 2),
    ("@step(max_retries=2)\ndef f(): ask()\n@backoff.on_exception(backoff.expo, OSError)\ndef ask(): ...", 3),
    ("@step(max_retries=2)\ndef f():\n for a in stamina.retry_context(on=OSError):\n  with a: ask()", 3),
    ("@step(max_retries=2)\ndef f():\n while True:\n  try: return ask()\n  except OSError: time.sleep(1)", 3),
    ("@step(max_retries=2)\ndef f():\n for i in range(3):\n  try:\n   ask(); break\n  except OSError: pass", 3),
    ("@step(max_retries=2)\ndef f(): g()\n@step(max_retries=2)\ndef g(): ...", 2),
    ("@step(max_retries=2, timeout=9)\ndef f(): c.chat()\nc = openai.OpenAI()", 3),
    ("@step(max_retries=2, timeout=9)\ndef f():\n s = requests.Session()\n s.mount('', HTTPAdapter(max_retries=3))", 4),
]
OUTER_ONLY = [
    "@step\n@tenacity.retry\ndef f(): ...",
    "@step(max_retries=2)\ndef f():\n for url in ('a', 'b'):\n  try: return ask(url)\n  except OSError: continue",
    "@step(max_retries=2)\ndef f(items):\n for i in items:\n  try: ask(i)\n  except OSError: continue",
    "@step(max_retries=2)\ndef f():\n while True:\n  if ask(): return\n  time.sleep(1)",
    "@step(max_retries=2)\ndef f(): g()\n@step\ndef g(): ...",
    "@step(max_retries=2, timeout=9)\ndef f(): c.chat()\nc = openai.OpenAI(max_retries=0)",
    "@step(max_retries=2)\ndef f():\n while True:\n  try: return ask()\n  except OSError: raise",
    "@step(max_retries=2)\ndef f(): ...\n@tenacity.retry\ndef other(): ...",
]


@pytest.mark.parametrize(("code", "line"), INNER)
def test_a_retry_inside_a_retry(code: str, line: int) -> None:
    assert mistakes(code) == [("retry-in-retry", line)]


@pytest.mark.parametrize("code", OUTER_ONLY)
def test_no_retry_inside_a_retry(code: str) -> None:
    assert mistakes(code) == []


# Workflows ------------------------------------------------------------------------------------------------------------

NOT_REPLAYABLE = [
    "time.sleep(1)", "requests.get('u')", "random.random()", "datetime.now()", "dt.date.today()", "time.time()",
    "uuid.uuid4()", "np.random.rand()", "open('f')", "subprocess.run(['ls'])", "await asyncio.gather(g(time.time()))",
    "x = [random.choice(y) for y in 'ab']", "helper()",
]  # fmt: skip
REPLAYABLE = [
    "await asyncio.sleep(1)", "await pw.sleep('1s')", "pw.random()", "pw.now()", "pw.uuid4()", "random.Random(7)",
    "await fetch()", "dt.timedelta(1)", "datetime.fromisoformat('2026-01-01')", "harmless()",
    "pw.get_logger().info('x')",
]  # fmt: skip
AROUND = """
def helper(): return datetime.now()
def harmless(): return 1
@step
def fetch(): return time.time()
@workflow
async def flow():
    {body}
"""


@pytest.mark.parametrize("body", NOT_REPLAYABLE)
def test_what_a_replay_would_do_otherwise(body: str) -> None:
    line = 1 if body == "helper()" else 7
    assert mistakes(AROUND.format(body=body)) == [("not-replayable", line)]


@pytest.mark.parametrize("body", REPLAYABLE)
def test_what_replays(body: str) -> None:
    assert mistakes(AROUND.format(body=body)) == []


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("notify('done')", True),
        ("print('done')", True),
        ("client.delete_index()", True),
        ("await clean()", False),
        ("await asyncio.gather(clean())", False),
        ("done.append(1)", False),
        ("log.info('done')", False),
        ("pw.current_run().on_failure(clean)", False),
        ("task.cancel()", False),
        ("x = 1", False),
    ],
)
def test_effects_in_finally(body: str, found: bool) -> None:
    code = f"@step\ndef clean(): ...\n@workflow\nasync def flow(client):\n try: await clean()\n finally:\n  {body}"
    assert mistakes(code) == ([("effects-in-finally", 7)] if found else [])
    assert mistakes(code.replace("@workflow\n", "")) == []  # an ordinary function's finally is its own affair


def test_a_workflows_own_loop_round_a_retried_step() -> None:
    code = """
@step({options})
def f(): ...
@workflow
async def flow():
    for attempt in range(3):
        try:
            return await f()
        except OSError:
            await pw.sleep(1)
"""
    assert mistakes(code.format(options="max_retries=2")) == [("retry-in-retry", 5)]
    assert mistakes(code.format(options="")) == []
    assert mistakes("@tenacity.retry\n@workflow\nasync def flow(): ...") == [("retry-in-retry", 1)]


# No false alarm -------------------------------------------------------------------------------------------------------


def examples() -> Iterator[tuple[str, str]]:
    for folder in ("pyworkflow_ray/demo", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    pages = set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs/mistakes.md"}  # makes each on purpose: test_mistakes
    for path in [ROOT / "README.md", *sorted(pages)]:
        for number, block in enumerate(re.findall(r"^```python\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S)):
            yield f"{path.relative_to(ROOT)}, block {number}", block
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
        for number, cell in enumerate(cells):
            yield f"{path.name}, cell {number}", re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", "".join(cell["source"]))


def test_our_own_examples_make_none_of_these_mistakes() -> None:
    found, functions = [], 0
    for name, text in examples():
        source = Source(Path(name), text)
        functions += sum(function.kind != "plain" for function in source.functions)
        found += [f"{one.where} {one.rule}: {one.message}" for one in find_mistakes(source)]
    assert not found, "\n".join(found)
    assert functions > 40


# The command ----------------------------------------------------------------------------------------------------------


def test_it_prints_settings_with_their_origin(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYWORKFLOW_POOL_MIN", "3")
    result = invoke("doctor", "--storage", tmp_path / "s", "--address", "local")
    assert result.exit_code == 0, result.stdout
    settings = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line and line[0] != " "}
    assert settings["storage"] == [str(tmp_path / "s"), "argument"]
    assert settings["pool_min"] == ["3", "PYWORKFLOW_POOL_MIN"]
    assert settings["log_level"] == ["INFO", "default"]
    assert "✓ storage: it does not exist yet" in result.stdout
    assert result.stdout.startswith("python 3.")
    assert not (tmp_path / "s").exists()


def test_a_module_is_read_and_not_run_and_mistakes_exit_with_1(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "docshop.py").write_text(
        HEAD + "@step\ndef f(): return requests.get('u')\nraise SystemExit('was run')\n"
    )
    (tmp_path / "broken.py").write_text("def f(:\n")
    arguments = ("doctor", "--storage", tmp_path / "s", "--address", "local", "--json")
    for named in ("docshop", "docshop:flow", "docshop.py"):
        result = invoke(*arguments, named)
        assert result.exit_code == 1
        (finding,) = json.loads(result.stdout)["findings"]
        assert (finding["rule"], finding["file"], finding["line"]) == ("no-timeout", "docshop.py", LINES + 2)
        assert finding["remedy"]
    result = invoke(*arguments, ".")
    assert {one["rule"] for one in json.loads(result.stdout)["findings"]} == {"no-timeout", "syntax"}
    result = invoke(*arguments[:-1], "docshop")
    assert f"docshop.py:{LINES + 2}: no-timeout\n  what  f calls requests.get" in result.stdout
    assert result.stdout.splitlines()[-1] == "1 mistake found"


def test_a_module_that_is_not_there_is_usage(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("doctor", "--storage", tmp_path / "s", "nosuchmodule")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "'nosuchmodule'" in result.stderr


def test_a_setting_that_can_not_be_read_does_not_hide_the_mistakes(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYWORKFLOW_POOL_MAX", "many")
    (tmp_path / "m.py").write_text(HEAD + "@step\ndef f(): return requests.get('u')\n")
    result = invoke("doctor", tmp_path / "m.py")
    assert result.exit_code == 1
    assert "PYWORKFLOW_POOL_MAX='many'" in result.stdout
    assert "no-timeout" in result.stdout


def test_a_misspelled_variable_is_told_of() -> None:
    (one,) = misspelled(["PYWORKFLOW_POOLMAX", "PYWORKFLOW_POOL_MAX", "PATH"])
    assert "PYWORKFLOW_POOLMAX is no setting" in one.message
    assert "PYWORKFLOW_POOL_MAX" in one.message


def test_a_storage_that_others_write_is_told_of(invoke: Invoke, empty: Any) -> None:
    arguments = ("doctor", "--storage", empty.root, "--address", "local")
    assert invoke(*arguments).exit_code == 0
    empty.root.chmod(0o777)
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert "can be written by other users" in result.stdout


@pytest.mark.parametrize(("host", "others"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_a_cluster_that_listens_for_others_is_told_of(host: str, others: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((host, 0)) as server:
        address = f"10.0.0.7:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        assert open_to_others(address) is others
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        assert open_to_others(address) is False
