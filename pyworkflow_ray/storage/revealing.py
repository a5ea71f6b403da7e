"""Events as people may see them: decrypted where there is a key, and without what is redacted. Never to be stored.

Called by what shows runs (command line, `RunHandle.explain`, SQL) and by `verify`; calls the codec. Rules:

* Without the key the values of an encrypted storage stay what they are, and its texts become "(encrypted)".
* What is marked as redacted loses its data and keeps its preview, in which the secret parts are masked; with a key too.
* A value that the codec refuses is damage: the error names run and file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic import BaseModel

from pyworkflow_ray.engine.events import CodeRef, Event, Payload, RunFailed
from pyworkflow_ray.errors import CodecKeyError, PayloadError, StorageError
from pyworkflow_ray.storage.codec import StorageCodec

_USERS = ("attributes", "details")  # fields that hold what a user wrote


def revealed(run_id: str, events: Iterable[Event], codec: StorageCodec) -> list[Event]:
    """The events of one run for a view.

    Raises:
        CorruptJournalError: a value was changed, or moved to another place.
    """
    return [_shown(event, codec.at(run_id, _place_of(event))) for event in events]


def _shown(value: Any, codec: StorageCodec) -> Any:
    if isinstance(value, Payload):
        try:
            return codec.opened(value)
        except CodecKeyError:
            return value
    if isinstance(value, str):
        return codec.readable(value)
    if isinstance(value, BaseModel):
        changed = {}
        for name, old in value:
            if name == "exception" or name in _USERS or old is None or isinstance(old, (int, float)):
                continue
            new = _shown(old, codec)
            if new is not old:
                changed[name] = new
        return value.model_copy(update=changed) if changed else value
    if isinstance(value, (list, tuple)):
        new_items = [_shown(item, codec) for item in value]
        same = all(new is old for new, old in zip(new_items, value, strict=True))
        return value if same else type(value)(new_items)
    if isinstance(value, dict):
        new_values = {name: _shown(item, codec) for name, item in value.items()}
        return value if all(new_values[name] is item for name, item in value.items()) else new_values
    return value


def refused(run_id: str, events: Iterable[Event], codec: StorageCodec) -> Iterator[Exception]:
    """What is wrong with what one run stores through the codec's hook: each value or code that it refuses."""
    seen: set[str] = set()
    for event in events:
        here, code = codec.at(run_id, _place_of(event)), codec.for_code()
        for item in _stored(event):
            if isinstance(item, CodeRef) and item.how == "snapshot" and item.ref is not None and item.ref not in seen:
                seen.add(item.ref)
                yield from _refused(code.get_code, item.ref)
            elif isinstance(item, CodeRef) and item.payload is not None:
                yield from _refused(code.check, item.payload)
            elif isinstance(item, Payload):
                yield from _refused(here.check, item)


def _refused(read: Callable[[Any], object], what: Any) -> Iterator[Exception]:
    try:
        read(what)
    except (StorageError, PayloadError) as error:
        yield error


def _place_of(event: Event) -> str:
    """Where the values of an event lie: at its position, but a run's end names that of a step."""
    return "" if isinstance(event, RunFailed) else getattr(event, "position", "")


def _stored(value: Any) -> Iterator[Payload | CodeRef]:
    if isinstance(value, (Payload, CodeRef)):
        yield value
    elif isinstance(value, BaseModel):
        for name, inner in value:
            if name not in _USERS:
                yield from _stored(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _stored(inner)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _stored(inner)
