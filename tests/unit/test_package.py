"""`import pyworkflow_ray`: quick, quiet, and every public name where it belongs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pyworkflow_ray as pw


def python(source: str) -> str:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_heavy_and_takes_a_moment() -> None:
    # processor time: the limit is the contract's, and a busy machine is not the package's fault
    source = (
        "import time; t = time.process_time(); import pyworkflow_ray; spent = time.process_time() - t; import sys;"
        "print(spent, *({'ray', 'duckdb', 'pyarrow', 'pydantic', 'opentelemetry', 'asyncio'} & set(sys.modules)))"
    )
    answers = [python(source).split() for _ in range(3)]
    assert [answer[1:] for answer in answers] == [[]] * 3
    assert min(float(answer[0]) for answer in answers) < 0.3


def test_defining_loads_neither_ray_nor_duckdb_nor_pyarrow() -> None:
    source = (
        "import pyworkflow_ray as pw, sys\n"
        "@pw.step(max_retries=2)\ndef f(x: int) -> int: return x\n"
        "@pw.workflow\nasync def flow() -> int: return await f(1)\n"
        "f.definition.validate(('1',), {})\n"
        "print(*({'ray', 'duckdb', 'pyarrow', 'opentelemetry', 'pydantic_settings'} & set(sys.modules)))"
    )
    assert python(source) == ""


@pytest.mark.parametrize("name", pw.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(pw, name) is not None
    assert name in dir(pw)


def test_unknown_name_is_an_attribute_error_with_the_nearest() -> None:
    with pytest.raises(AttributeError, match="Did you mean 'workflow'"):
        _ = pw.workflwo  # type: ignore[attr-defined]
    assert not hasattr(pw, "__path_of_nothing__")


def test_public_name_wins_over_the_submodule_of_that_name() -> None:
    source = (
        "import pyworkflow_ray.step, pyworkflow_ray.workflow, pyworkflow_ray as pw\n"
        "from pyworkflow_ray.step import Step\n"
        "print(callable(pw.step), callable(pw.workflow), isinstance(pw.step(lambda: 1), Step), pw.errors.__name__)"
    )
    assert python(source) == "True True True pyworkflow_ray.errors"


def test_package_as_a_global_of_shipped_code_is_itself_again() -> None:
    import pickle

    assert pickle.loads(pickle.dumps(pw)) is pw
