"""The form of the code: which room imports which, what pure rooms must not touch, how long a module may be.

Reads source text only; nothing of the package is imported but where a test says so. import-linter checks the order of
rooms along whole chains of imports (`make check`); this is the part that needs no extra tool and runs with the tests.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pyworkflow_ray"

# From the top down: a room imports rooms of its own level or below. DESIGN.md's table of rooms, ARCHITECTURE.md's map.
LEVELS: list[set[str]] = [
    {"cli", "__main__"},
    {"dashboard", "demo"},
    {"testing"},
    {"api"},
    {"runtime"},
    {"execution"},
    {"storage", "observability"},
    {"engine"},
    {"resilience"},
    {"errors", "durations", "failpoints", "ids"},
]
ROOM_LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# The same level, yet strangers to each other.
NEVER: list[tuple[str, str]] = [
    ("execution", "storage"),
    ("execution", "observability"),
    ("testing", "runtime"),
    ("demo", "runtime"),
    ("demo", "testing"),
    ("dashboard", "runtime"),
    ("dashboard", "testing"),
    ("dashboard", "demo"),
]

HOMES: dict[str, set[str]] = {
    "ray": {"runtime"},
    "duckdb": {"storage"},
    "pyarrow": {"storage"},
    "opentelemetry": {"observability"},
    "click": {"cli", "__main__"},
    "starlette": {"dashboard"},
    "uvicorn": {"dashboard"},
    "jinja2": {"dashboard"},
}

PURE_ROOMS = {"engine", "resilience", "errors", "durations", "ids"}
PURE_MODULES = {"storage/record.py", "observability/explain.py", "observability/spans.py"}
IMPURE_IMPORTS = {
    "time": "a clock",
    "os": "the operating system",
    "io": "input and output",
    "pathlib": "files",
    "shutil": "files",
    "tempfile": "files",
    "socket": "the network",
    "subprocess": "processes",
    "multiprocessing": "processes",
    "signal": "signals",
    "threading": "threads",
    "_thread": "threads",
    "queue": "threads",
    "concurrent": "threads",
    "secrets": "randomness nobody handed in",
    "select": "the network",
}
CONSOLE_CALLS = {"open", "print", "input"}
MAX_LINES = 600


class Import(NamedTuple):
    file: Path
    line: int
    module: str  # absolute dotted name
    names: tuple[str, ...]  # what `from module import …` takes; empty for `import module`
    top_level: bool  # runs when the module is imported (a TYPE_CHECKING block does not)
    types_only: bool  # stands in a TYPE_CHECKING block

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module} {' '.join(self.names)}".rstrip()


def source_files(folder: Path = PACKAGE) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    name = first.removesuffix(".py")
    return name if name in ROOM_LEVEL else "api"


def room_of_module(module: str) -> str:
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "__init__"
    return name if name in ROOM_LEVEL else "api"


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(path: Path, text: str | None = None) -> Iterator[Import]:
    tree = ast.parse(path.read_text() if text is None else text, filename=str(path))
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    stack: list[tuple[ast.AST, bool, bool]] = [(tree, True, False)]
    while stack:
        node, top, types = stack.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, (), top, types)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield Import(path, node.lineno, module, tuple(alias.name for alias in node.names), top, types)
        inner = top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if _is_type_checking(node):
            inner, types = False, True
        stack.extend((child, inner, types) for child in ast.iter_child_nodes(node))


def targets(found: Import) -> list[str]:
    """The modules that an import of ours leads to: `from pyworkflow_ray import errors` is an import of errors."""
    if found.module == "pyworkflow_ray":
        return [f"pyworkflow_ray.{name}" for name in found.names] or ["pyworkflow_ray"]
    return [found.module]


def layer_faults(path: Path, text: str | None = None) -> list[str]:
    room = room_of(path)
    faults = []
    for found in imports_of(path, text):
        top_package = found.module.split(".")[0]
        named_only = room == "api" and found.types_only  # pw.sql returns a duckdb relation, and says so
        if top_package in HOMES and room not in HOMES[top_package] and not named_only:
            faults.append(f"{found}: {top_package} belongs to {', '.join(sorted(HOMES[top_package]))} alone")
        if top_package != "pyworkflow_ray":
            continue
        for module in targets(found):
            other = room_of_module(module)
            if other == room:
                continue
            if ROOM_LEVEL.get(other, 3) < ROOM_LEVEL.get(room, 3):
                faults.append(f"{found}: {room} lies below {other}")
            if (room, other) in NEVER:
                faults.append(f"{found}: {room} knows nothing of {other}")
            if room == "api" and other == "runtime" and found.top_level:
                faults.append(f"{found}: the api imports runtime inside functions only, for it brings Ray")
            if other == "demo" and room not in ("cli", "demo"):
                faults.append(f"{found}: only the command line knows the demo")
    return faults


def purity_faults(path: Path, text: str | None = None) -> list[str]:
    source = path.read_text() if text is None else text
    where = path.relative_to(ROOT)
    faults = []
    for found in imports_of(path, source):
        first = found.module.split(".")[0]
        if first in IMPURE_IMPORTS:
            faults.append(f"{found}: {IMPURE_IMPORTS[first]} in a pure room")
        if first == "random" and found.names and set(found.names) - {"Random"}:
            faults.append(f"{found}: a pure room is handed its random.Random")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            spelled = ast.unparse(node)
            if re.fullmatch(r"random\.(?!Random\b)\w+", spelled):
                faults.append(f"{where}:{node.lineno} uses {spelled}: a pure room is handed its random.Random")
            if re.fullmatch(r"((dt|datetime)\.)?(datetime|date)\.(now|utcnow|today)", spelled):
                faults.append(f"{where}:{node.lineno} uses {spelled}: a pure room is handed the time")
            if re.fullmatch(r"uuid\.uuid[14]", spelled) and room_of(path) != "ids":
                faults.append(f"{where}:{node.lineno} uses {spelled}: a pure room is handed its randomness")
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("open", "print", "input")
        ):
            faults.append(f"{where}:{node.lineno} calls {node.func.id}(): input and output in a pure room")
    return faults


def test_imports_go_down_only() -> None:
    faults = [fault for path in source_files() for fault in layer_faults(path)]
    assert not faults, "\n".join(faults)


def test_pure_rooms_touch_no_clock_randomness_threads_or_files() -> None:
    pure = [
        path for path in source_files() if room_of(path) in PURE_ROOMS or str(path.relative_to(PACKAGE)) in PURE_MODULES
    ]
    assert len(pure) >= 6
    faults = [fault for path in pure for fault in purity_faults(path)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("engine/loop.py", "import ray"),
        ("engine/loop.py", "from pyworkflow_ray.storage import journal"),
        ("resilience/retry.py", "from ..engine import events"),
        ("execution/worker.py", "def f():\n    from pyworkflow_ray.storage.codec import StorageCodec"),
        ("storage/journal.py", "from opentelemetry import trace"),
        ("observability/spans.py", "import pyarrow.parquet"),
        ("runs.py", "from pyworkflow_ray.runtime.client import Client"),
        ("runs.py", "from pyworkflow_ray import cli"),
        ("runtime/run_actor.py", "import pyworkflow_ray"),
        ("runs.py", "def f():\n    import duckdb"),
        ("engine/loop.py", "import typing\nif typing.TYPE_CHECKING:\n    import duckdb"),
        ("step.py", "from pyworkflow_ray.demo import main"),
        ("demo/main.py", "from pyworkflow_ray import runtime"),
    ],
)
def test_an_import_against_the_order_is_found(place: str, text: str) -> None:
    assert layer_faults(PACKAGE / place, text), f"{text!r} in {place} was not found"


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("runs.py", "def start():\n    from pyworkflow_ray.runtime.client import Client"),
        ("runs.py", "import typing\nif typing.TYPE_CHECKING:\n    from pyworkflow_ray.runtime import client"),
        ("runs.py", "import typing\nif typing.TYPE_CHECKING:\n    import duckdb"),
        ("engine/loop.py", "from pyworkflow_ray import errors"),
        ("cli/main.py", "import pyworkflow_ray as pw\nfrom pyworkflow_ray.demo.main import run_demo"),
        ("runtime/pool.py", "import ray\nfrom pyworkflow_ray.storage.journal import Journal"),
    ],
)
def test_an_import_down_the_order_is_allowed(place: str, text: str) -> None:
    assert layer_faults(PACKAGE / place, text) == []


@pytest.mark.parametrize(
    "text",
    [
        "import time",
        "from os import environ",
        "import threading",
        "def f():\n    from concurrent.futures import Future",
        "import random\nrandom.random()",
        "from random import uniform",
        "import datetime as dt\ndt.datetime.now()",
        "from datetime import date\ndate.today()",
        "import uuid\nuuid.uuid4()",
        "open('x')",
        "print('x')",
    ],
)
def test_impurity_is_found(text: str) -> None:
    assert purity_faults(PACKAGE / "engine/loop.py", text), f"{text!r} was not found"


def test_pure_code_may_name_the_type_of_its_randomness() -> None:
    text = (
        "import random\nfrom random import Random\ndef f(a: random.Random, b: Random): return a.random() + b.random()"
    )
    assert purity_faults(PACKAGE / "engine/loop.py", text) == []


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    return [ROOT / name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]


def test_modules_fit_in_a_head() -> None:
    long = []
    for path in tracked_files():
        if path.suffix == ".py" and (lines := path.read_text().count("\n")) > MAX_LINES:
            long.append(f"{path.relative_to(ROOT)} has {lines} lines, {MAX_LINES} at most")
    assert not long, "\n".join(long)


FOREIGN = re.compile(
    rb"(?<![\w.~-])/(?:work|farm|root|opt)/"  # a folder of one machine
    rb"|(?:extra-)?index-url|find-links"  # a package host
    rb"|\bTODO\b|\bFIXME\b|\bXXX\b"  # a promise nobody keeps
)


def test_nothing_of_one_machine_stands_in_the_project() -> None:
    here = [str(place).encode() for place in (ROOT, Path.home()) if len(place.parts) > 2]
    found = []
    for path in tracked_files():
        if path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            hit = FOREIGN.search(line)
            found += [f"{path.relative_to(ROOT)}:{number}: {hit.group().decode()}"] if hit else []
            found += [f"{path.relative_to(ROOT)}:{number}: {place.decode()}" for place in here if place in line]
    assert not found, "\n".join(found)


def test_lock_files_pin_with_hashes_and_name_no_host() -> None:
    locks = sorted((ROOT / "requirements").glob("*.lock"))
    assert [lock.name for lock in locks] == ["bench.lock", "dev.lock", "uv.lock"]
    for lock in locks:
        text = lock.read_text()
        assert "://" not in text, f"{lock.name} names a host"
        for requirement in re.split(r"\n(?=\S)", re.sub(r"(?m)^ *#.*\n", "", text)):
            if requirement.strip():
                assert re.match(r"[a-z0-9._-]+(\[[a-z0-9,-]+\])?==\S+", requirement), requirement.splitlines()[0]
                assert "--hash=sha256:" in requirement, requirement.splitlines()[0]


def test_journal_and_codec_load_without_duckdb_and_pyarrow() -> None:
    modules = [
        f"pyworkflow_ray.storage.{name}"
        for name in ("journal", "codec")
        if (PACKAGE / "storage" / f"{name}.py").exists()
    ]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "print(sorted({'ray', 'duckdb', 'pyarrow', 'opentelemetry'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
