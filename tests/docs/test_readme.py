"""Every block of the README's code is run: Python as a script of its own, commands against what there is.

A ```python block followed by a ```text block must print exactly that. In ```console blocks each `$` line must name a
make target or a command of ours that exists.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(path: Path = ROOT / "README.md") -> list[tuple[str, str]]:
    return [(match[1], match[2]) for match in BLOCK.finditer(path.read_text(encoding="utf-8"))]


BLOCKS = blocks()
SCRIPTS = [
    (number, code, BLOCKS[number + 1][1] if number + 1 < len(BLOCKS) and BLOCKS[number + 1][0] == "text" else None)
    for number, (language, code) in enumerate(BLOCKS)
    if language == "python"
]


@pytest.mark.ray
@pytest.mark.parametrize(("number", "code", "output"), SCRIPTS)
def test_python_of_the_readme_runs_and_prints_what_it_says(
    tmp_path: Path, number: int, code: str, output: str | None
) -> None:
    script = tmp_path / f"block_{number}.py"
    script.write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYWORKFLOW_STORAGE": str(tmp_path / "storage"), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if output is not None:
        assert done.stdout == output


def test_the_readme_shows_something_to_run() -> None:
    assert SCRIPTS


def commands() -> list[str]:
    lines = [line for language, text in BLOCKS if language == "console" for line in text.splitlines()]
    calls = [call.strip() for line in lines if line.startswith("$ ") for call in line[2:].split("&&")]
    assert calls
    return calls


@pytest.mark.parametrize("call", commands())
def test_commands_of_the_readme_exist(call: str) -> None:
    words = [word for word in call.split("#")[0].split() if "=" not in word]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "pyworkflow-ray":
        from pyworkflow_ray.cli.main import cli

        command: click.Command | None = cli
        for word in words[1:]:
            if not isinstance(command, click.Group):
                break
            command = command.get_command(click.Context(command), word)
            assert command is not None, f"{word!r} of {call!r} is no command"
    else:
        assert words[0] in ("pip", "git", "cd", "kill", "python"), f"{call!r} is not known here"
