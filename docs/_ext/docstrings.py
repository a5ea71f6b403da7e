"""Docstrings as they are written for `help()`, made ready for Sphinx: an indented example becomes a block of code.

In our docstrings an example stands indented below its sentence, as in a comment; for reStructuredText that is a
quotation. Whatever stands below a heading of the Google form ("Args:") is left alone.
"""

from __future__ import annotations

import builtins
import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref, pending_xref_condition

HEADING = re.compile(r"(Args|Arguments|Attributes|Raises|Returns|Yields|Note|Notes|Example|Examples):$")
BULLET = re.compile(r"\s*([*-]|\d+\.) ")


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def blocks_of_code(lines: list[str]) -> list[str]:
    """The lines of a docstring with a `code-block` before each indented block that follows an empty line."""
    made: list[str] = []
    inside = below_heading = False
    for number, line in enumerate(lines):
        if line.strip():
            if indent(line) == 0:
                inside, below_heading = False, HEADING.match(line) is not None
            elif not inside and not below_heading and number and not lines[number - 1].strip():
                before = next((one for one in reversed(made) if one.strip()), "")
                if not BULLET.match(before) and indent(before) == 0:
                    made += [".. code-block:: python", ""]
                    inside = True
        made.append(line)
    return made


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = blocks_of_code(lines)


def shown(reference: Any) -> str:
    """What a reference that is not resolved says: its shorter form, where there are two."""
    forms = list(reference.findall(pending_xref_condition))
    return (forms[-1] if forms else reference).astext().removeprefix("~")


def leave_builtins(app: Any, doctree: Any) -> None:
    """`type` in a signature is Python's own, not one of our attributes of that name."""
    for reference in list(doctree.findall(pending_xref)):
        if reference.get("refdomain") == "py" and hasattr(builtins, reference["reftarget"]):
            reference.replace_self(nodes.Text(shown(reference)))


def dashes(app: Any, doctree: Any) -> None:
    """Between a parameter's name and its text Sphinx writes two hyphens for smart quotes to mend, which are off."""
    for text in list(doctree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def readable(app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, result: str | None) -> Any:
    """Signatures with a ParamSpec, whose types autodoc writes as `~typing.~P`, as they stand in the code."""
    if signature is None or "~P" not in signature:
        return None
    signature = signature.replace("*args: ~typing.~P", "*args: P.args").replace(
        "**kwargs: ~typing.~P", "**kwargs: P.kwargs"
    )
    return re.sub(r"~(?:\w+\.)*~?", "", signature), result


def setup(app: Any) -> dict[str, bool]:
    app.connect("doctree-read", leave_builtins)
    app.connect("doctree-read", dashes)
    app.connect("autodoc-process-signature", readable)
    app.connect("autodoc-process-docstring", process, priority=100)  # before napoleon
    return {"parallel_read_safe": True}
