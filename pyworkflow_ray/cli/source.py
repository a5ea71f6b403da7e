"""A module's source as the doctor reads it: which functions are steps and workflows, with which options, and what a
name in it stands for. By syntax alone: nothing of the module is imported or run.

Called by `mistakes`. Rules: a name counts as a library's only where an import in the same file says so; an option that
can't be read (`**COMMON`, a computed value) counts as given. So what is said of a module holds, and what can't be told
is not said. Fault: a file that is no Python; the caller hears of it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

Kind = Literal["step", "workflow", "plain"]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

_STEP = re.compile(r"(pyworkflow_ray|pyworkflow)(\.step)?\.step")
_WORKFLOW = re.compile(r"(pyworkflow_ray|pyworkflow)(\.workflow)?\.workflow")
_IGNORE = re.compile(r"#\s*doctor:\s*ignore(?:\[([\w\-, ]+)\])?")
_BUILTINS = {"open", "print", "input"}


@dataclass(eq=False)
class Function:
    """A function of the module. options: of its decorator; `unknown` where some of them can't be read."""

    node: FunctionNode
    kind: Kind
    options: dict[str, ast.expr] = field(default_factory=dict)
    unknown: bool = False

    @property
    def name(self) -> str:
        return self.node.name

    def given(self, *names: str) -> bool:
        """Whether one of these options is given, with another value than None."""
        return self.unknown or any(not _is(self.options.get(name), None, missing=True) for name in names)

    @property
    def retries(self) -> bool:
        """Whether its failed attempts are made again."""
        value = self.options.get("max_retries")
        return value is not None and not _is(value, 0) and not _is(value, False)

    @property
    def not_idempotent(self) -> bool:
        return _is(self.options.get("idempotent"), False)


def _is(node: ast.expr | None, value: object, *, missing: bool = False) -> bool:
    if node is None:
        return missing
    return (isinstance(node, ast.Constant) and node.value is value) or _equal(node, value)


def _equal(node: ast.expr, value: object) -> bool:
    return (
        isinstance(node, ast.Constant)
        and type(node.value) is type(value)
        and value is not None
        and bool(node.value == value)
    )


class Source:
    """A parsed file.

    Raises:
        SyntaxError: it is no Python.
    """

    def __init__(self, path: Path, text: str | None = None) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if text is None else text
        self.tree = ast.parse(text, str(path))
        self._lines = text.splitlines()

    def ignores(self, line: int, rule: str) -> bool:
        """Whether a comment on the line, `# doctor: ignore` or `# doctor: ignore[rule]`, says not to tell of it."""
        match = _IGNORE.search(self._lines[line - 1]) if 0 < line <= len(self._lines) else None
        return match is not None and (match[1] is None or rule in re.split(r"[,\s]+", match[1]))

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Imported name -> what it stands for: `import numpy as np` gives np: numpy."""
        found: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for name in node.names:
                    first = name.name.partition(".")[0]
                    found[name.asname or first] = name.name if name.asname else first
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for name in node.names:
                    found[name.asname or name.name] = f"{node.module}.{name.name}"
        return found

    def dotted(self, node: ast.AST) -> str | None:
        """ "requests.get" for what stands for that here; None for whatever does not begin with an imported name."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        root = self.aliases.get(node.id)
        if root is None:
            if node.id not in _BUILTINS or node.id in self.globals:
                return None
            root = node.id
        return ".".join([root, *reversed(parts)])

    @cached_property
    def functions(self) -> list[Function]:
        """All functions, nested ones too, in order."""
        found = [node for node in ast.walk(self.tree) if isinstance(node, FunctionNode)]
        return [self._function(node) for node in sorted(found, key=lambda node: node.lineno)]

    def _function(self, node: FunctionNode) -> Function:
        for decorator in node.decorator_list:
            call = decorator if isinstance(decorator, ast.Call) else None
            name = self.dotted(call.func if call is not None else decorator) or ""
            kind: Kind = "step" if _STEP.fullmatch(name) else "workflow" if _WORKFLOW.fullmatch(name) else "plain"
            if kind != "plain":
                keywords = call.keywords if call is not None else []
                return Function(
                    node,
                    kind,
                    {keyword.arg: keyword.value for keyword in keywords if keyword.arg is not None},
                    any(keyword.arg is None for keyword in keywords),
                )
        return Function(node, "plain")

    @cached_property
    def of_node(self) -> dict[ast.AST, Function]:
        return {function.node: function for function in self.functions}

    @cached_property
    def globals(self) -> dict[str, ast.AST]:
        """Name -> what the module's top level binds it to: a function, a class, or the value assigned."""
        found: dict[str, ast.AST] = {}
        for node in self.tree.body:
            if isinstance(node, FunctionNode | ast.ClassDef):
                found[node.name] = node
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        found[target.id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                found[node.target.id] = node.value
        return found

    def called_function(self, node: ast.AST) -> Function | None:
        """The function of this module that a call names, a changed copy of a step (`charge.options(...)`) included."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "options":
            node = node.func.value
        if isinstance(node, ast.Name):
            return self.of_node.get(self.globals.get(node.id, node))
        return None

    def reach(self, function: Function, *, values: bool) -> Iterator[ast.AST]:
        """Every node that runs as part of `function`: its body, and the plain functions of this module it names.

        values: also what the module's top level assigns to names it uses (a client, a resource's factory).
        Steps and workflows that it calls are their own functions, and decorators are no part of it.
        """
        seen: set[ast.AST] = {function.node}
        todo: list[ast.AST] = [function.node]
        while todo:
            for node in self._inside(todo.pop()):
                yield node
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                    bound = self.globals.get(node.id)
                    known = self.of_node.get(bound) if bound is not None else None
                    plain = known is not None and known.kind == "plain"
                    value = values and isinstance(bound, ast.expr)
                    if bound is not None and bound not in seen and (plain or value):
                        seen.add(bound)
                        todo.append(bound)
                        if plain:
                            yield bound  # its decorators are asked for

    def _inside(self, root: ast.AST) -> Iterator[ast.AST]:
        starts = list(root.body) if isinstance(root, FunctionNode) else [root]
        todo: list[ast.AST] = list(reversed(starts))
        while todo:
            node = todo.pop()
            function = self.of_node.get(node)
            if function is not None and function.kind != "plain":
                continue
            yield node
            children = [*node.body] if isinstance(node, FunctionNode) else list(ast.iter_child_nodes(node))
            todo.extend(reversed(children))
