"""Code that travels: found by import, by registered name, or by value; proven in processes of their own.

A script run as `__main__` makes a snapshot and ends. A worker process with other imports loads it and runs steps; a
third process runs the flow, whose `except` must catch what the worker's step raised.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.engine.events import CodeRef, Payload
from pyworkflow_ray.execution.code import describe_step, describe_workflow, load_step, load_workflow, local_code
from pyworkflow_ray.execution.snapshot import dump_workflow, load

ROOT = Path(__file__).resolve().parents[3]

SCRIPT = """
from __future__ import annotations
import json, sys
from dataclasses import dataclass
from pathlib import Path
from pydantic import BaseModel
import neighbour
import pyworkflow_ray as pw
from pyworkflow_ray.execution.code import describe_workflow
from pyworkflow_ray.execution.environment import capture_environment

class Order(BaseModel):
    amount: int

@dataclass
class Receipt:
    total: int

class Declined(Exception):
    def __init__(self, *, code):
        super().__init__(f"declined with {code}")
        self.code = code

class Worse(Declined):
    pass

@pw.step(max_retries=2, retry_on=Declined)
def charge(order: Order) -> Receipt:
    if order.amount > 100:
        raise Worse(code=order.amount)
    return Receipt(order.amount + neighbour.FEE)

def adder(n):
    def add(x: int) -> int:
        return x + n
    return add

ADD = {n: pw.step(name=f"add-{n}")(adder(n)) for n in (1, 2)}
twin_a, twin_b = pw.step(adder(10)), pw.step(adder(20))
patient = charge.options(max_retries=9)
stubborn = charge.options(retry_on=OSError)

@pw.step
def countdown(n: int) -> list[int]:
    return [n] + (countdown.fn(n - 1) if n else [])

@pw.workflow
async def flow(order: Order) -> list:
    said = []
    for step in (charge, patient, stubborn):
        try:
            said.append((await step(order)).total)
        except Declined as error:
            said.append([type(error).__name__, error.code, isinstance(error, Worse)])
    said += [await ADD[1](1), await ADD[2]("1"), await twin_a(0), await twin_b(0), await countdown(2)]

    @pw.step
    def late(x):
        if x:
            raise Declined(code=x)
        return order.amount

    said.append(await late(0))
    try:
        await late(5)
    except Declined as error:
        said.append(error.code)
    return said

if __name__ == "__main__":
    out = Path(sys.argv[1])
    def put(data):
        (out / "snapshot").write_bytes(data)
        return "snapshot"
    code = describe_workflow(flow.definition, put)
    (out / "code.json").write_text(code.model_dump_json())
    (out / "env.json").write_text(capture_environment().model_dump_json())
"""

# What both other processes do first: other imports, other __main__, the environment, the storage's codec.
COMMON = """
import decimal, json, socketserver, sys, xml.dom
from pathlib import Path
from pyworkflow_ray.engine.events import CodeEnvironment, CodeRef, ErrorInfo, Payload
from pyworkflow_ray.execution.code import load_step, load_workflow
from pyworkflow_ray.execution.environment import enter_environment
from pyworkflow_ray.storage.codec import StorageCodec

class Blobs:
    def put_blob(self, data): raise AssertionError("nothing here is that large")
    def get_blob(self, ref): return (out / ref).read_bytes()

out = Path(sys.argv[1])
assert enter_environment(CodeEnvironment.model_validate_json((out / "env.json").read_text())) == []
blobs = Blobs()
codec = StorageCodec(blobs)
"""

WORKER = (
    COMMON
    + """
for line in sys.stdin:
    asked = json.loads(line)
    definition = load_step(CodeRef.model_validate(asked["code"]), blobs.get_blob, codec.decode)
    args = [codec.decode(Payload.model_validate(arg)) for arg in asked["args"]]
    try:
        answer = {"value": codec.encode(definition.fn(*args)).model_dump()}
    except Exception as error:
        answer = {"error": codec.encode_error(error, "transient").model_dump()}
    print(json.dumps(answer), flush=True)
