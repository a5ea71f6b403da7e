"""Every block of the README's code is run: the script and what it prints, the kill and what `runs show` says after it.

A ```python block followed by a ```text block must print exactly that. In ```console blocks each `$` line must name a
make target or a command of ours that exists; the block with a `kill -9` is carried out, waiting for what a reader at a
terminal would wait for.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
BLOCKS = [(match[1], match[2]) for match in BLOCK.finditer((ROOT / "README.md").read_text(encoding="utf-8"))]
[(SHOP, PRINTED)] = [
    (code, output)
    for (language, code), (following, output) in itertools.pairwise(BLOCKS)
    if (language, following) == ("python", "text")
]
KILL = next(text for language, text in BLOCKS if language == "console" and "kill -9" in text)


def in_shop(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYWORKFLOW_STORAGE": str(folder / "storage"), "RAY_AUTH_MODE": "disabled"}


def arguments(line: str) -> list[str]:
    words = shlex.split(line.removeprefix("$ ").removesuffix(" &"))
    assert words[0] == "pyworkflow-ray"
    return ["-m", "pyworkflow_ray", *words[1:]]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(SHOP, encoding="utf-8")
    return tmp_path


@pytest.mark.ray
def test_the_script_prints_what_the_readme_says(shop: Path) -> None:
    done = in_shop(shop, "shop.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout == PRINTED


@pytest.mark.ray
def test_the_killed_run_is_taken_up_and_shown_as_the_readme_says(shop: Path) -> None:
    run, kill, recover, show = (line for line in KILL.splitlines() if line.startswith("$ "))
    assert kill == "$ kill -9 $!"
    driver = subprocess.Popen(
        [sys.executable, *arguments(run)], cwd=shop, env=environment(shop), stderr=subprocess.PIPE
    )
    family = psutil.Process(driver.pid)
    try:
        while "parked" not in in_shop(shop, *arguments("$ pyworkflow-ray runs list --json")).stdout:
            assert driver.poll() is None, (driver.stderr or sys.stderr).read()
        below = family.children(recursive=True)
    finally:
        driver.kill()
        driver.communicate()
    try:
        assert in_shop(shop, *arguments(recover)).returncode == 0
        shown = in_shop(shop, *arguments(show)).stdout.splitlines()
    finally:
        for process in below:  # Ray's agents outlive a killed driver by a minute; they are ours to end
            if process.is_running():
                process.kill()
    expected = KILL.split(show + "\n")[1].splitlines()
    assert len(shown) == len(expected)
    for line, said in zip(shown, expected, strict=True):
        assert plain(line) == plain(said)


def plain(line: str) -> str:
    """A line without what differs from run to run: times and the width they take."""
    line = re.sub(r"started .*|\b[\d.]+(ms|s|m|h)\b|in \d+s", "", line)
    return " ".join(line.split())


def commands() -> list[str]:
    lines = [line for language, text in BLOCKS if language == "console" for line in text.splitlines()]
    calls = [call.strip() for line in lines if line.startswith("$ ") for call in line[2:].split("&&")]
    assert calls
    return calls


@pytest.mark.parametrize("call", commands())
def test_commands_of_the_readme_exist(call: str) -> None:
    words = call.split()
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
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
        assert words[0] == "kill", f"{call!r} is not known here"
