"""Records and small checked files: any prefix is read, any flipped bit is seen, nothing out of place is taken."""

from __future__ import annotations

import pytest
from pydantic_core import to_json

from pyworkflow_ray.engine.events import StepStarted, UnknownEvent
from pyworkflow_ray.errors import CorruptJournalError, PayloadError, StorageError
from pyworkflow_ray.storage.checked import decode_checked, encode_checked
from pyworkflow_ray.storage.record import chain_start, decode_records, encode_record, event_body, parse_event
from tests.journals import created, fired


def lines(*bodies: bytes, start: int = 7) -> list[bytes]:
    result, chain = [], start
    for body in bodies:
        line, chain = encode_record(body, chain)
        result.append(line)
    return result


def test_any_prefix_gives_the_whole_records_in_it_and_says_torn() -> None:
    parts = lines(b"{}", b'{"a":1}', b'{"b":"' + b"x" * 50 + b'"}')
    data = b"".join(parts)
    ends = [len(b"".join(parts[:n])) for n in range(4)]
    for cut in range(len(data) + 1):
        decoded = decode_records(data[:cut], 7)
        assert decoded.length == max(end for end in ends if end <= cut)
        assert decoded.end == ("clean" if cut in ends else "torn")


def test_every_flipped_bit_is_seen() -> None:
    data = b"".join(lines(b"{}", b'{"a":1}'))
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert decode_records(bytes(flipped), 7).end == "damaged", f"bit {bit}"


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2), (0, 0, 1, 2), (0, 1, 1, 2), (2, 1, 0)])
def test_swapped_dropped_and_repeated_records_are_damage(order: tuple[int, ...]) -> None:
    parts = lines(b'{"a":1}', b'{"a":2}', b'{"a":3}')
    assert decode_records(b"".join(parts[n] for n in order), 7).end == "damaged"


def test_a_record_of_another_run_storage_or_epoch_is_damage() -> None:
    here = chain_start("s", "run", 1)
    for elsewhere in (chain_start("s", "run", 2), chain_start("s", "nur", 1), chain_start("t", "run", 1)):
        assert decode_records(lines(b"{}", start=elsewhere)[0], here).end == "damaged"


def test_room_that_was_never_written_counts_as_torn_and_one_zeroed_byte_as_damage() -> None:
    data = b"".join(lines(b"{}", b'{"a":1}'))
    assert decode_records(data + b"\0" * 100, 7).end == "torn"
    assert decode_records(data + b"\0" * 100, 7).length == len(data)
    assert decode_records(data[:-20] + b"\0" * 20, 7).end == "torn"
    assert decode_records(data[:-1] + b"\0", 7).end == "damaged"


def test_an_event_comes_back_equal() -> None:
    event = created(
        attributes={"__type__": "os.system", "__class__": ["x"], "ü": "\u202e", "n": [1.5, None, True, 2**70]}
    )
    assert parse_event(event_body(event, 3)) == event


def test_an_unknown_type_is_ignored_only_where_its_record_says_safe() -> None:
    raw = to_json({"type": "step_hinted", "seq": 4, "at": 1.0, "hint": [1]})
    event = parse_event(b'{"seq":4,"epoch":0,"safe":true,"event":%s}' % raw)
    assert isinstance(event, UnknownEvent)
    assert (event.type, event.seq, event.model_extra) == ("step_hinted", 4, {"hint": [1]})
    with pytest.raises(StorageError, match=r"'step_hinted' is not known .* upgrade"):
        parse_event(b'{"seq":4,"epoch":0,"event":%s}' % raw)


def test_safe_events_are_marked() -> None:
    assert b'"safe":true' in event_body(StepStarted(seq=1, position="1", dispatch=1, attempt=1, started_at=1.0), 0)
    assert b'"safe":true' not in event_body(fired(1), 0)


def test_a_newer_event_schema_is_refused_by_name() -> None:
    with pytest.raises(StorageError, match="event schema 99"):
        parse_event(event_body(created(schema_version=99), 0))


def test_a_known_type_that_does_not_fit_is_damage_even_where_safe() -> None:
    with pytest.raises(CorruptJournalError, match="'timer_fired'"):
        parse_event(b'{"seq":4,"epoch":0,"safe":true,"event":{"type":"timer_fired","seq":4}}')


def test_what_has_no_json_form_is_refused_before_anything_is_written() -> None:
    with pytest.raises(PayloadError, match="run_created"):
        event_body(created(attributes={"x": object()}), 0)


def test_a_checked_file_shows_every_flipped_bit_and_its_wrong_place() -> None:
    data = encode_checked("leases/a", {"lease": "a"})
    assert decode_checked("leases/a", data, "p") == {"lease": "a"}
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptJournalError, match="p is damaged"):
            decode_checked("leases/a", bytes(flipped), "p")
    for cut in range(len(data)):
        with pytest.raises(CorruptJournalError):
            decode_checked("leases/a", data[:cut], "p")
    with pytest.raises(CorruptJournalError):
        decode_checked("leases/b", data, "p")