"""
)

FLOW = (
    COMMON
    + """
import subprocess
import pyworkflow_ray.step
command = [sys.executable, sys.argv[2], str(out)]
worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
hows = []

class Engine:
    async def call_step(self, request):
        hows.append(request.code.how)
        args = [codec.encode(value).model_dump() for value in request.args]
        worker.stdin.write(json.dumps({"code": request.code.model_dump(), "args": args}) + "\\n")
        worker.stdin.flush()
        answer = json.loads(worker.stdout.readline())
        if "value" in answer:
            return codec.decode(Payload.model_validate(answer["value"]))
        raise codec.decode_error(ErrorInfo.model_validate(answer["error"]))

engine = Engine()
sys.modules["pyworkflow_ray.step"].current_workflow = lambda: engine  # this process is all there is of an engine

flow = load_workflow(CodeRef.model_validate_json((out / "code.json").read_text()), blobs.get_blob)
results = []
for amount in json.loads(sys.argv[3]):
    args, _ = flow.validate(({"amount": amount},), {})
    running = flow.fn(*args)
    try:
        running.send(None)
    except StopIteration as stop:
        results.append(stop.value)
worker.stdin.close()
worker.wait()
print(json.dumps({"results": results, "hows": hows}))
"""
)


def run(*command: str, cwd: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_script_as_main_travels_with_its_classes_to_two_other_processes(tmp_path: Path) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    (project / "neighbour.py").write_text("FEE = 7\n")
    (project / "script.py").write_text(SCRIPT)
    (elsewhere / "worker.py").write_text(WORKER)
    (elsewhere / "flow.py").write_text(FLOW)

    run("script.py", str(tmp_path), cwd=project)
    code = CodeRef.model_validate_json((tmp_path / "code.json").read_text())
    assert (code.how, code.ref, code.name) == ("snapshot", "snapshot", "__main__:flow")
    said = json.loads(run("flow.py", str(tmp_path), "worker.py", json.dumps([5, "500"]), cwd=elsewhere))

    assert said["results"] == [
        [12, 12, 12, 2, 3, 10, 20, [2, 1, 0], 5, 5],
        [["Worse", 500, True]] * 3 + [2, 3, 10, 20, [2, 1, 0], 500, 5],
    ]
    assert said["hows"] == (["snapshot"] * 8 + ["value"] * 2) * 2


def test_module_under_the_import_roots_goes_by_reference_even_from_a_script(tmp_path: Path) -> None:
    (tmp_path / "shop_code.py").write_text(
        "import threading, pyworkflow_ray as pw\nlock = threading.Lock()\n"
        "@pw.step\ndef charge():\n    return lock\n"
        "@pw.workflow\nasync def flow():\n    return await charge()\n"
    )
    (tmp_path / "script.py").write_text(
        textwrap.dedent(
            """
            import shop_code, pyworkflow_ray as pw
            from pyworkflow_ray.execution.code import describe_step, describe_workflow
            @pw.workflow
            async def outer():
                return await shop_code.charge(), careful
            careful = shop_code.charge.options(retry_on=OSError)
            print(describe_workflow(shop_code.flow.definition, lambda data: 1 / 0).model_dump_json())
            print(describe_step(shop_code.charge.options(max_retries=4).definition).model_dump_json())
            print(describe_workflow(outer.definition, lambda data: "ref").how, describe_step(careful.definition).how)
            """
        )
    )
    flow, charge, hows = run("script.py", cwd=tmp_path).splitlines()
    assert CodeRef.model_validate_json(flow) == CodeRef(
        how="import", name="shop_code:flow", module="shop_code", qualname="flow"
    )
    assert CodeRef.model_validate_json(charge).how == "import"
    assert hows == "snapshot value"


def test_script_that_cannot_be_shipped_names_the_global_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        textwrap.dedent(
            """
            import threading, pyworkflow_ray as pw
            from pyworkflow_ray.execution.code import describe_workflow
            class Client:
                def __init__(self): self.lock = threading.Lock()
            client = Client()
            @pw.step
            def charge(): return client
            @pw.workflow
            async def flow(): return await charge()
            try:
                describe_workflow(flow.definition, lambda data: "ref")
            except pw.ConfigurationError as error:
                print(error)
            """
        )
    )
    said = run("script.py", cwd=tmp_path)
    for word in ("global 'client'", "__main__.Client", "charge", "script.py:", "client = pw.resource(", "lock"):
        assert word in said


# In this process ----------------------------------------------------------------------------------------------------


def put_into(blobs: dict[str, bytes]) -> Any:
    def put(data: bytes) -> str:
        blobs[ref := hashlib.sha256(data).hexdigest()] = data
        return ref

    return put


def test_variable_of_the_enclosing_function_is_named_too() -> None:
    lock = threading.Lock()

    @pw.workflow
    async def flow() -> Any:
        return lock

    with pytest.raises(pw.ConfigurationError, match=r"variable 'lock' \(_thread\.lock\).*lock = pw\.resource"):
        describe_workflow(flow.definition, put_into({}))


def test_function_local_flow_and_its_steps_share_one_snapshot_and_their_classes() -> None:
    class Boom(Exception): ...

    @pw.step
    def fail() -> None:
        raise Boom

    @pw.workflow
    async def flow() -> type:
        return Boom if fail else ValueError

    blobs: dict[str, bytes] = {}
    code = describe_workflow(flow.definition, put_into(blobs))
    loaded = load_workflow(code, blobs.__getitem__)
    step = load_step(
        CodeRef(how="snapshot", name=fail.definition.name, ref=code.ref), blobs.__getitem__, lambda p: None
    )
    assert loaded is not flow.definition
    with pytest.raises(StopIteration) as caught:
        loaded.fn().send(None)
    with pytest.raises(caught.value.value):
        step.fn()
    assert describe_step(step) == CodeRef(how="snapshot", name=fail.definition.name, ref=code.ref)


def test_changed_global_makes_a_new_snapshot_and_an_unchanged_one_none() -> None:
    space: dict[str, Any] = {"__name__": "__main__", "pw": pw}
    source = "@pw.step\ndef f(): return {0}\n"
    exec(source.format(1) + "@pw.workflow\nasync def flow(): return await f()", space)
    blobs: dict[str, bytes] = {}
    flow = space["flow"].definition
    first = describe_workflow(flow, put_into(blobs)).ref or ""
    data = blobs[first]
    assert describe_workflow(flow, put_into(blobs)).ref == first
    assert blobs[first] is data
    exec(source.format(2), space)  # the cell with the step is run again, the one with the flow is not
    second = describe_workflow(flow, put_into(blobs)).ref or ""
    assert [load(blobs[ref]).steps["__main__:f"].fn() for ref in (first, second)] == [1, 2]


@pytest.mark.parametrize("change", ["LIMITS.append(2)", "LIMITS[0] = 9", "LIMITS = [1, 2]"])
def test_global_changed_in_place_makes_a_new_snapshot(change: str) -> None:
    space: dict[str, Any] = {"__name__": "__main__", "pw": pw, "LIMITS": [1]}
    exec("@pw.workflow\nasync def flow(): return LIMITS", space)
    blobs: dict[str, bytes] = {}
    describe_workflow(space["flow"].definition, put_into(blobs))
    exec(change, space)
    ref = describe_workflow(space["flow"].definition, put_into(blobs)).ref or ""
    loaded = load(blobs[ref]).definition.fn
    assert loaded.__globals__["LIMITS"] == space["LIMITS"]


def test_snapshot_of_another_python_or_no_snapshot_is_refused() -> None:
    @pw.workflow
    async def flow() -> None: ...

    data = dump_workflow(flow.definition).data
    here = f'"{sys.version_info.major}.{sys.version_info.minor}"'.encode()
    with pytest.raises(pw.ConfigurationError, match=r"stored by Python 2\.7, this is"):
        load(data.replace(here, b'"2.7"', 1))
    with pytest.raises(pw.ConfigurationError, match="is no snapshot"):
        load(b"garbage" + data)


def test_step_missing_from_a_snapshot_names_those_it_has() -> None:
    @pw.workflow
    async def flow() -> None: ...

    blobs: dict[str, bytes] = {}
    code = describe_workflow(flow.definition, put_into(blobs))
    with pytest.raises(pw.ConfigurationError, match="holds no step 'gone', only: none"):
        load_step(CodeRef(how="snapshot", name="gone", ref=code.ref), blobs.__getitem__, lambda p: None)


def test_refused_pickles_refuse_a_step_by_value() -> None:
    @pw.step
    def f() -> None: ...

    code = describe_step(f.definition)
    assert code.how == "value"

    def refuse(payload: Payload) -> Any:
        raise pw.StorageError(f"{payload.enc} is switched off")

    with pytest.raises(pw.StorageError, match="pickle is switched off"):
        load_step(code, lambda ref: b"", refuse)


def test_code_by_value_is_refused_where_pickles_are_switched_off() -> None:
    @pw.workflow
    async def flow() -> None: ...

    blobs: dict[str, bytes] = {}
    with pytest.raises(pw.ConfigurationError, match="allow_pickle is off"):
        describe_workflow(flow.definition, put_into(blobs), allow_pickle=False)
    code = describe_workflow(flow.definition, put_into(blobs))
    with pytest.raises(pw.ConfigurationError, match="allow_pickle is off"):
        load_workflow(code, blobs.__getitem__, allow_pickle=False)
    with pytest.raises(pw.ConfigurationError, match="allow_pickle is off"):
        load_step(code, blobs.__getitem__, lambda payload: None, allow_pickle=False)


def test_module_that_no_other_process_can_import_goes_by_value_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "off_the_path.py"
    path.write_text(
        "import pyworkflow_ray as pw\n"
        "class Boom(Exception): ...\n"
        "def helper(): return Boom\n"
        "@pw.step\ndef f(): return helper()\n"
        "@pw.workflow\nasync def flow(): return f.fn()\n"
    )
    spec = importlib.util.spec_from_file_location("code_off_the_path", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    blobs: dict[str, bytes] = {}
    try:
        spec.loader.exec_module(module)
        code = describe_workflow(module.flow.definition, put_into(blobs))
    finally:
        del sys.modules[spec.name]
    assert code.how == "snapshot"
    with pytest.raises(StopIteration) as caught:
        load_workflow(code, blobs.__getitem__).fn().send(None)
    assert caught.value.value.__name__ == "Boom"


def test_breaker_travels_in_a_snapshot_as_itself() -> None:
    space: dict[str, Any] = {"__name__": "__main__", "pw": pw}
    exec(
        "breaker = pw.CircuitBreaker('code-test-breaker')\n"
        "@pw.step(breaker=breaker)\ndef f(): return breaker.name\n"
        "@pw.workflow\nasync def flow(): return await f()",
        space,
    )
    blobs: dict[str, bytes] = {}
    code = describe_workflow(space["flow"].definition, put_into(blobs))
    step = load(blobs[code.ref or ""]).steps["__main__:f"]
    assert step.fn() == step.breaker_name == "code-test-breaker"


def test_local_code_keeps_steps_and_what_they_close_over_in_the_process() -> None:
    lock = threading.Lock()

    @pw.step
    def f() -> Any:
        return lock

    with local_code():
        code = describe_step(f.definition)
        assert load_step(code, lambda ref: b"", lambda p: None) is f.definition
    with pytest.raises(pw.ConfigurationError, match="test environment that has ended"):
        load_step(code, lambda ref: b"", lambda p: None)
