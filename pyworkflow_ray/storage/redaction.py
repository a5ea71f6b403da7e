"""What of a value nobody is to be shown: pydantic's secrets, and what has a name that the user marked. Called by codec.

Rules:

* A value is stored whole, for a step needs it after a crash; it is marked, and beside it lies a text for people in
  which the secret parts are masked. Views show that text and nothing else, whoever looks, with whichever settings.
* Names (setting `redact`) are compared whole and without regard to case: parameters of workflows and steps, keys of
  dicts, fields of models and dataclasses, at any depth. Where there are some, no validation error quotes its input.
* What can't be looked through in bounded time counts as secret where names are marked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, Secret, SecretBytes, SecretStr, ValidationError

from pyworkflow_ray.storage.payload import PREVIEW_CHARS, clean_text, preview

MASK = "[redacted]"
SECRETS = (Secret, SecretStr, SecretBytes)
_MAX_PARTS = 100_000  # looked at before a value counts as secret
_MAX_DEPTH = 100
_SHOWN_ITEMS, _SHOWN_DEPTH = 8, 4


class Redaction:
    """The names that a user marked. Immutable."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = frozenset(name.lower() for name in names)

    def marks(self, name: str | None) -> bool:
        """Whether what has this name is secret."""
        return name is not None and bool(self.names) and name.lower() in self.names

    def text(self, value: Any, name: str | None = None, known: bool = False) -> str | None:
        """What people see of `value`; None: it holds nothing secret.

        Args:
            name: Of the parameter that it is given to. known: it is known to hold a secret, wherever.
        """
        if self.marks(name):
            return MASK
        if not known and not self._holds(value):
            return None
        try:
            text = clean_text(self._masked(value, 0), 10 * PREVIEW_CHARS)
        except Exception:
            return MASK
        return text if len(text) <= PREVIEW_CHARS else text[: PREVIEW_CHARS - 3] + "..."

    def message(self, error: BaseException) -> str | None:
        """What people see of an error that quotes values it does not know the names of; None: its own text."""
        if not self.names or not isinstance(error, ValidationError):
            return None
        lines = [f"{len(error.errors())} validation errors for {error.title}"]
        for one in error.errors(include_input=False, include_url=False, include_context=False):
            lines += [".".join(map(str, one["loc"])), f"  {one['msg']} [type={one['type']}, input {MASK}]"]
        return "\n".join(lines)

    def _holds(self, value: Any) -> bool:
        left = _MAX_PARTS
        stack = [(value, 0)]
        seen: set[int] = set()
        while stack:
            part, depth = stack.pop()
            if isinstance(part, SECRETS):
                return True
            left -= 1
            if left < 0 or depth > _MAX_DEPTH:
                return bool(self.names)
            if isinstance(part, (str, bytes, int, float, type(None))) or id(part) in seen:
                continue
            seen.add(id(part))
            for name, inner in _parts(part):
                if self.marks(name):
                    return True
                stack.append((inner, depth + 1))
        return False

    def _masked(self, value: Any, depth: int) -> str:
        if isinstance(value, SECRETS):
            return MASK
        fields = _fields(value)
        if fields is None and not isinstance(value, (dict, list, tuple, set, frozenset)):
            return preview(value)
        if depth >= _SHOWN_DEPTH:
            return "..."
        parts = []
        items = fields.items() if fields is not None else _parts(value)
        for number, (name, inner) in enumerate(items):
            if number == _SHOWN_ITEMS:
                parts.append("...")
                break
            shown = MASK if self.marks(name) else self._masked(inner, depth + 1)
            sign = "=" if fields is not None else ": "
            parts.append(shown if name is None else f"{name if fields is not None else repr(name)}{sign}{shown}")
        inside = ", ".join(parts)
        if fields is not None:
            return f"{type(value).__name__}({inside})"
        opening, closing = "{}" if isinstance(value, (dict, set, frozenset)) else "[]" if type(value) is list else "()"
        return f"{opening}{inside}{closing}"


def _fields(value: Any) -> dict[str, Any] | None:
    """The fields of a model or dataclass, None of anything else."""
    if isinstance(value, BaseModel):
        return {**value.__dict__, **(value.__pydantic_extra__ or {})}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {**getattr(value, "__dict__", {}), **{f.name: getattr(value, f.name, None) for f in _of(value)}}
    return None


def _of(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(value)


def _parts(value: Any) -> Iterator[tuple[str | None, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (key if isinstance(key, str) else None), inner
    elif isinstance(value, (list, tuple, set, frozenset)):
        for inner in value:
            yield None, inner
    else:
        yield from (_fields(value) or {}).items()
