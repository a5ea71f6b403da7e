"""Arguments checked against annotations, by pydantic, and handed on as validated.

Called by `definitions`. Rules:

* arguments that were not given stay out of the result: defaults are the function's own (a sentinel default must not
  be copied, encoded or validated);
* an argument whose class is exactly its annotation (a plain builtin, or a pydantic model that is not revalidated)
  passes without pydantic; a call with only such arguments costs one loop;
* an annotation that can't be resolved, or that pydantic has no schema for, is treated as `Any`;
* a call that does not fit the signature is a `TypeError`, as of a plain function; a wrong value is a pydantic
  `ValidationError` naming every wrong argument.
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic_core import ArgsKwargs

_PLAIN: frozenset[type] = frozenset({int, float, str, bytes, bool, list, dict, tuple, set, frozenset, type(None)})
_CONFIG = ConfigDict(arbitrary_types_allowed=True)
_ANY = frozenset({object})  # matches nothing by type: looked at by identity only
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class _Unset:
    """Default of arguments that were not given."""

    def __repr__(self) -> str:
        return "<default>"


_UNSET = _Unset()


def resolve_hints(fn: Callable[..., Any], local_names: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The annotations of `fn`'s parameters as types; those that can't be resolved are left out.

    Args:
        local_names: Names of the scope in which `fn` was defined, for annotations that are text.
    """
    try:
        raw = dict(_raw_annotations(fn))
    except Exception:  # annotations that are evaluated late (3.14) may raise anything
        return {}
    raw.pop("return", None)
    globals_ = getattr(fn, "__globals__", {})
    hints: dict[str, Any] = {}
    for name, annotation in raw.items():
        holder = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            hints[name] = typing.get_type_hints(
                holder, globalns=globals_, localns=dict(local_names or {}), include_extras=True
            )[name]
        except Exception:  # tolerated: an unresolvable annotation must not make a step unusable
            continue
    return hints


def _raw_annotations(fn: Callable[..., Any]) -> Mapping[str, Any]:
    if sys.version_info >= (3, 14):
        import annotationlib

        annotations: Mapping[str, Any] = annotationlib.get_annotations(fn, format=annotationlib.Format.FORWARDREF)
        return annotations
    return getattr(fn, "__annotations__", {})


class Arguments:
    """Binds and validates the arguments of one function. Made once a definition; safe to share between threads."""

    def __init__(self, signature: inspect.Signature, hints: Mapping[str, Any], title: str) -> None:
        self._signature = signature
        self._hints = dict(hints)
        self._title = title
        self._adapter: TypeAdapter[Any] | None = None
        parameters = list(signature.parameters.values())
        positional = [p for p in parameters if p.kind in _POSITIONAL]
        self._required = sum(1 for p in positional if p.default is p.empty)
        self._plain = tuple(_plain_types(self._hints.get(p.name, Any)) for p in positional)
        self._by_name = {
            p.name: _plain_types(self._hints.get(p.name, Any))
            for p in parameters
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
        self._simple = not any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters)

    def validate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as validated; those not given stay out.

        Raises:
            TypeError: they do not fit the signature.
            pydantic.ValidationError: a value does not fit its annotation.
        """
        if not kwargs and self._simple and self._required <= len(args) <= len(self._plain):
            for value, plain in zip(args, self._plain, strict=False):
                if plain is not _ANY and type(value) not in plain:
                    break
            else:
                return args, kwargs
        self._signature.bind(*args, **kwargs)  # a TypeError in Python's own words
        if not self._hints or self._all_plain(args, kwargs):
            return args, kwargs
        return self._by_pydantic(args, kwargs)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As `validate`, with defaults filled in and every argument where the signature puts it: for comparison."""
        bound = self._signature.bind(*args, **kwargs)
        given, named = self.validate(bound.args, bound.kwargs)
        bound = self._signature.bind(*given, **named)
        bound.apply_defaults()
        return bound.args, bound.kwargs

    def _all_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if len(args) > len(self._plain):
            return False
        pairs = list(zip(args, self._plain, strict=False))
        for name, value in kwargs.items():
            plain = self._by_name.get(name)
            if plain is None:
                return False
            pairs.append((value, plain))
        return all(plain is _ANY or type(value) in plain for value, plain in pairs)

    def _by_pydantic(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._adapter is None:
            self._adapter = self._build()
        given, named = self._adapter.validate_python(ArgsKwargs(args, kwargs))
        return (
            tuple(value for value in given if value is not _UNSET),
            {name: value for name, value in named.items() if value is not _UNSET},
        )

    def _build(self) -> TypeAdapter[Any]:
        parameters = [
            p.replace(annotation=Any, default=p.empty if p.default is p.empty else _UNSET)
            for p in self._signature.parameters.values()
        ]
        try:
            return _collector(parameters, self._hints, self._title)
        except Exception:  # pydantic has no schema for one of them: find which, and take it for Any
            usable = {}
            for p in parameters:
                if p.name in self._hints:
                    try:
                        _collector([p], {p.name: self._hints[p.name]}, self._title)
                    except Exception:
                        continue
                    usable[p.name] = self._hints[p.name]
            return _collector(parameters, usable, self._title)


def _collector(parameters: list[inspect.Parameter], hints: Mapping[str, Any], title: str) -> TypeAdapter[Any]:
    """An adapter that validates a call and gives back its arguments: pydantic's own reading of a signature."""

    def collect(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    collect.__name__ = collect.__qualname__ = title
    collect.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    collect.__annotations__ = {p.name: hints.get(p.name, Any) for p in parameters}
    return TypeAdapter(collect, config=_CONFIG)  # type: ignore[arg-type]  # a function is a type form to pydantic


def _plain_types(hint: Any) -> frozenset[type]:
    """Classes whose instances pass `hint` unchanged; `_ANY` where everything does; empty where pydantic must look."""
    if hint is Any or hint is object:
        return _ANY
    if hint is None:
        return frozenset({type(None)})
    if type(hint) is not types.GenericAlias and isinstance(hint, type):
        if hint in _PLAIN:
            return frozenset({hint})
        if issubclass(hint, BaseModel) and hint.model_config.get("revalidate_instances", "never") == "never":
            return frozenset({hint})
        return frozenset()
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [_plain_types(member) for member in typing.get_args(hint)]
        if any(member is _ANY for member in members):
            return frozenset()
        return frozenset().union(*members)
    return frozenset()
