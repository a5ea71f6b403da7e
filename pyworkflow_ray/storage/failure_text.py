"""A failure as text: message, traceback, and the user's innermost frame. Called by the codec.

Nothing here raises because of what an exception does: `__str__` may raise, chains may be long, texts may hold
lone surrogates. A step that is retried fails at the same place again and again: the text of a stack, for which Python
parses each line anew, is kept by its place.
"""

from __future__ import annotations

import functools
import os
import sysconfig
import traceback
from types import TracebackType
from typing import Any

from pyworkflow_ray.engine.events import Frame
from pyworkflow_ray.storage.payload import clean_text

MAX_MESSAGE_CHARS = 8000
MAX_TRACEBACK_CHARS = 16_000
MAX_FRAMES = 64  # of one traceback: a recursion of a thousand frames says nothing more

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_OURS_BUT_USERS = os.path.join(_OURS, "demo") + os.sep  # the demo's workflow plays the user
_STDLIB = tuple(
    os.path.join(path, "") for path in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")} if path
)


# Exceptions whose last lines depend on more than type, text and notes, or that have none of their own.
_RICHER = (SyntaxError, NameError, AttributeError, ImportError, BaseExceptionGroup)
_KEPT_STACKS = 256
_stacks: dict[tuple[Any, ...], str] = {}


def message_of(error: BaseException) -> str:
    """`str(error)`, bounded; a text of ours where that raises."""
    try:
        return clean_text(str(error), MAX_MESSAGE_CHARS)
    except Exception as broken:
        return f"<the __str__ of {type(error).__name__} raised {type(broken).__name__}>"


def traceback_of(error: BaseException) -> str:
    """The traceback and causes as Python prints them, without our frames above the user's; 16,000 characters."""
    try:
        first = _first_frame_of_user(error.__traceback__)
        stack = None if _hangs_on_others(error) else _stack_of(first)
        if stack is None:
            lines = traceback.format_exception(type(error), error, first, limit=-MAX_FRAMES)
        else:
            lines = [stack, *traceback.format_exception_only(error)]
        return clean_text("".join(lines), MAX_TRACEBACK_CHARS)
    except Exception as broken:
        head = f"<no traceback: formatting it raised {type(broken).__name__}>"
        return f"{head}\n{type(error).__name__}: {message_of(error)}"


def _hangs_on_others(error: BaseException) -> bool:
    return error.__cause__ is not None or error.__context__ is not None or isinstance(error, _RICHER)


def _stack_of(entry: TracebackType | None) -> str | None:
    """The text of a stack, made once for each place; None of one that is too deep to be worth keeping, or empty."""
    first, place = entry, []
    while entry is not None:
        code = entry.tb_frame.f_code
        # equal code of two files is equal, and lines of one code are told by the instruction
        place += [code.co_filename, code, entry.tb_lasti]
        entry = entry.tb_next
    if not place or len(place) > 3 * MAX_FRAMES:
        return None
    key = tuple(place)
    found = _stacks.get(key)
    if found is None:
        if len(_stacks) >= _KEPT_STACKS:
            _stacks.clear()
        found = "Traceback (most recent call last):\n" + "".join(traceback.format_tb(first))
        _stacks[key] = found
    return found


def where_of(error: BaseException) -> Frame | None:
    """The innermost frame of the user's code; of installed code where there is none of the user's own."""
    user: Frame | None = None
    installed: Frame | None = None
    entry = error.__traceback__
    while entry is not None:
        code = entry.tb_frame.f_code
        kind = _kind_of_file(code.co_filename)
        if kind == "user" or (kind == "installed" and installed is None):
            frame = Frame(file=clean_text(code.co_filename, 1000), line=entry.tb_lineno or 0, function=code.co_qualname)
            if kind == "user":
                user = frame
            else:
                installed = frame  # the outermost: a step of an installed package, not the client library below it
        entry = entry.tb_next
    return user or installed


def _first_frame_of_user(entry: TracebackType | None) -> TracebackType | None:
    start = entry
    while start is not None and _kind_of_file(start.tb_frame.f_code.co_filename) != "user":
        if _kind_of_file(start.tb_frame.f_code.co_filename) == "installed":
            break
        start = start.tb_next
    return start or entry


@functools.lru_cache(1024)
def _kind_of_file(file: str) -> str:
    if file.startswith("<frozen"):
        return "stdlib"
    if file.startswith(_OURS) and not file.startswith(_OURS_BUT_USERS):
        return "ours"
    if "site-packages" in file or "dist-packages" in file:
        return "installed"
    return "stdlib" if file.startswith(_STDLIB) else "user"
