"""Tables that are written by the code itself: settings with their variables, event types, columns of the SQL views.

Directives: `settings-table`, `event-types`.
"""

from __future__ import annotations

import inspect
import re
import typing
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from pyworkflow_ray.engine import events
from pyworkflow_ray.settings import PREFIX, Settings

# "* *inputs*, delivered to the body ...: StepCompleted, StepFailed;" in the module's own docstring
SORTS = {
    name: sort
    for sort, text in re.findall(r"\* \*(input|command)s\*,(.*?);", events.__doc__ or "", re.DOTALL)
    for name in re.findall(r"[A-Z]\w+", text)
}
FIELD = re.compile(r"^((?:[a-z_]+)(?:(?:,| and) [a-z_]+)*): ")


class Written(SphinxDirective):
    """A directive of a Markdown page whose content is the Markdown that `lines` makes."""

    def lines(self) -> list[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        node = nodes.section()
        node.document = self.state.document
        self.state.nested_parse(StringList(self.lines(), source="generated"), 0, node, match_titles=True)
        return node.children


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines] + [""]


def type_text(annotation: Any) -> str:
    """A type as a reader writes it."""
    if typing.get_origin(annotation) is typing.Annotated:
        return type_text(typing.get_args(annotation)[0])
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    text = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", str(annotation)).replace("NoneType", "None")
    return text


def default_text(field: Any) -> str:
    return "required" if field.is_required() else repr(field.get_default(call_default_factory=True))


class SettingsTable(Written):
    def lines(self) -> list[str]:
        rows = []
        for name, field in Settings.model_fields.items():
            default = str(field.default) if name == "storage" else default_text(field)
            rows.append([f"`{name}`", f"`{PREFIX}{name.upper()}`", f"`{default}`", f"{field.description or ''}."])
        return table(["`pw.init`", "variable", "default", "meaning"], rows)


class EventTypes(Written):
    """Every event of a run's log, with its fields, in the order of the module."""

    def lines(self) -> list[str]:
        lines: list[str] = []
        common = set(events.Event.model_fields)
        for cls in event_classes():
            sort = SORTS.get(cls.__name__, "note")
            lines += [f"## {cls.model_fields['type'].default}", ""]
            lines += [f"*{sort}{'; older versions may ignore it' if cls.SAFE else ''}*", ""]
            if "__doc__" in vars(cls) and cls.__doc__:
                lines += [*described(cls.__doc__), ""]
            fields = [(key, field) for key, field in cls.model_fields.items() if key not in common]
            if fields:
                rows = [
                    [f"`{key}`", f"`{type_text(field.annotation)}`", f"`{default_text(field)}`"]
                    for key, field in fields
                ]
                lines += table(["field", "type", "default"], rows)
        return lines


def described(docstring: str) -> list[str]:
    """An event's docstring, without the word for its sort, its fields' sentences as a list."""
    text = re.sub(
        r"^(?:Note|Input|Command)(?:: |, and )(\w)", lambda found: found[1].upper(), inspect.cleandoc(docstring)
    )
    lines: list[str] = []
    listed = False
    for line in text.splitlines():
        field = FIELD.match(line)
        if field is not None:
            lines += ["", f"* `{field[1]}`: {line[field.end() :]}"]
            listed = True
        else:
            lines.append(f"  {line.strip()}" if listed and line.strip() else line)
    return lines


def event_classes() -> list[type[events.Event]]:
    return [
        cls
        for cls in vars(events).values()
        if isinstance(cls, type)
        and issubclass(cls, events.Event)
        and cls is not events.Event
        and "type" in cls.model_fields
        and isinstance(cls.model_fields["type"].default, str)
    ]


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("settings-table", SettingsTable)
    app.add_directive("event-types", EventTypes)
    return {"parallel_read_safe": True}
