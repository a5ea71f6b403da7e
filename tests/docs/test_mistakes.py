"""docs/mistakes.md: doctor finds the named mistake in the first block of each section, and none in the second."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest

from pyworkflow_ray.cli.mistakes import find_in_files
from pyworkflow_ray.testing import WorkflowEnv

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "mistakes.md").read_text(encoding="utf-8")
SECTIONS = {
    title: re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    for title, text in re.findall(r"^## ([a-z-]+)\n(.*?)(?=^## )", PAGE, re.M | re.S)
}


def test_every_rule_of_doctor_has_a_section() -> None:
    health = (Path(__file__).resolve().parents[2] / "docs" / "health.md").read_text(encoding="utf-8")
    assert set(SECTIONS) == set(re.findall(r"^\| `([a-z]+(?:-[a-z]+)+)` \|", health, re.M))


@pytest.mark.parametrize("rule", SECTIONS)
def test_the_first_block_has_the_mistake_and_the_second_has_none(rule: str, tmp_path: Path) -> None:
    wrong, right = SECTIONS[rule]
    (tmp_path / "wrong.py").write_text(wrong, encoding="utf-8")
    (tmp_path / "right.py").write_text(right, encoding="utf-8")
    assert {found.rule for found in find_in_files([tmp_path / "wrong.py"], tmp_path)} == {rule}
    assert find_in_files([tmp_path / "right.py"], tmp_path) == []


@pytest.mark.parametrize("rule", SECTIONS)
def test_both_blocks_are_accepted_by_the_decorators(rule: str) -> None:
    for block in SECTIONS[rule]:
        exec(compile(block, f"docs/mistakes.md, {rule}", "exec"), {"__name__": f"mistakes_{rule.replace('-', '_')}"})


@pytest.mark.parametrize(
    ("rule", "flow", "arguments"), [("not-replayable", "reminder", ()), ("effects-in-finally", "meeting", ("A1",))]
)
async def test_the_mended_workflow_is_replayed_as_it_was(rule: str, flow: str, arguments: tuple[str, ...]) -> None:
    module = types.ModuleType(f"mended_{flow}")
    exec(compile(SECTIONS[rule][1], f"docs/mistakes.md, {rule}", "exec"), module.__dict__)
    async with WorkflowEnv() as env:
        await env.crash_everywhere(getattr(module, flow), *arguments)
